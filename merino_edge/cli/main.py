"""The `merino-edge` program: runs a verb, and turns a refusal into one line and an exit code.

`--debug`, anywhere on the line, shows the traceback behind a refusal. Modules of verbs import only typer and the
standard library at the top. merino_edge.cli.verbs imports them only when they are asked for. So `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
from typing import Annotated

import typer

from merino_edge import __version__
from merino_edge.cli.verbs import MAX_HELP_COLUMNS, VerbGroup
from merino_edge.errors import MerinoError

app = typer.Typer(
    name="merino-edge",
    cls=VerbGroup,
    help="Design, train, export and run small language models for NVIDIA Jetson boards.",
    no_args_is_help=True,
    rich_markup_mode=None,  # see merino_edge.cli.verbs
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_HELP_COLUMNS},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"merino-edge {__version__}")
        raise typer.Exit


@app.callback(epilog="Add --debug to any command to see the traceback behind a refusal.")
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1.. a refusal (merino_edge.errors), 130 interrupted."""
    debug = "--debug" in sys.argv
    sys.argv = [argument for argument in sys.argv if argument != "--debug"]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # whoever ends it finds nothing half-written
    try:
        app()
    except BrokenPipeError:  # the reader of a pipe went away; that is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except Exception as error:
        if debug:
            raise
        sys.stderr.write(f"merino-edge: {_one_line(error)}\n")
        sys.exit(getattr(error, "exit_code", 1))


def _one_line(error: Exception) -> str:
    """What happened and what to do next. File names and file contents in it cannot steer the terminal."""
    text = str(error)
    if isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}; check the path and the disk"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and "allocate" in text):  # PyTorch's
        text = "out of memory; use a smaller model, batch or context"
    elif not isinstance(error, MerinoError):
        text = f"unexpected {type(error).__name__} ({text}); add --debug to see where, and report it"
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
