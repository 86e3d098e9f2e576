"""KV scatter kernel: writes the new keys and values of a one-token step into the caches of all layers.

A `primitive` graph returns the new keys and values (merino_edge.export.lowerings.primitive), because TensorRT before
10.15 has no operator that updates a cache. The kernel reads the position from GPU memory. Its launch is therefore the
same in each step and can be recorded in a CUDA graph. It is compiled for the present GPU when a plan opens. Without
the compiler (NVRTC, part of CUDA's toolkit) the plan copies the new keys and values one cache at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merino_edge.runtime.cuda.cuda import Cuda

NAME = "scatter_kv"
SOURCE = """
// One block for each head (y) of each cache (x). A row is `words` of 4 bytes, a cache a ring [heads, length, words].
extern "C" __global__ void scatter_kv(
    const long long* position, const unsigned long long* rows, const unsigned long long* caches, const int* heads,
    const int* lengths, int words)
{
    const int cache = blockIdx.x, head = blockIdx.y;
    if (head >= heads[cache]) return;
    const unsigned* from = (const unsigned*)rows[cache] + (long long)head * words;
    const long long length = lengths[cache], row = head * length + position[0] % length;
    unsigned* to = (unsigned*)caches[cache] + row * words;
    for (int i = threadIdx.x; i < words; i += blockDim.x) to[i] = from[i];
}
"""
THREADS = 32
POINTERS = 5  # the first arguments are pointers, the others are 32-bit integers


class KvScatterKernel:
    """The kernel with the addresses of one plan's caches. Call `queue` once in each step."""

    def __init__(
        self,
        cuda: Cuda,
        position: int,
        rows: Sequence[int],
        caches: Sequence[int],
        *,
        heads: Sequence[int],
        lengths: Sequence[int],
        row_bytes: int,
    ) -> None:
        """`position` is the address of the step's position (int64).

        For each cache, `rows` is the address of its new rows [heads, row_bytes], and `caches` is the address of the
        cache itself [heads, length, row_bytes]: position p stands in row p modulo its length. Raises UnsupportedError
        without a compiler or enough memory.
        """
        self._cuda, self._kernel = cuda, cuda.compile(SOURCE, NAME)
        tables: list[NDArray[Any]] = [np.array(part, np.uint64) for part in (rows, caches)]
        tables += [np.array(part, np.int32) for part in (heads, lengths)]
        addresses = [cuda.allocate(table.nbytes) for table in tables]
        for table, address in zip(tables, addresses, strict=True):
            cuda.to_device(table, address)
        cuda.synchronize()  # the tables on the host may be freed now
        self._grid = (len(caches), max(heads))
        self._arguments = (position, *addresses, row_bytes // 4)

    def queue(self) -> None:
        """Queue the kernel after a step's inference."""
        self._cuda.start(self._kernel, self._grid, THREADS, self._arguments, POINTERS)
