"""A stop that is asked for by a signal: what runs ends at a place of its own choice, and saves first."""

from __future__ import annotations

import signal
from types import FrameType
from typing import Any

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class StopOnSignal:
    """Turns Ctrl-C, SIGTERM or SIGHUP into a request to stop, which a call reports, from the first step on.

    The same signal again interrupts as usual. torchrun sends its workers SIGTERM after the terminal's SIGINT.
    """

    def __init__(self) -> None:
        self._requested, self._previous = False, dict[signal.Signals, Any]()

    def arm(self) -> None:
        """From now on a signal is a request. Signals that are ignored stay so."""
        for number in STOPPING if not self._previous else ():
            if (previous := signal.getsignal(number)) not in (signal.SIG_IGN, None):
                self._previous[number] = previous
                signal.signal(number, self._request)

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        for number, previous in self._previous.items():
            signal.signal(number, previous)

    def __call__(self) -> bool:
        """Whether a stop was requested."""
        return self._requested

    def _request(self, number: int, frame: FrameType | None) -> None:
        self._requested = True
        signal.signal(number, self._previous[signal.Signals(number)])
