"""The one kernel of our own: after a step of one token, the new rows of every layer into their caches.

A `primitive` graph puts them out (merino_edge.export.lowerings.primitive), since TensorRT before 10.15 updates no cache. The
position is read from the GPU's memory, so the launch is the same in every step and can be recorded with it. Compiled
for the GPU that is there when a plan opens; where the compiler (NVRTC, a part of CUDA's toolkit) is missing, the plan
copies the rows one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merino_edge.runtime.engines.cuda import Cuda

NAME = "write_rows"
SOURCE = """
// One block for each head (y) of each cache (x). A row is `words` of 4 bytes, a cache [heads, places, words].
extern "C" __global__ void write_rows(
    const long long* position, const unsigned long long* rows, const unsigned long long* caches, const int* heads,
    int words, int places)
{
    const int cache = blockIdx.x, head = blockIdx.y;
    if (head >= heads[cache]) return;
    const unsigned* from = (const unsigned*)rows[cache] + (long long)head * words;
    unsigned* to = (unsigned*)caches[cache] + ((long long)head * places + position[0]) * words;
    for (int i = threadIdx.x; i < words; i += blockDim.x) to[i] = from[i];
}
"""
THREADS = 32
POINTERS = 4  # of the arguments, the first ones; the others are 32-bit integers


class KvScatterKernel:
    """Writes into the caches of one plan; `queue` as often as there are steps."""

    def __init__(
        self,
        cuda: Cuda,
        position: int,
        rows: Sequence[int],
        caches: Sequence[int],
        *,
        heads: Sequence[int],
        row_bytes: int,
        capacity: int,
    ) -> None:
        """Addresses: of the step's position (int64), and by cache of its new rows [heads, row_bytes] and of itself
        [heads, places, row_bytes]. Raises UnsupportedError where there is no compiler, or no memory."""
        self._cuda, self._kernel = cuda, cuda.compile(SOURCE, NAME)
        tables: list[NDArray[Any]] = [np.array(rows, np.uint64), np.array(caches, np.uint64), np.array(heads, np.int32)]
        addresses = [cuda.allocate(table.nbytes) for table in tables]
        for table, address in zip(tables, addresses, strict=True):
            cuda.to_device(table, address)
        cuda.synchronize()  # the tables here may go now
        self._grid = (len(caches), max(heads))
        self._arguments = (position, *addresses, row_bytes // 4, capacity)

    def queue(self) -> None:
        """Write the rows of the step that was queued before."""
        self._cuda.start(self._kernel, self._grid, THREADS, self._arguments, POINTERS)
