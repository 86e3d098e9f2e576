"""The options that `generate`, `serve` and `bench` share, and how these verbs open a bundle."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle
    from merino_edge.runtime.engine import Engine
    from merino_edge.runtime.speculative.drafter import Proposer
    from merino_edge.tokenizer import Tokenizer

LAMB = Path("lamb")  # merino_edge.bundle.find
BundleOrLamb = Annotated[
    Path, typer.Argument(metavar="BUNDLE", help="Bundle folder, or lamb: the small model in this package.")
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
Threads = Annotated[int | None, typer.Option(help="CPU threads. [default: as tuned by build, else all cores]")]
Cpu = Annotated[bool, typer.Option("--cpu", help="Run on the CPU, even if the bundle has a TensorRT engine.")]


def open_bundle(
    path: Path, threads: int | None, cpu: bool, cuda_graphs: bool = True
) -> tuple[Engine, Tokenizer, Bundle]:
    """See merino_edge.runtime.open_bundle.open_engine. Where every engine was built on another board, under another release
    or power mode, the last is named on stderr before it is opened; so is a graph for TensorRT that is not compiled yet.
    """
    from merino_edge.runtime.open_bundle import open_engine

    return open_engine(
        path, threads, cpu=cpu, cuda_graphs=cuda_graphs, on_bundle=lambda loaded: None if cpu else _tell(loaded)
    )


def open_proposer(
    lookup: bool, draft: Path | None, engine: Engine, beside: Bundle, threads: int | None, cpu: bool
) -> Proposer | None:
    """What `--lookup` or `--draft` ask for, for an engine that is open. Raises InputError, and as `open_engine`."""
    from merino_edge.errors import InputError, UnsupportedError

    if draft is None:
        from merino_edge.runtime.speculative.prompt_lookup import PromptLookup

        return PromptLookup() if lookup else None
    if lookup:
        raise InputError("--lookup and --draft both guess", "give one")
    if engine.max_rows == 1:
        raise UnsupportedError(
            f"the engine of {beside.path} gives the logits of one position, so it cannot check guesses",
            "leave --draft out, or run a bundle for ONNX Runtime with --cpu",
        )
    from merino_edge.runtime.speculative.draft_model import DraftModel

    return DraftModel.open(draft, beside, threads, cpu=cpu)


def _tell(loaded: Bundle) -> None:
    from merino_edge.cli.console import stderr

    again = f"merino-edge build {loaded.path}"
    note = ""
    if loaded.engines:
        from merino_edge.jetson.device.card import device_card
        from merino_edge.jetson.doctor.checks import check_engine

        here = device_card()
        found = [check_engine(entry.get("machine", {}), here) for entry in loaded.engines]
        note = f"warning: {found[-1][0]['found']}; build it again: {again}" if all(found) else ""
    elif loaded.target != "onnxruntime":
        note = f"no engine in {loaded.path} yet: running on the CPU; on the board: {again}"
    if note:
        stderr().print(note, highlight=False, soft_wrap=True, markup=False)
