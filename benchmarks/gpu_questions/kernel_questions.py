"""Questions about the engine's two kernels and about CUDA graphs, compared with NumPy.

A test asks them on the strict stand-in for the driver, and breaks what each of them looks at.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gpu_questions.parts import Writer, comes_back, graph_us, opened, time_us
from gpu_questions.question import Answer, judged
from merino_edge.runtime.engines.topk_kernel import TOP_K, TopKKernel

Shape = tuple[Sequence[int], int, int]  # heads of each cache, places, elements of a row
SHAPES: tuple[Shape, ...] = (([3] * 60, 1024, 64), ([1, 4, 2], 64, 128), ([9, 1], 8192, 32))
VOCABULARIES = (40, 2048, 49_152, 151_936)


def kv_scatter(shapes: Sequence[Shape] = SHAPES) -> Answer:
    """The kernel that writes new keys and values, at the first, the middle and the last place of each cache."""
    rng, wrong = np.random.default_rng(0), []
    with opened() as cuda:
        for heads, places, width in shapes:
            wanted = [np.zeros((count, places, width), np.float16) for count in heads]
            writer = Writer(cuda, heads, places, width)
            for place in (0, places // 2, places - 1):
                rows = [rng.standard_normal((count, width)).astype(np.float16) for count in heads]
                writer.load(rows, place)
                writer.kernel.queue()
                for cache, row in zip(wanted, rows, strict=True):
                    cache[:, place] = row
                bad = sum(not np.array_equal(*pair) for pair in zip(writer.caches(), wanted, strict=True))
                if bad:
                    wrong.append(f"{bad} of {len(heads)} caches of {places} places differ after place {place}")
    caches = sum(len(heads) for heads, *_ in shapes)
    return judged(wrong, f"{caches} caches are NumPy's after each of {3 * len(shapes)} launches")


def topk(sizes: Sequence[int] = VOCABULARIES) -> Answer:
    """The kernel that finds the largest logits: planted at the first, middle and last place, and among many ties."""
    rng, wrong, compared = np.random.default_rng(0), [], 0
    with opened() as cuda:
        for size in sizes:
            address = cuda.allocate(4 * size)
            kernel = TopKKernel(cuda, address, size)
            cases = {f"place {place}": _planted(rng, size, place) for place in (0, size // 2, size - 1)}
            cases["ties"] = rng.standard_normal(1000).astype(np.float32)[rng.integers(1000, size=size)]
            endless = np.where(rng.random(size) < 0.3, -np.inf, rng.standard_normal(size))
            cases["minus infinity"] = endless.astype(np.float32)
            for name, logits in cases.items():
                cuda.to_device(logits, address)
                kernel.queue()
                cuda.synchronize()
                for k in (1, min(size, kernel.max_k) // 2, kernel.max_k):
                    compared += 1
                    if not _is_topk(kernel.candidates(k), logits, k):
                        wrong.append(f"{size} logits, {name}, k {k}")
    return judged(wrong, f"{compared} selections from {', '.join(map(str, sizes))} logits are NumPy's")


def recorded() -> Answer:
    """What a CUDA graph takes, and what it refuses. The engine needs the first four; the stream must live on."""
    wrong, took, refused = [], [], []
    with opened() as cuda:
        pinned, pageable, address = cuda.pinned((256,), np.float32), np.zeros(256, np.float32), cuda.allocate(1024)
        writer, fresh = Writer(cuda, [2], 4, 64), Writer(cuda, [2], 4, 64)
        writer.kernel.queue()  # a driver may load a kernel at its first launch
        needed: dict[str, Callable[[], Any]] = {
            "copy from pinned": lambda: cuda.to_device(pinned, address),
            "copy to pinned": lambda: cuda.to_host(address, pinned),
            "kernel": writer.kernel.queue,
            "2D copy": lambda: cuda.copy_rows(address, address + 512, 64, 2, source_pitch=128, target_pitch=128),
        }
        others: dict[str, Callable[[], Any]] = {
            "kernel that never ran": fresh.kernel.queue,
            "copy from pageable": lambda: cuda.to_device(pageable, address),
            "copy to pageable": lambda: cuda.to_host(address, pageable),
            "allocation": lambda: cuda.allocate(64),
            "pinned allocation": lambda: cuda.pinned((64,), np.uint8),
            "waiting": cuda.synchronize,
        }
        for name, work in (needed | others).items():
            cuda.synchronize()
            graph = cuda.recorded(work)
            (refused if graph is None else took).append(name)
            if graph is None and name in needed:
                wrong.append(f"{name} is refused")
            if not comes_back(cuda):
                wrong.append(f"the stream is broken after {name}")
    return judged(wrong, f"recorded: {', '.join(took)}; refused: {', '.join(refused) or 'nothing'}")


def replay() -> Answer:
    """Whether a recorded step reads new rows and a new position, as each step of an answer needs it."""
    wrong, width, places = [], 32, 16
    with opened() as cuda:
        writer = Writer(cuda, [2], places, width)
        position, rows = cuda.pinned((1,), np.int64), cuda.pinned((2, width), np.float16)
        back = cuda.pinned((2, places, width), np.float16)

        def step() -> None:
            cuda.to_device(position, writer.position)
            cuda.to_device(rows, writer.rows[0])
            writer.kernel.queue()
            cuda.to_host(writer.targets[0], back)

        step()  # as the engine does: its second step is recorded
        cuda.synchronize()
        graph, wanted = cuda.recorded(step), np.zeros((2, places, width), np.float16)
        if graph is None:
            return judged(["the step cannot be recorded"], "")
        for place in (0, 7, places - 1):
            position[0], rows[:] = place, place + 1
            wanted[:, place] = place + 1
            cuda.launch(graph)
            cuda.synchronize()
            if not np.array_equal(back, wanted):
                wrong.append(f"the launch for place {place} gives other values")
    return judged(wrong, "three launches of one graph wrote three places")


def times(steps: int = 200) -> Answer:
    """How long the kernels of a step take [us]. The figure is that of the recorded writer of 60 caches."""
    with opened() as cuda:
        writer = Writer(cuda, [3] * 60, 1024, 64)

        def copies() -> None:
            for row, cache in zip(writer.rows, writer.targets, strict=True):
                cuda.copy_rows(row, cache, 128, 3, source_pitch=128, target_pitch=1024 * 128)

        found = {
            "60 rows, kernel": time_us(cuda, writer.kernel.queue, steps),
            "60 rows, graph": graph_us(cuda, writer.kernel.queue, steps),
            "60 rows, copies": time_us(cuda, copies, max(1, steps // 4)),
        }
        for size in VOCABULARIES[2:]:
            address, host = cuda.allocate(4 * size), cuda.pinned((size,), np.float32)
            kernel = TopKKernel(cuda, address, size)
            kernel.queue()
            found[f"top-k of {size}, graph"] = graph_us(cuda, kernel.queue, steps)
            found[f"{size} logits to the host"] = time_us(cuda, lambda a=address, h=host: cuda.to_host(a, h), steps)
    return Answer(found["60 rows, graph"], ", ".join(f"{name} {us:.1f} us" for name, us in found.items()))


def _planted(rng: Any, size: int, place: int) -> Any:
    logits = rng.standard_normal(size).astype(np.float32)
    logits[place] = 100
    return logits


def _is_topk(found: Any, logits: Any, k: int) -> bool:
    """Whether the candidates are the k largest with their ties; None is right where more tie than are kept."""
    wanted = np.flatnonzero(logits >= np.sort(logits)[-k])
    if found is None:
        return bool(wanted.size >= min(logits.size, TOP_K))
    return np.array_equal(found.ids, wanted) and np.array_equal(found.logits, logits[wanted])
