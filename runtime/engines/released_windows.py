"""Which positions of the caches of layers with a window were given back, and which stay.

A step of several rows may be run again (`SLACK`), and an answer's prompt continued (`kept_start`). Knows no engine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from merino_edge.runtime.engines.cache_memory import CacheMemory
from merino_edge.runtime.engines.convolution_states import LAST_PAIR, SLACK

RELEASED_AT_ONCE = 32  # positions
MOST_KEPT = 1024  # positions of an answer, after which the prompt's windows are given back


class ReleasedWindows:
    """`windows`: positions that a layer sees, by the index of its cache; of caches with a window only."""

    def __init__(self, windows: Mapping[int, int]) -> None:
        self._windows = windows
        self._released = dict.fromkeys(windows, 0)  # how many first positions
        self.kept_start = 0  # a position at which a step may start; 0: none is kept

    @property
    def least_start(self) -> int:
        """The lowest position beside 0 that a step may start at."""
        return max((gone + self._windows[i] - 1 for i, gone in self._released.items() if gone), default=0)

    @property
    def any(self) -> bool:
        """Whether a layer has a window."""
        return bool(self._windows)

    def of(self, index: int) -> int:
        """How many first positions of a cache were given back."""
        return self._released.get(index, 0)

    def start_again(self) -> None:
        """Every position is about to be written, or counts as written."""
        self._released = dict.fromkeys(self._windows, 0)

    def loaded(self, positions: int) -> None:
        """The caches were read from elsewhere. Further back than the last windows they may hold nothing."""
        self._released = {i: max(0, positions - window + 1 - LAST_PAIR) for i, window in self._windows.items()}

    def release(self, memory: Sequence[CacheMemory], length: int) -> None:
        """Give back the memory of positions that windows of `length` positions leave behind."""
        keeps = self.kept_start > 0 and length - self.kept_start <= MOST_KEPT
        least = min(length - SLACK, self.kept_start) if keeps else length - SLACK
        for index, window in self._windows.items():
            first, end = self._released[index], least - window
            if end - first >= RELEASED_AT_ONCE:
                memory[index].release(first, end)
                self._released[index] = end
