"""Which positions the ring caches of layers with a window hold, and what is kept apart of them.

Such a cache has L rows; position p stands in row p modulo L (merino_edge.cache_rings). A step needs the positions of
its window before it, so it may start only where these are still held. The end of a prompt is kept apart, wherever an
answer goes. A cache of the whole context is a ring that never wraps. Knows no engine, and not where the rows lie.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merino_edge.runtime.engines.convolution_states import LAST_PAIR

Positions = NDArray[np.int64]  # [N]
Rows = NDArray[Any]  # [Hkv, N, D]


class RingCaches:
    """`windows`: the positions that a layer sees, by the name of its cache; of caches with a window only.

    `wrapping`: those of them that may wrap, and so need a kept window.
    """

    def __init__(self, windows: Mapping[str, int], wrapping: Collection[str]) -> None:
        self._windows, self._wrapping = dict(windows), tuple(wrapping)
        self._first = dict.fromkeys(windows, 0)  # the lowest position that is held
        self._kept: dict[str, Rows] = {}
        self.kept_start = 0  # a position whose windows are kept apart; 0: none

    @property
    def least_start(self) -> int:
        """The lowest position beside 0 and a kept one that a step may start at."""
        return max((first + self._windows[name] - 1 for name, first in self._first.items() if first), default=0)

    def held(self, name: str, positions: int) -> Positions:
        """Those of the first `positions` that a cache still holds."""
        return np.arange(min(self._first.get(name, 0), positions), positions)

    def ran(self, start: int, end: int, lengths: Mapping[str, int]) -> None:
        """A step writes the positions from `start` to `end` into caches of `lengths` rows.

        It is said before the step, which may fail when it has written some of them.
        """
        for name, first in self._first.items():
            self._first[name] = max(min(first, start), end - lengths[name])

    def mark_filled(self, positions: int, lengths: Mapping[str, int]) -> None:
        """Treat the first `positions` as written, whatever the caches hold."""
        self._first = {name: max(0, positions - lengths[name]) for name in self._windows}
        self.forget()

    def loaded(self, positions: int) -> None:
        """The caches were read from elsewhere. Further back than the last windows they may hold nothing."""
        self._first = {name: max(0, positions - LAST_PAIR - window + 1) for name, window in self._windows.items()}
        self.forget()

    def keep_from(self, position: int, read: Callable[[str, Positions], Rows]) -> None:
        """Keep what a step at `position` needs, which `read` reads from a cache."""
        if 0 < position < self.least_start:  # it is kept already, or gone
            return
        self.kept_start = position
        self._kept = {name: read(name, self._window(name)) for name in self._wrapping if position}

    def forget(self) -> None:
        """Keep nothing apart."""
        self.kept_start, self._kept = 0, {}

    def bring_back(self, start: int, write: Callable[[str, Positions, Rows], None]) -> bool:
        """Bring the kept window back where a step at `start` needs it; whether it did. Later positions are gone then.

        `write` replaces what a cache holds.
        """
        if not 0 < start < self.least_start:
            return False
        assert start == self.kept_start
        for name, rows in self._kept.items():
            write(name, self._window(name), rows)
            self._first[name] = int(self._window(name)[0])
        return True

    def _window(self, name: str) -> Positions:
        """The positions before the kept one that its step needs."""
        return np.arange(max(0, self.kept_start - self._windows[name] + 1), self.kept_start)
