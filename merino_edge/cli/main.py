"""The `merino-edge` program: collects the verbs and turns refusals into one line and an exit code.

`--debug`, anywhere on the line, shows the traceback behind a refusal. Verb modules import only typer
and the standard library at the top, so that `--help` stays instant.
"""

from __future__ import annotations

import functools
import os
import signal
import sys
from collections.abc import Callable
from typing import Annotated, Any

import typer

from merino_edge import __version__
from merino_edge.cli import (
    bench,
    build,
    demo,
    doctor,
    estimate,
    evaluate,
    export,
    export_hf,
    generate,
    pareto,
    profile,
    search,
    serve,
    show,
    study,
    targets,
    teach,
    tokenize,
    train,
    write,
)
from merino_edge.cli import import_ as import_verb
from merino_edge.errors import Interrupted, MerinoError

app = typer.Typer(
    name="merino-edge",
    help="From a board to a chat: profile, search, train, export and run small language models.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
VERBS: dict[str, Callable[..., None]] = {
    "profile": profile.profile,
    "estimate": estimate.estimate,
    "search": search.search,
    "pareto": pareto.pareto,
    "write": write.write,
    "tokenize": tokenize.tokenize,
    "teach": teach.teach,
    "train": train.train,
    "study": study.study,
    "evaluate": evaluate.evaluate,
    "import": import_verb.import_model,
    "export": export.export,
    "export-hf": export_hf.export_hf,
    "build": build.build,
    "targets": targets.targets,
    "generate": generate.generate,
    "serve": serve.serve,
    "bench": bench.bench,
    "show": show.show,
    "doctor": doctor.doctor,
    "demo": demo.demo,
}


def _interruptible(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb`, refusing when it is interrupted: typer alone would end without a word."""

    @functools.wraps(verb)
    def run(*arguments: Any, **options: Any) -> None:
        try:
            verb(*arguments, **options)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None

    return run


for name, verb in VERBS.items():
    app.command(name)(_interruptible(verb))


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
