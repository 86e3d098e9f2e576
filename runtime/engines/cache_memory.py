"""Memory of a KV cache whose pages can be given back: positions behind a layer's window are never read again.

A cache [B, Hkv, C, D] of B sequences is a private anonymous mapping. The system provides a page when it is first
written. A page that is released reads as zeros, and costs nothing until it is written again.
"""

from __future__ import annotations

import copy
import math
import mmap

import numpy as np
from numpy.typing import DTypeLike, NDArray

PAGE = mmap.PAGESIZE


class CacheMemory:
    """A cache of zeros. Raises MemoryError where there is no room for its addresses."""

    def __init__(self, shape: tuple[int, int, int, int], dtype: DTypeLike) -> None:
        size = math.prod(shape) * np.dtype(dtype).itemsize
        try:
            self._mapping = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except (OSError, OverflowError, ValueError) as error:
            raise MemoryError(str(error)) from None
        self.array: NDArray[np.generic] = np.frombuffer(self._mapping, dtype).reshape(shape)  # which keeps the mapping
        self._offset = 0  # bytes of the mapping before `array`

    def of_sequence(self, index: int) -> CacheMemory:
        """The part [1, Hkv, C, D] of one sequence: the same memory."""
        part = copy.copy(self)
        part.array, part._offset = self.array[index : index + 1], index * self.array.strides[0]
        return part

    def release(self, first: int, end: int) -> None:
        """Give back the whole pages that hold nothing but positions from `first` to `end`, of every head.

        The memory must be that of one sequence.
        """
        _, heads, _, _ = self.array.shape
        head_bytes, row_bytes = self.array.strides[1], self.array.strides[2]
        for head in range(heads):
            at = self._offset + head * head_bytes
            begin = -(-(at + first * row_bytes) // PAGE) * PAGE
            stop = (at + end * row_bytes) // PAGE * PAGE
            if stop > begin:
                self._mapping.madvise(mmap.MADV_DONTNEED, begin, stop - begin)
