"""The machine's free memory, this process's peak, and the memory bandwidth. Knows no engine.

A Jetson's GPU takes its memory from the system's, through NvMap. That does not count as memory of the process. So what
a build or a load takes is the fall of MemAvailable. MemAvailable counts the free pages of the contiguous memory
allocator (CMA). The kernel gives those only to who asks for them, and to pages that it can move, which a GPU's are not.
"""

from __future__ import annotations

import contextlib
import ctypes
import re
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from types import TracebackType

import numpy as np

from merino_edge.errors import UnsupportedError

PASSES = 15
SAMPLING_S = 0.05
NVMAP = "NvMap's 'error 12' means the same: the GPU gets no memory"


def meminfo_bytes(field: str, root: Path | str = "/") -> int | None:
    """A field of /proc/meminfo; None where the system does not say."""
    try:
        text = (Path(root) / "proc/meminfo").read_text(errors="replace")
    except OSError:
        return None
    found = re.search(rf"^{field}:\s*(\d{{1,12}}) kB", text, re.M)
    return int(found[1]) * 1024 if found else None


def gpu_free_bytes(root: Path | str = "/") -> int | None:
    """The memory that a GPU without memory of its own can still take; None where the system does not say."""
    available = meminfo_bytes("MemAvailable", root)
    return None if available is None else max(0, available - (meminfo_bytes("CmaFree", root) or 0))


def free_text(root: Path | str = "/") -> str:
    """The free memory for a refusal, such as "1,200 MB are free (256 MB more only in CMA)"."""
    cma = meminfo_bytes("CmaFree", root) or 0
    more = f" ({cma / 1e6:,.0f} MB more only in CMA)" if cma else ""
    return f"{(gpu_free_bytes(root) or 0) / 1e6:,.0f} MB are free{more}"


def check_gpu_memory(what: str, needed_bytes: int, root: Path | str = "/") -> None:
    """Raise UnsupportedError where a GPU that shares the system's memory cannot get `needed_bytes` for `what`."""
    free = gpu_free_bytes(root)
    if free is not None and needed_bytes > free:
        raise UnsupportedError(
            f"{what} needs about {needed_bytes / 1e6:,.0f} MB of GPU memory, {free_text(root)} ({NVMAP})",
            "close programs or reboot, or export with less --context or at a lower --precision; "
            "merino-edge doctor says what takes memory",
        )


class MemoryWatch:
    """How much of the machine's free memory was taken at most while its block ran. Other programs count too."""

    def __init__(self, root: Path | str = "/") -> None:
        self._root = root
        self._before = self._least = meminfo_bytes("MemAvailable", root) or 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    @property
    def taken_bytes(self) -> int:
        """The largest fall of the free memory so far."""
        return max(0, self._before - self._least)

    def __enter__(self) -> MemoryWatch:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def sample(self) -> None:
        """Look at the free memory now."""
        self._least = min(self._least, meminfo_bytes("MemAvailable", self._root) or 0)

    def _watch(self) -> None:
        while True:
            self.sample()
            if self._ended.wait(SAMPLING_S):
                return


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
