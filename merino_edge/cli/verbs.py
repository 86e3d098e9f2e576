"""The table of the verbs, and a command group that imports a verb only when it is asked for.

`merino-edge --help` prints this table and imports no verb, which keeps it instant. A test compares each summary here
with the first line of the verb's docstring.

Help is plain text. In rich's markup a bracketed part of a text, such as `[default: 5]`, is a tag and disappears.
"""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from typing import Annotated, Any, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup
from typer.main import get_command

from merino_edge.cli import outputs
from merino_edge.errors import InputError, Interrupted

MAX_HELP_COLUMNS = 120
DEBUG_HELP = "Show the traceback behind a refusal."
MAY_BE_EMPTY = {"--prompt", "--system"}  # every other option needs a value that is not empty
TEXTS = {*MAY_BE_EMPTY, "--stop", "--regex"}  # their values may look like an option


class Verb(NamedTuple):
    panel: str  # heading in `merino-edge --help`
    function: str  # "MODULE:FUNCTION" in merino_edge.cli, or "MODULE:GROUP"
    summary: str


DESIGN, TRAIN, SHIP, RUN, LOOK = "Design", "Train", "Ship", "Run", "Look"
VERBS = {
    "profile": Verb(DESIGN, "profile:profile", "Measure a latency table on this device."),
    "estimate": Verb(DESIGN, "estimate:estimate", "Estimate a latency table for a board that is not at hand."),
    "search": Verb(DESIGN, "search:search", "Find the architecture with the highest score within budgets."),
    "pareto": Verb(DESIGN, "pareto:pareto", "Find the exact trade-off between the score and one cost."),
    "verify": Verb(DESIGN, "verify:verify", "Check a search result by its certificate, without the solver."),
    "study": Verb(DESIGN, "study:study", "Train many small models and test how well scores rank them."),
    "tokenize": Verb(TRAIN, "tokenize:tokenize", "Tokenize a corpus once, for many training runs."),
    "train": Verb(TRAIN, "train:train", "Train a model on text or conversations."),
    "distill": Verb(TRAIN, "distill:group", "Let a teacher generate a corpus or store its logits."),
    "evaluate": Verb(TRAIN, "evaluate:evaluate", "Measure zero-shot accuracy or perplexity."),
    "import": Verb(SHIP, "import_:import_model", "Import a Hugging Face or GGUF model as a checkpoint."),
    "export": Verb(SHIP, "export:export", "Export a checkpoint to ONNX and compare it with PyTorch."),
    "export-hf": Verb(SHIP, "export_hf:export_hf", "Export a checkpoint as a Hugging Face folder."),
    "build": Verb(SHIP, "build:build", "Build the engines of a bundle, or tune its CPU threads."),
    "targets": Verb(SHIP, "targets:targets", "List the boards and runtimes that export can target."),
    "run": Verb(RUN, "run:run", "Make a model ready and chat with it."),
    "generate": Verb(RUN, "generate:generate", "Generate text, or chat in the terminal."),
    "serve": Verb(RUN, "serve:serve", "Serve a bundle over HTTP with OpenAI's API."),
    "bench": Verb(RUN, "bench:bench", "Measure the speed and memory of a bundle."),
    "show": Verb(LOOK, "show:show", "Show what an artefact holds, or compare two latency tables."),
    "doctor": Verb(LOOK, "doctor:doctor", "Describe this machine and what each verb still needs."),
    "demo": Verb(LOOK, "demo:demo", "Run every step on this machine, from profile to generate."),
}
RENAMED = {"write": "distill generate", "teach": "distill logits"}


class ClosedPipe(Exception):
    """The reader of standard output went away. typer would end with exit code 1 at a BrokenPipeError."""

    @classmethod
    @contextmanager
    def told(cls) -> Iterator[None]:
        try:
            yield
        except BrokenPipeError:
            raise cls from None


def _debug_option() -> Any:
    """The option as click has it. typer makes it, since the class of options differs between its versions."""
    app = typer.Typer(add_completion=False)

    @app.command()
    def command(debug: Annotated[bool, typer.Option("--debug", help=DEBUG_HELP)] = False) -> None: ...

    return get_command(app).params[0]


class VerbCommand(TyperCommand):
    """A verb: its options under the headings that `rich_help_panel` names, `--debug`, and typed ends."""

    def __init__(self, name: str | None, **attributes: Any) -> None:
        super().__init__(name, **attributes)
        self.params.append(_debug_option())

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """As in click. Raises InputError at an empty word: a path would take it for this folder."""
        words = args[: args.index("--")] if "--" in args else args
        for before, word in zip(["", *words], words, strict=False):
            assigned = re.fullmatch(r"(--[a-z][a-z-]*)=", word) if before not in TEXTS else None
            option = assigned[1] if assigned else before
            if (word == "" or assigned) and option not in MAY_BE_EMPTY:
                what = option if option.startswith("-") else "an argument"
                raise InputError(f"{what} is empty", f"give a value; see: {ctx.command_path} --help")
        try:
            return super().parse_args(ctx, args)
        except Exception as error:  # click's parser does not say of which verb
            if getattr(error, "ctx", ctx) is None:
                error.ctx = ctx  # type: ignore[attr-defined]
            raise

    def invoke(self, ctx: Any) -> Any:
        """Run the verb. Raises Interrupted at Ctrl-C, where typer alone would end without a message."""
        debug = ctx.params.pop("debug") or ctx.find_root().params.get("debug")
        verb = ctx.command_path.partition(" ")[2]
        from merino_edge.cli import choices, expected_kinds  # not for --help

        try:
            choices.spell(verb, ctx.params)
            expected_kinds.check(verb, ctx.params)
            with outputs.of_verb():
                return super().invoke(ctx)
        except KeyboardInterrupt:
            raise Interrupted("interrupted") from None
        except (typer.Exit, BrokenPipeError):
            raise
        except Exception:
            if debug:
                traceback.print_exc()
            raise

    def format_options(self, ctx: Any, formatter: Any) -> None:
        panels: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if (record := parameter.get_help_record(ctx)) is not None:
                default = "Arguments" if parameter.param_type_name == "argument" else "Options"
                panels.setdefault(getattr(parameter, "rich_help_panel", None) or default, []).append(record)
        for title, records in panels.items():
            with formatter.section(title):
                formatter.write_dl(records)


class LazyVerbs(Mapping[str, Any]):
    """The commands of the program by name. Reading one imports its module."""

    def __getitem__(self, name: str) -> Any:
        module, _, attribute = VERBS[name].function.partition(":")
        verb = getattr(import_module(f"merino_edge.cli.{module}"), attribute)
        return get_command(verb if isinstance(verb, typer.Typer) else _app_of(name, verb))

    def __iter__(self) -> Iterator[str]:
        return iter(VERBS)

    def __len__(self) -> int:
        return len(VERBS)


class HelpfulGroup(TyperGroup):
    """A group that prints its help where no command is given, and knows what old verbs are called now."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """As in click. Raises InputError where a verb's old name is used."""
        if cmd_name in RENAMED and not ctx.resilient_parsing:  # completion parses resiliently
            words = cmd_name if ctx.parent is None else f"{ctx.info_name} {cmd_name}"
            raise InputError(f"the verb {words} has a new name", f"run: merino-edge {RENAMED[cmd_name]}")
        return super().get_command(ctx, cmd_name)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        if not args and not ctx.resilient_parsing:
            typer.echo(ctx.get_help(), err=True)
            raise typer.Exit(2)
        return super().parse_args(ctx, args)


class VerbGroup(HelpfulGroup):
    """The program's group of verbs: loads them lazily and lists them by panel."""

    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = LazyVerbs()  # type: ignore[assignment]  # nothing is added to it

    def make_context(self, *arguments: Any, **options: Any) -> Any:
        if not sys.stdout.isatty() and "COLUMNS" not in os.environ:  # a pipe has no width, which click takes for 80
            options.setdefault("terminal_width", MAX_HELP_COLUMNS - 2)
        with ClosedPipe.told():  # --help and --version print here
            return super().make_context(*arguments, **options)

    def invoke(self, ctx: Any) -> Any:
        with ClosedPipe.told():
            return super().invoke(ctx)

    def format_commands(self, ctx: Any, formatter: Any) -> None:
        width = max(map(len, VERBS))
        for panel in dict.fromkeys(verb.panel for verb in VERBS.values()):
            with formatter.section(panel):
                rows = [(name.ljust(width), verb.summary) for name, verb in VERBS.items() if verb.panel == panel]
                formatter.write_dl(rows)


def add_verb(app: typer.Typer, name: str, verb: Callable[..., None]) -> None:
    summary = VERBS[name].summary if name in VERBS else None  # where PYTHONOPTIMIZE takes the docstrings
    app.command(name, cls=VerbCommand, help=verb.__doc__ or summary)(verb)


def _app_of(name: str, verb: Callable[..., None]) -> typer.Typer:
    app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
    add_verb(app, name, verb)
    return app
