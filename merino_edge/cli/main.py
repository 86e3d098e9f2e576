"""The `merino-edge` program: runs a verb, and turns a refusal into one line and an exit code.

Modules of verbs import only typer and the standard library at the top. merino_edge.cli.verbs imports them only when
they are asked for. So `--help` is instant.
"""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import Annotated

import typer

from merino_edge import __version__
from merino_edge.cli.verbs import DEBUG_HELP, MAX_HELP_COLUMNS, ClosedPipe, VerbGroup
from merino_edge.errors import Interrupted, MerinoError, mapping_failure

NO_MEMORY = "allocate"  # PyTorch's word
NO_PRIMITIVE = "could not create a primitive"  # oneDNN's words where its memory is limited
NO_THREAD = "can't start new thread"  # Python's words: memory is short, or a container may have no more processes
CLOSED_PIPE = 141  # what a shell reports of a program that SIGPIPE ended

app = typer.Typer(
    name="merino-edge",
    cls=VerbGroup,
    help="Design, train, export and run small language models for NVIDIA Jetson boards.",
    rich_markup_mode=None,  # see merino_edge.cli.verbs
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": MAX_HELP_COLUMNS},
)


def _version(value: bool) -> None:
    if value:
        typer.echo(f"merino-edge {__version__}")
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help=f"{DEBUG_HELP} Every command has it too.")] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line. Exit codes: 0 done, 1.. a refusal (merino_edge.errors), 130 interrupted."""
    _open_what_is_closed()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):  # whoever ends it finds nothing half-written
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.default_int_handler)
    try:
        status = app(prog_name="merino-edge", standalone_mode=False)
        with ClosedPipe.told():
            sys.stdout.flush()
        sys.exit(status if isinstance(status, int) else 0)
    except ClosedPipe:  # the reader of a pipe went away; that is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(CLOSED_PIPE)
    except (KeyboardInterrupt, typer.Abort):  # before the verb began or after it ended
        _say("interrupted")
        sys.exit(Interrupted.exit_code)
    except SystemExit:
        raise
    except BaseException as error:  # a library's panic is no Exception
        _say(_one_line(error))
        sys.exit(getattr(error, "exit_code", 1))


def _say(line: str) -> None:
    with suppress(OSError):  # nobody can be told
        sys.stderr.write(f"merino-edge: {line}\n")


def _open_what_is_closed() -> None:
    """Stand in for closed standard streams. Else the next file that is opened would get their numbers."""
    for name, mode in {"stdin": "r", "stdout": "w", "stderr": "w"}.items():
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  it stays open


def _lacks_memory(text: str) -> bool:
    """Whether a library's words mean that it got no memory."""
    from merino_edge.cli import little_memory

    return NO_MEMORY in text or (NO_PRIMITIVE in text and little_memory.limit_bytes() is not None)


def _one_line(error: BaseException) -> str:
    """What happened and what to do next. File names and file contents in it cannot steer the terminal."""
    error = mapping_failure(error) or error
    text = str(error)
    if hasattr(error, "format_message"):  # click's, of words on the command line
        context = getattr(error, "ctx", None)
        text = f"{error.format_message().rstrip('.')}; see: {context.command_path if context else 'merino-edge'} --help"
    elif isinstance(error, OSError):
        where = f"{error.filename}: " if error.filename else ""
        text = f"{where}{error.strerror or error}; check the path and the disk"
    elif isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and _lacks_memory(text)):
        text = "out of memory; use a smaller model, batch or context"
    elif isinstance(error, RuntimeError) and NO_THREAD in text:
        text = "no thread can be started; free memory, or raise ulimit -u or the container's --pids-limit"
    elif not isinstance(error, MerinoError):
        text = f"unexpected {type(error).__name__} ({text}); add --debug to see where, and report it"
    return "".join(c if c.isprintable() else "?" for c in " ".join(text.split()))
