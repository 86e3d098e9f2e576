"""This process's peak memory, and the machine's memory bandwidth. Knows no engine."""

from __future__ import annotations

import contextlib
import ctypes
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter

import numpy as np

PASSES = 15


def peak_memory_mb() -> float:
    """Largest resident memory of this process so far, in 10^6 bytes.

    It is read from VmHWM on Linux. `ru_maxrss` survives exec, so a small program started by a large one would
    report its parent's memory.
    """
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6


def release_freed_memory() -> None:
    """Return freed memory to the system. glibc would keep tens of MB after a model's weights were packed."""
    with contextlib.suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)


def reading_ms(size_bytes: int, threads: int) -> float:
    """The shortest time to read `size_bytes` bytes once with `threads` threads: a lower bound for a step, in ms.

    Each pass reads the same bytes, as each step reads the same weights. A part that fits into a CPU cache is
    therefore read from there.
    """
    words = np.ones(max(size_bytes // 8, threads), np.uint64)
    parts = np.array_split(words, threads)
    times_s = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(PASSES):
            began = perf_counter()
            list(pool.map(np.bitwise_or.reduce, parts))
            times_s.append(perf_counter() - began)
    return 1e3 * min(times_s)
