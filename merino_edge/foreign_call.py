"""A call into a library's own code: whatever goes wrong there becomes one ArtefactError.

Libraries in Rust panic where they meet what nobody thought of. A panic is a BaseException, and its text is on stderr
before Python hears of it. What a file makes a library do may also take for ever, and native code cannot be stopped. So
a call may be given a time: after it the caller goes on, and the call ends with the process.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import TypeVar

from merino_edge.errors import ArtefactError, MerinoError

R = TypeVar("R")

OURS = (MerinoError, MemoryError, KeyboardInterrupt, SystemExit, GeneratorExit)  # not a library's failures
MOST_REASON_CHARACTERS = 200


def call(function: Callable[[], R], what: str, hint: str, *, seconds: float | None = None, quiet: bool = False) -> R:
    """`function()`. Raises ArtefactError with `what` where it fails, or where it takes more than `seconds`.

    `quiet` keeps a panic's text off stderr. What other threads print meanwhile is lost, so it is for short calls.
    """
    try:
        with _QUIET if quiet else _LOUD:
            return function() if seconds is None else _within(function, seconds)
    except OURS:
        raise
    except BaseException as error:  # a panic is no Exception
        raise ArtefactError(f"{what} ({_reason(error)})", hint) from None


def _within(function: Callable[[], R], seconds: float) -> R:
    done: list[R] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(function())
        except BaseException as error:  # it is raised again in the caller's thread
            failed.append(error)

    thread = threading.Thread(target=run, name="foreign call", daemon=True)
    thread.start()
    thread.join(seconds)
    if failed:
        raise failed[0]
    if not done:
        raise TimeoutError(f"it took more than {seconds:.0f} s")
    return done[0]


def _reason(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text[:MOST_REASON_CHARACTERS] or type(error).__name__


class _Loud:
    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        pass


class _Quiet:
    """While it is entered, in any thread, file 2 is /dev/null: native code writes there without asking Python."""

    def __init__(self) -> None:
        self._lock, self._entered, self._stderr = threading.Lock(), 0, -1

    def __enter__(self) -> None:
        with self._lock:
            self._entered += 1
            if self._entered == 1:
                self._stderr = _redirected()

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._entered -= 1
            if self._entered == 0 and self._stderr >= 0:
                os.dup2(self._stderr, 2)
                os.close(self._stderr)


def _redirected() -> int:
    """Point file 2 to /dev/null and return a copy of what it was; -1 where it is closed or no handle is left."""
    try:
        before = os.dup(2)
    except OSError:
        return -1
    try:
        null = os.open(os.devnull, os.O_WRONLY)
    except OSError:
        os.close(before)
        return -1
    os.dup2(null, 2)
    os.close(null)
    return before


_LOUD, _QUIET = _Loud(), _Quiet()
