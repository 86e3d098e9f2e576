"""The outputs of the verb that runs: claimed before its work begins, given back when it ends."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

FORCE_HELP = "Replace what stands at --out, once its successor is whole."
SAME_HELP = "Go on; the same command does so without it too."
CONTINUE_HELP = "Go on with what an interrupted run of the same command has done."

_claimed = ExitStack()


@contextmanager
def of_verb() -> Iterator[None]:
    """Gives back, at the end, what is claimed meanwhile."""
    with _claimed:
        yield


def hold(resource: AbstractContextManager[object]) -> None:
    """Enter a context that ends with the verb."""
    _claimed.enter_context(resource)


def claim(out: Path, kind: str, *, force: bool | None = None, resumes: bool = False) -> None:
    """Hold the output until the verb ends, as `merino_edge.output.claim` does. Raises OutputError."""
    from merino_edge import output

    hold(output.claim(out, kind, force=force, resumes=resumes))
