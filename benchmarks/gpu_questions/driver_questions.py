"""Questions about the driver's calls: threads, memory, many opens, and the packages that make the calls.

A test asks them on the strict stand-in for the driver, and breaks what each of them looks at.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from gpu_questions.parts import Writer, comes_back, opened
from gpu_questions.question import Answer, judged
from merino_edge.errors import UnsupportedError
from merino_edge.runtime.cuda import provider as providers
from merino_edge.runtime.cuda.cuda import Cuda
from merino_edge.runtime.engines.topk_kernel import TopKKernel

OPENS, MOST_LOST_BYTES = 200, 64 << 20
BYTES_OF_ONE = 1 << 20  # that each open allocates, on the GPU and on the host
TOO_MUCH_BYTES = 1 << 45
PAGE_BYTES = 4096


def opens() -> Answer:
    """Which GPU it is, and which package calls its driver."""
    with opened() as cuda:
        wrong = [] if comes_back(cuda) else ["memory does not come back as it was sent"]
        memory = "one memory with the CPU" if cuda.unified else "memory of its own"
        return judged(wrong, f"{cuda.capability}, {memory}, through {cuda.provider}")


def another_thread() -> Answer:
    """Whether a thread of the server may launch what another one recorded, and compile there."""
    rows = [np.ones((2, 32), np.float16)]
    with closing(Cuda()) as cuda:
        with cuda.active():
            writer = Writer(cuda, [2], 8, 32)
            writer.load(rows, 3)
            graph = cuda.recorded(writer.kernel.queue)
        if graph is None:
            return judged(["the kernel cannot be recorded"], "")

        def launches() -> str:
            cuda.launch(graph)
            return "" if np.array_equal(writer.caches()[0][:, 3], rows[0]) else "other values"

        def compiles() -> str:
            TopKKernel(cuda, cuda.allocate(4096), 1024).queue()
            cuda.synchronize()
            return ""

        tasks: dict[str, Callable[[], str]] = {
            "a launch": launches,
            "a compilation": compiles,
            "memory": lambda: "" if comes_back(cuda) else "other values",
        }
        faults = {name: _elsewhere(cuda, task) for name, task in tasks.items()}
    wrong = [f"{name}: {fault}" for name, fault in faults.items() if fault]
    return judged(wrong, "a launch, a compilation and copies ran on other threads")


def out_of_memory() -> Answer:
    """Whether too much memory is a typed refusal, and the next allocation works."""
    with opened() as cuda:
        try:
            cuda.allocate(TOO_MUCH_BYTES)
        except UnsupportedError as error:
            refusal = str(error)
        else:
            return judged([f"{TOO_MUCH_BYTES} bytes were given"], "")
        wrong = [] if "CUDA_ERROR_OUT_OF_MEMORY" in refusal else [f"another refusal: {refusal}"]
        if not comes_back(cuda):
            wrong.append("the next allocation does not work")
    return judged(wrong, refusal)


def many_opens(count: int = OPENS) -> Answer:
    """Whether opening and closing gives all memory back, on the GPU and on the host."""
    free, resident = [], []
    calls = providers.open_provider()
    calls.retain()  # so that the free memory can be asked for in between
    try:
        for number in range(count):
            with opened() as cuda:
                cuda.allocate(BYTES_OF_ONE)
                cuda.pinned((BYTES_OF_ONE,), np.uint8)
                cuda.synchronize()
            if number in (count // 10, count - 1):
                calls.push()
                free.append(calls.memory_bytes()[0])
                calls.pop()
                resident.append(PAGE_BYTES * int(Path("/proc/self/statm").read_text().split()[1]))
    finally:
        calls.release()
    lost = {"the GPU": free[0] - free[-1], "the host": resident[-1] - resident[0]}
    shown = ", ".join(f"{where} {size / 1e6:+.1f} MB" for where, size in lost.items())
    wrong = [f"lost: {shown}"] if max(lost.values()) > MOST_LOST_BYTES else []
    return judged(wrong, f"{count} opens; lost: {shown}")


def both_providers() -> Answer:
    """Whether each installed package that calls the driver works."""
    wrong, right = [], []
    for package in providers.PROVIDERS:
        try:
            there = find_spec(package) is not None
        except ModuleNotFoundError:  # no package `cuda` to look into
            there = False
        if not there:
            right.append(f"{package} is not installed")
            continue
        try:
            with opened(package) as cuda:
                works = comes_back(cuda) and cuda.recorded(lambda: None) is not None
            (right if works else wrong).append(f"{package} {'works' if works else 'gives other values'}")
        except UnsupportedError as refusal:
            wrong.append(f"{package}: {refusal}")
    return judged(wrong, ", ".join(right))


def _elsewhere(cuda: Cuda, task: Callable[[], str]) -> str:
    """What `task` says on another thread; an error as text."""
    said: list[str] = []

    def run() -> None:
        try:
            with cuda.active():
                said.append(task())
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return said[0]
