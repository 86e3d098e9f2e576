"""What every verb shares: results go to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, TextIO, cast

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

UNKNOWN = "unknown"
PIPE_COLUMNS = 10_000  # where there is no terminal: a line that is cut in two is no command any more


def stderr(*, markup: bool = True) -> Console:
    """The console for progress, tables and statistics. Without `markup` square brackets in a text stay."""
    from rich.console import Console

    class Messages(Console):
        def on_broken_pipe(self) -> None:  # rich would end the program, and take stdout with it
            self.quiet = True

        def status(self, status: Any, **options: Any) -> Any:
            from merino_edge.cli.progress_lines import StatusLines

            return super().status(status, **options) if self.is_interactive else StatusLines(self, str(status))

    return Messages(stderr=True, highlight=False, markup=markup, width=_columns(sys.stderr))


def stdout(*, soft_wrap: bool = False) -> Console:
    """The console for results that people read.

    Square brackets in a text stay what they are. What an artefact says cannot steer the terminal.
    """
    from rich.console import Console

    class Results(Console):
        def print(self, *objects: Any, **options: Any) -> None:
            super().print(*(_harmless(item) if isinstance(item, str) else item for item in objects), **options)

        def on_broken_pipe(self) -> None:  # rich would end the program with exit code 1
            raise BrokenPipeError

    return Results(highlight=False, markup=False, soft_wrap=soft_wrap, width=_columns(sys.stdout))


def _columns(stream: TextIO) -> int | None:
    """The width of a console on `stream`; None: what the terminal or $COLUMNS says."""
    return None if stream.isatty() or "COLUMNS" in os.environ else PIPE_COLUMNS


def _harmless(text: str) -> str:
    return "".join(c if c.isprintable() or c in "\n\t" else "?" for c in text)


def print_json(value: Any) -> None:
    """Print one JSON object on stdout, for another program."""
    sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")
    sys.stdout.flush()


def print_line(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def check_line(check: dict[str, Any]) -> str:
    """One line of a parity report (merino_edge.export.parity): mark, name, value and limit."""
    limit = "reported only" if check["limit"] is None else f"limit {check['limit']:g}"
    return f"{'✓' if check['passed'] else '✗'} {check['check']:<20} {check['value']:.6g}  ({limit})"


def plain(value: Any, empty: str = UNKNOWN) -> str:
    """A field of a device card or of a sensor reading as text, without the parts that are unknown."""
    if isinstance(value, dict):
        shown = {key: item for key, item in value.items() if item != UNKNOWN}
        return ", ".join(f"{key} {plain(item)}" for key, item in shown.items()) or empty
    if isinstance(value, list):
        return " ".join(map(str, value)) or empty
    return f"{value:.10g}" if isinstance(value, float) else str(value)


@contextmanager
def progress(console: Console | None = None, *, lines: bool = True) -> Iterator[Progress]:
    """A progress bar on stderr with elapsed and remaining time.

    Where stderr is not a terminal, a line now and then takes its place; without `lines`, nothing does.
    """
    screen = console or stderr()
    if lines and not screen.is_interactive:
        from merino_edge.cli.progress_lines import ProgressLines

        with ProgressLines(screen) as printed:
            yield cast("Progress", printed)
        return
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=screen, transient=False, disable=not screen.is_interactive) as bar:
        yield bar
