"""Pace: how fast answers end, so that a refused client knows when to come again. Knows no clock."""

from __future__ import annotations

import math

NEWEST_SHARE = 0.2  # of the newest answer in the mean: the last five or so count
MAX_SECONDS = 60


class Pace:
    """The mean time of an answer, of those that `at_once` run at the same time."""

    def __init__(self, at_once: int) -> None:
        self._at_once = at_once
        self._mean_s: float | None = None

    def ended(self, seconds: float) -> None:
        """An answer ended `seconds` after it had begun to run."""
        old = seconds if self._mean_s is None else self._mean_s
        self._mean_s = old + NEWEST_SHARE * (seconds - old)

    @property
    def seconds_to_next_end(self) -> int:
        """After how many whole seconds one of the running answers has ended, about: 1 to 60."""
        return min(max(math.ceil((self._mean_s or 0.0) / self._at_once), 1), MAX_SECONDS)
