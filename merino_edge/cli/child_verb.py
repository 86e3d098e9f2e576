"""A verb of this program in a process of its own: its memory is given back, and Ctrl-C ends it in order."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO

import typer

from merino_edge.errors import MerinoError
from merino_edge.parent import end_with_parent

INTERRUPTED = 130  # the exit code of a verb that Ctrl-C ended
ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class VerbInterrupted(KeyboardInterrupt):
    """Ctrl-C ended the verb, and it has said so."""


def run_verb(words: Sequence[str], *, stdout: int | IO[str], on_interrupt: Callable[[], None] = lambda: None) -> None:
    """Run `merino-edge WORDS`. Ctrl-C is passed on, and the verb ends by itself.

    Raises KeyboardInterrupt where that ended it, VerbInterrupted where it said so, and typer.Exit with its exit code
    where it failed; it has said why.
    Raises MerinoError where something else ended it, as the system does that has no memory left.
    """
    # A signal that comes while Python forks would be lost in its handlers of forks. So it waits.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)

    def begin() -> None:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        end_with_parent()

    try:
        # In a session of its own the verb hears of Ctrl-C from here alone, and once: the second would cost its work.
        child = subprocess.Popen(
            [*_program(), *words],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            start_new_session=True,
            preexec_fn=begin,
        )
    except BaseException:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        raise
    try:
        while child.poll() is None:
            try:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)
                child.wait()
            except KeyboardInterrupt:
                on_interrupt()
                child.send_signal(signal.SIGINT)
    finally:
        if child.poll() is None:
            child.kill()
    if child.returncode == INTERRUPTED:
        raise VerbInterrupted
    if child.returncode == -signal.SIGINT:  # before it could say so
        raise KeyboardInterrupt
    if child.returncode < 0:
        killed = f"merino-edge {words[0]} was ended by signal {-child.returncode}"
        raise MerinoError(killed, "free some memory, or choose a smaller model")
    if child.returncode:
        raise typer.Exit(child.returncode)


def _program() -> list[str]:
    """How this program was started: the installed script, or the module."""
    script = Path(sys.argv[0])
    return [str(script)] if script.name == "merino-edge" and script.is_file() else [sys.executable, "-m", "merino_edge"]
