"""Processes that end with the one that started them, even where that is killed."""

from __future__ import annotations

import contextlib
import ctypes
import signal

PR_SET_PDEATHSIG = 1  # of prctl(2)


def end_with_parent() -> None:
    """Let the kernel send this process SIGTERM when its parent ends. Else it would keep its output locked."""
    with contextlib.suppress(AttributeError, OSError):  # not on Linux
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
