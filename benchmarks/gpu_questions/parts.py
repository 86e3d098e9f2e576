"""What several questions about CUDA share: an opened GPU, the KV scatter kernel with caches of its own, and a clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from typing import Any

import numpy as np

from merino_edge.errors import UnsupportedError
from merino_edge.runtime.cuda import provider as providers
from merino_edge.runtime.cuda.cuda import Cuda
from merino_edge.runtime.engines.kv_scatter_kernel import KvScatterKernel


@contextmanager
def opened(package: str = "") -> Iterator[Cuda]:
    """CUDA with its context current on this thread."""
    with closing(Cuda(providers.open_provider(package))) as cuda, cuda.active():
        yield cuda


class Writer:
    """The KV scatter kernel with caches of its own, of float16."""

    def __init__(self, cuda: Cuda, heads: Sequence[int], places: int, width: int) -> None:
        self.cuda, self.shapes = cuda, [(count, places, width) for count in heads]
        self.position = cuda.allocate(8)
        self.rows = [cuda.allocate(count * 2 * width) for count in heads]
        self.targets = [cuda.allocate(count * places * 2 * width) for count in heads]
        self.kernel = KvScatterKernel(
            cuda,
            self.position,
            self.rows,
            self.targets,
            heads=heads,
            lengths=[places] * len(heads),
            row_bytes=2 * width,
        )

    def load(self, rows: Sequence[Any], place: int) -> None:
        """Send the rows and the place, and wait."""
        at = np.array([place], np.int64)
        self.cuda.to_device(at, self.position)
        for row, address in zip(rows, self.rows, strict=True):
            self.cuda.to_device(row, address)
        self.cuda.synchronize()

    def caches(self) -> list[Any]:
        """All caches, once what is queued is done."""
        found = [np.empty(shape, np.float16) for shape in self.shapes]
        self.cuda.synchronize()
        for array, address in zip(found, self.targets, strict=True):
            self.cuda.to_host(address, array)
        self.cuda.synchronize()
        return found


def comes_back(cuda: Cuda) -> bool:
    """Whether memory that is allocated now gives back what was sent to it."""
    sent, back = np.arange(1000, dtype=np.float32), np.ones(1000, np.float32)
    address = cuda.allocate(sent.nbytes)
    cuda.to_device(sent, address)
    cuda.to_host(address, back)
    cuda.synchronize()
    return bool(np.array_equal(sent, back))


def time_us(cuda: Cuda, work: Callable[[], Any], steps: int) -> float:
    """The mean time of `work` over `steps` in a row."""
    for _ in range(max(1, steps // 10)):
        work()
    cuda.synchronize()
    began = time.perf_counter()
    for _ in range(steps):
        work()
    cuda.synchronize()
    return round(1e6 * (time.perf_counter() - began) / steps, 2)


def graph_us(cuda: Cuda, work: Callable[[], Any], steps: int) -> float:
    """The same for `work` as a CUDA graph."""
    graph = cuda.recorded(work)
    if graph is None:
        raise UnsupportedError("a kernel cannot be recorded", "see the question about what is recorded")
    return time_us(cuda, lambda: cuda.launch(graph), steps)
