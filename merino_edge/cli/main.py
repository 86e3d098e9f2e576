"""The `merino-edge` program: collects the verbs and turns refusals into one line and an exit code.

`--debug`, anywhere on the line, shows the traceback behind a refusal. Verb modules import only typer
and the standard library at the top, so that `--help` stays instant.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from typing import Annotated

import typer

from merino_edge import __version__
from merino_edge.cli import bench, demo, doctor, export, generate, profile, search, show, train
from merino_edge.cli import import_ as import_verb
from merino_edge.errors import MerinoError

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
    "search": search.search,
    "train": train.train,
    "import": import_verb.import_model,
    "export": export.export,
    "generate": generate.generate,
    "bench": bench.bench,
    "show": show.show,
    "doctor": doctor.doctor,
    "demo": demo.demo,
}
for name, verb in VERBS.items():
    app.command(name)(verb)


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
    try:
        app()
    except MerinoError as error:
        if debug:
            raise
        sys.stderr.write(f"merino-edge: {error}\n")
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        sys.stderr.write("merino-edge: interrupted\n")
        sys.exit(130)
    except BrokenPipeError:  # the reader of a pipe went away; that is its right
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)
    except MemoryError:
        if debug:
            raise
        sys.stderr.write("merino-edge: out of memory; use a smaller model, batch or context\n")
        sys.exit(1)
