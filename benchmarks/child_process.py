"""A child process that ends with whatever it has started."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path


@contextlib.contextmanager
def started(command: Sequence[str | Path], stderr: int) -> Iterator[subprocess.Popen[str]]:
    """Run `command` in a group of its own, which is ended on leaving. `stderr` is as in subprocess.Popen."""
    with _interrupt_later() as interrupted:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            errors="replace",
            start_new_session=True,
        )
    try:
        if interrupted:
            raise KeyboardInterrupt
        yield process
    finally:
        end(process)
        process.wait()


@contextlib.contextmanager
def _interrupt_later() -> Iterator[list[int]]:
    """Collect Ctrl-C meanwhile. An interrupt inside Popen would leave a process that nobody ends."""
    signals: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, _: signals.append(number))
    try:
        yield signals
    finally:
        signal.signal(signal.SIGINT, before)


def end(process: subprocess.Popen[str]) -> None:
    """End the process and all of its group at once."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def exit_text(code: int) -> str:
    """How a process ended, by its exit code: a negative one is a signal's number."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
