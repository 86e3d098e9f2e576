"""The options that `generate`, `serve` and `bench` share, and how these verbs open a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle
    from merino_edge.runtime.engine import Engine, SequenceGroup
    from merino_edge.runtime.speculative.drafter import Proposer
    from merino_edge.tokenizer import Tokenizer

LAMB = Path("lamb")  # merino_edge.bundle.find
BundleOrLamb = Annotated[
    Path,
    typer.Argument(
        metavar="MODEL",
        help="Bundle folder, or what `run` takes; lamb is the small model in this package.",
    ),
]
LookupFlag = Annotated[
    bool,
    typer.Option(
        "--lookup",
        "--prompt-lookup",
        help="Speculative decoding by prompt lookup: draft tokens come from the text so far, where that is faster.",
    ),
]
DraftPath = Annotated[
    Path | None,
    typer.Option(
        "--draft",
        "--draft-model",
        metavar="BUNDLE",
        help="Speculative decoding by a draft model: bundle of a smaller model with the same tokenizer, "
        "used where that is faster.",
    ),
]
ControlTokens = Annotated[
    bool,
    typer.Option(
        "--control-tokens",
        help="Special tokens that a message spells out, such as <|im_end|>, count as such. Else they are text.",
    ),
]
TemplateOptions = Annotated[
    str | None,
    typer.Option(
        "--chat-template-kwargs",
        metavar="JSON",
        help="Options of the model's chat template, such as '{\"enable_thinking\": false}'.",
    ),
]
Threads = Annotated[int | None, typer.Option(help="CPU threads. [default: as tuned by build, else all cores]")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Run on the CPU, even if the bundle has a TensorRT engine.")]


def open_bundle(
    path: Path, threads: int | None, *, cpu: bool, cuda_graphs: bool = True
) -> tuple[Engine, Tokenizer, Bundle]:
    """Open a model, made ready first where it is no bundle (merino_edge.cli.prepared_model).

    Other arguments and errors are those of merino_edge.runtime.open_bundle.open_engine. Prints a warning on stderr if
    every engine was built for another board, release or power mode. Prints a note if a bundle for TensorRT has no
    engine yet.
    """
    from merino_edge.cli.prepared_model import bundle_of
    from merino_edge.runtime.open_bundle import open_engine

    return open_engine(
        bundle_of(path),
        threads,
        cpu=cpu,
        cuda_graphs=cuda_graphs,
        on_bundle=lambda bundle: None if cpu else _print_note(bundle),
    )


def open_sequences(
    path: Path, count: int | None, threads: int | None, *, cpu: bool
) -> tuple[SequenceGroup, Tokenizer, Bundle]:
    """Like `open_bundle`, but for several sequences (merino_edge.runtime.open_bundle.open_sequences)."""
    from merino_edge.cli.prepared_model import bundle_of
    from merino_edge.runtime import open_bundle

    return open_bundle.open_sequences(
        bundle_of(path),
        count,
        threads,
        cpu=cpu,
        on_bundle=lambda bundle: None if cpu else _print_note(bundle),
    )


def template_options(text: str | None) -> dict[str, Any]:
    """What `--chat-template-kwargs` says. Raises InputError."""
    if text is None:
        return {}
    from merino_edge.template_options import parse

    return parse(text, "--chat-template-kwargs")


def open_proposer(
    engine: Engine, bundle: Bundle, *, lookup: bool, draft: Path | None, threads: int | None, cpu: bool
) -> Proposer | None:
    """The proposer of draft tokens that `--lookup` or `--draft` asks for, or None, for the open engine of `bundle`.

    Raises InputError where both are given, UnsupportedError where the engine cannot verify draft tokens, and what
    `open_bundle` raises for the bundle of the draft model.
    """
    from merino_edge.errors import InputError, UnsupportedError

    if draft is None:
        from merino_edge.runtime.speculative.prompt_lookup import PromptLookup

        return PromptLookup() if lookup else None
    if lookup:
        raise InputError("--lookup and --draft both propose draft tokens", "give one")
    if engine.max_rows == 1:
        raise UnsupportedError(
            f"the engine of {bundle.path} gives the logits of one position, so it cannot verify draft tokens",
            "export it again, or leave --draft out",
        )
    from merino_edge.runtime.speculative.draft_model import DraftModel

    return DraftModel.open(draft, bundle, threads, cpu=cpu)


def _print_note(bundle: Bundle) -> None:
    from merino_edge.cli.console import stderr
    from merino_edge.engine_store import engines_of

    build_command, engines = f"merino-edge build {bundle.path}", engines_of(bundle)
    note = ""
    if engines:
        from merino_edge.jetson.device.card import device_card
        from merino_edge.jetson.doctor.checks import check_engine

        device = device_card()
        findings = [check_engine(engine.entry.get("machine"), device) for engine in engines]
        note = f"warning: {findings[-1][0]['found']}; build it again: {build_command}" if all(findings) else ""
    elif not bundle.target.startswith("onnxruntime"):
        note = f"no engine of {bundle.path} yet: running on the CPU; on the board: {build_command}"
    if note:
        stderr().print(note, highlight=False, soft_wrap=True, markup=False)
