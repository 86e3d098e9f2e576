"""Progress where standard error is no terminal: a line now and then, from a thread of its own.

A verb that is done within ten seconds prints none. Later lines come ever more rarely, so that a log of days stays
short. The classes have those methods of rich's Progress and Status that the verbs use.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console

FIRST_SECONDS = 10.0
SHARE = 0.05  # of the time so far, between two lines
Own = TypeVar("Own", bound="Lines")


class Lines:
    """Prints its `line` now and then while it is open."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        self._console, self._clock, self._began = console, clock, clock()
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True, name="progress lines")

    @property
    def seconds(self) -> float:
        """The time since it was opened."""
        return self._clock() - self._began

    def line(self) -> str:
        """How far the verb is."""
        raise NotImplementedError

    def pause(self) -> float:
        """The time to the next line, in seconds."""
        return max(FIRST_SECONDS, SHARE * self.seconds)

    def __enter__(self: Own) -> Own:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(self.pause()):
            with suppress(OSError):  # nobody reads it any more
                self._console.print(self.line(), markup=False, highlight=False, soft_wrap=True)


class StatusLines(Lines):
    """What a verb does now, in place of rich's Status."""

    def __init__(self, console: Console, text: str, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock)
        self._text = text

    def update(self, text: str) -> None:
        self._text = text

    def line(self) -> str:
        return f"{self._text}, {spell_time(self.seconds)} so far"


class ProgressLines(Lines):
    """How much of one task is done, in place of rich's Progress."""

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__(console, clock)
        self._task: dict[str, Any] = {"description": "", "completed": 0, "total": None, "note": ""}
        self._first = 0  # what was done before

    def add_task(self, description: str, *, total: float | None, completed: int = 0, note: str = "") -> int:
        self._task = {"description": description, "completed": completed, "total": total, "note": note}
        self._first = completed
        return 0

    def update(self, task: int, *, advance: int = 0, **changes: Any) -> None:
        self._task |= {name: value for name, value in changes.items() if value is not None}
        self._task["completed"] += advance

    def advance(self, task: int, advance: int = 1) -> None:
        self.update(task, advance=advance)

    def line(self) -> str:
        total, done = self._task["total"], self._task["completed"]
        words = f"{self._task['description']}: "
        words += f"{done:,} of {total:,}" if total else spell_time(self.seconds) + " so far"
        if total and self._first < done < total:
            words += f", about {spell_time(self.seconds * (total - done) / (done - self._first))} left"
        return f"{words}; {self._task['note']}" if self._task["note"] else words


def spell_time(seconds: float) -> str:
    """A time in the unit that suits it: 40 s, 12 min, 3.5 h."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
