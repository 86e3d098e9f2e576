"""What only a GPU can say, in under six minutes: asked the first time that one is at hand, before anything else.

    python benchmarks/first_gpu.py --out first-gpu.jsonl        # on the machine with the GPU; nothing is installed
    python benchmarks/first_gpu.py --list                       # the questions, and the most seconds of each
    python benchmarks/first_gpu.py --only top-k recorded        # some of them, by parts of their names

It needs Python, NumPy and PyCUDA or cuda-bindings with NVRTC. PyTorch, TensorRT, compute-sanitizer and pytest are asked
where they are there. A line of JSON a question, what answers most first: {"question", "answer", "detail", "seconds"}.

| answer | meaning |
|---|---|
| yes, no | the detail says what was compared, or what was wrong; a crash and a timeout are a no |
| a number | a figure; the detail has its unit |
| no GPU | the driver finds none, so nothing else was asked |
| not here | a package or program is missing |
| no time | the total limit was reached before |

Each question has a process of its own, so that a broken driver cannot end the others. The first line is the machine.
The exit code is 0 whatever the answers are.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TextIO

import child_process
from gpu_questions import driver_questions, kernel_questions, library_questions, pytorch_questions
from gpu_questions.question import NO, Answer, Question, answered, line, one_line

NO_GPU, NO_TIME = "no GPU", "no time"
TOTAL_SECONDS, LEAST_SECONDS = 350.0, 5.0  # of all questions; with less left no question is asked
PACKAGES = (
    *("numpy", "torch", "cuda-bindings", "pycuda", "nvidia-cuda-nvrtc", "nvidia-cuda-nvrtc-cu12", "onnxruntime"),
    *("onnxruntime-gpu", "onnx-ir", "tokenizers", "tensorrt", "tensorrt-cu13", "tensorrt_rtx_cu12_bindings", "pytest"),
)
SMALL_SHAPES, SMALL_VOCABULARIES = (([3] * 4, 64, 64), ([1, 4, 2], 16, 128)), (40, 5000)  # a sanitizer takes long


def kernels() -> Answer:
    """Both kernels at sizes that a sanitizer gets through."""
    answers = (kernel_questions.kv_scatter(SMALL_SHAPES), kernel_questions.topk(SMALL_VOCABULARIES))
    return next((answer for answer in answers if answer.answer == NO), answers[0])


KERNELS = Question("both kernels at small sizes", kernels)
TO_SANITIZE = (sys.executable, Path(__file__).resolve(), "--ask", KERNELS.name)
QUESTIONS = (
    Question("CUDA opens", driver_questions.opens),
    Question("the KV scatter kernel writes what NumPy writes", kernel_questions.kv_scatter),
    Question("the top-k kernel finds what NumPy finds", kernel_questions.topk),
    Question("what a step queues can be recorded", kernel_questions.recorded),
    Question("a replay reads new values", kernel_questions.replay),
    Question("another thread may launch", driver_questions.another_thread),
    Question("out of memory is a refusal", driver_questions.out_of_memory),
    Question("200 opens lose no memory", driver_questions.many_opens),
    Question("each installed provider works", driver_questions.both_providers),
    Question("PyTorch shares the context", pytorch_questions.shared_context),
    Question("the kernels' times [us]", kernel_questions.times),
    Question("memcheck finds nothing", partial(library_questions.sanitized, "memcheck", TO_SANITIZE), 90),
    Question("racecheck finds nothing", partial(library_questions.sanitized, "racecheck", TO_SANITIZE), 90),
    Question("PyTorch's engine computes what the CPU computes", pytorch_questions.engine),
    Question("MFU of training merino-64m in bf16 [%]", pytorch_questions.training, 90),
    Question(
        "TensorRT for RTX runs an engine", partial(library_questions.tensorrt_engine, "tensorrt_rtx_bindings"), 90
    ),
    Question("TensorRT runs an engine", partial(library_questions.tensorrt_engine, "tensorrt"), 90),
    Question("torch.compile speeds training up [times]", pytorch_questions.compiling, 120),
    Question("the tests of the GPU pass", library_questions.gpu_tests, 180),
)


def machine() -> tuple[bool, dict[str, Any]]:
    """Whether the driver finds a GPU, and the line of the machine. It is asked without any package."""
    began = time.perf_counter()
    name, driver = _gpu()
    found = {package: installed for package in PACKAGES if (installed := _version(package))}
    system = f"Python {platform.python_version()}, {platform.machine()}, kernel {platform.release()}"
    versions = ", ".join(f"{package} {number}" for package, number in found.items())
    detail = one_line("; ".join(part for part in (driver, _said("nvidia-smi"), system, versions) if part), 2000)
    return bool(name), line("the machine", Answer(name or NO_GPU, detail), time.perf_counter() - began)


def _gpu() -> tuple[str, str]:
    """The first GPU's name, "" where there is none, and what the driver says."""
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        return "", f"the driver cannot be loaded ({error})"
    number, name = ctypes.c_int(), ctypes.create_string_buffer(256)
    if status := cuda.cuInit(0):
        return "", f"cuInit gives error {status}"
    cuda.cuDeviceGetCount(ctypes.byref(number))
    count = number.value
    if not count:
        return "", "the driver finds no device"
    cuda.cuDriverGetVersion(ctypes.byref(number))
    cuda.cuDeviceGetName(name, len(name), 0)
    cuda_version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    return name.value.decode(errors="replace") or "a GPU", f"{count} GPU, a driver for CUDA {cuda_version}"


def _said(program: str) -> str:
    query = "--query-gpu=name,driver_version,memory.total,compute_cap,clocks.max.sm"
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        command = [program, query, "--format=csv,noheader"]
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    return ""


def _version(package: str) -> str:
    with contextlib.suppress(PackageNotFoundError):
        return version(package)
    return ""


def ask_apart(name: str, command: Sequence[str | Path], seconds: float) -> dict[str, Any]:
    """The line that `command` prints about a question; a NO where it ends without one, or takes longer."""
    began = time.perf_counter()
    with child_process.started(command, stderr=subprocess.STDOUT) as process:
        try:
            text, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return line(name, Answer(NO, f"took more than {seconds:.0f} s"), time.perf_counter() - began)
    for row in reversed(text.splitlines()):  # a library may print lines of its own
        if row.startswith('{"question": '):
            return dict(json.loads(row))
    ended = child_process.exit_text(process.returncode)
    return line(name, Answer(NO, one_line(f"{ended}: {text[-400:]}")), time.perf_counter() - began)


def ask_all(questions: Sequence[Question], total_seconds: float, files: Sequence[TextIO]) -> list[dict[str, Any]]:
    """Ask every question and print each line as soon as it is known."""
    lines: list[dict[str, Any]] = []

    def tell(found: dict[str, Any]) -> None:
        lines.append(found)
        for file in files:
            file.write(json.dumps(found) + "\n")
            file.flush()

    deadline = time.monotonic() + total_seconds
    there, first = machine()
    tell(first)
    for question in questions:
        left = deadline - time.monotonic()
        if not there:
            tell(line(question.name, Answer(NO_GPU, "see the machine"), 0))
        elif left < LEAST_SECONDS:
            tell(line(question.name, Answer(NO_TIME, f"the limit is {total_seconds:.0f} s"), 0))
        else:
            command = (sys.executable, Path(__file__).resolve(), "--ask", question.name)
            tell(ask_apart(question.name, command, min(question.seconds, left)))
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="file to write the lines to as well")
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="limit of all questions")
    parser.add_argument("--only", nargs="+", default=[""], metavar="PART", help="questions with this in their names")
    parser.add_argument("--list", action="store_true", help="only print the questions")
    parser.add_argument("--ask", help=argparse.SUPPRESS)  # one question in this process
    options = parser.parse_args()
    if options.ask:
        (asked,) = (question for question in (*QUESTIONS, KERNELS) if question.name == options.ask)
        print(json.dumps(answered(asked)), flush=True)
        return
    questions = [question for question in QUESTIONS if any(part in question.name for part in options.only)]
    if options.list:
        print("\n".join(f"{question.seconds:4.0f} s  {question.name}" for question in questions))
        return
    with contextlib.ExitStack() as stack:
        files = [sys.stdout, *([stack.enter_context(options.out.open("w"))] if options.out else [])]
        began = time.perf_counter()
        lines = ask_all(questions, options.seconds, files)
    counts: dict[str, int] = {}
    for found in lines[1:]:
        kind = found["answer"] if isinstance(found["answer"], str) else "figures"
        counts[kind] = counts.get(kind, 0) + 1
    told = ", ".join(f"{kind} {count}" for kind, count in counts.items())
    print(f"{len(lines) - 1} questions in {time.perf_counter() - began:.0f} s: {told}", file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
