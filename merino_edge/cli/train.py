"""`merino-edge train`: an architecture and text files to a checkpoint."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from merino_edge.architecture import Architecture
    from merino_edge.training_config import TrainingConfig


def train(
    architecture: Annotated[Path, typer.Argument(metavar="A.json", help="Architecture, or a search result.")],
    corpus: Annotated[list[Path], typer.Option(help="Text file, .xz of one, or folder of them; may be repeated.")],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. [default: 600000]")] = None,
    resume: Annotated[bool, typer.Option("--continue", help="Go on with the unfinished training in --out.")] = False,
    batch: Annotated[int | None, typer.Option(help="Sequences per step. [default: 1024]")] = None,
    sequence: Annotated[int | None, typer.Option(help="Tokens per sequence. [default: 1024, or all positions]")] = None,
    micro_batch: Annotated[int | None, typer.Option(help="Sequences at a time, for memory. [default: 16]")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. [default: 6e-4]")] = None,
    warmup: Annotated[int | None, typer.Option(help="Warm-up steps. [default: 1000, or a tenth of --steps]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of the weights and the batches. [default: 0]")] = None,
    precision: Annotated[str | None, typer.Option(help="auto, fp32 or bf16. [default: auto]")] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads. [default: all cores]")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between saves. [default: 1000, or a tenth of --steps]")
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train an architecture on text files; by default with the paper's recipe (600,000 steps of 1024 x 1024 tokens).

    Saves as it goes. Ctrl-C finishes the step and saves; the same command with --continue goes on exactly there.
    """
    from merino_edge import architecture as architectures
    from merino_edge import limits
    from merino_edge.cli import console
    from merino_edge.errors import require

    require("torch", "train")
    require("safetensors", "train")
    a, _ = architectures.load(architecture)
    import torch

    from merino_edge import training

    if threads is not None:
        torch.set_num_threads(limits.check_range("threads", threads, 1, limits.MAX_THREADS))
    given = {
        "steps": steps,
        "batch": batch,
        "sequence": sequence,
        "micro_batch": micro_batch,
        "warmup": warmup,
        "learning_rate": learning_rate,
        "seed": seed,
        "precision": precision,
    }
    config = _config(a, out, resume, {name: value for name, value in given.items() if value is not None})
    if save_every is None:
        save_every = max(1, min(1000, config.steps // 10))
    stop = _StopOnInterrupt()
    err = console.stderr()
    err.print(f"{a.parameters:,} parameters, {config.steps:,} steps of {config.batch} x {config.sequence} tokens")
    with stop, console.progress(err) as bar:
        task = bar.add_task("train", total=config.steps, note="reading the corpus")

        def on_step(p: training.Progress) -> None:
            note = f"loss {p.loss:.3f}, held out {p.validation_loss:.3f}, lr {p.learning_rate:.1e}"
            bar.update(task, completed=p.step, note=f"{note}, {p.tokens_per_second:,.0f} tokens/s")

        outcome = training.train(
            a, corpus, out, config, resume=resume, save_every=save_every, on_step=on_step, should_stop=stop
        )
    result = outcome.training
    loss = f"{result['validation_loss_before']:.3f} -> {result['validation_loss']:.3f} nats per token"
    speed = f"{result['tokens']:,} tokens at {result['tokens_per_second']:,.0f} tokens/s"
    err.print(f"loss on held-out text {loss}, {speed}", soft_wrap=True)
    if not outcome.finished:
        words = ["merino-edge", "train", str(architecture), *(f"--corpus={path}" for path in corpus), "--out", str(out)]
        words += ["--continue"] if threads is None else ["--threads", str(threads), "--continue"]
        done = f"stopped after step {result['step']:,} of {config.steps:,}"
        err.print(f"{done}; go on with: {shlex.join(words)}", soft_wrap=True, markup=False)
        raise typer.Exit(130)
    if json:
        console.print_json({"checkpoint": str(out), "parameters": a.parameters, **result})
    else:
        console.print_line(f"{out}: next, merino-edge export {out} --out BUNDLE")


def _config(a: Architecture, out: Path, resume: bool, given: dict[str, Any]) -> TrainingConfig:
    """What was given on the command line; the rest from the training to continue, else from the paper."""
    from merino_edge import training_state
    from merino_edge.training_config import TrainingConfig

    if resume:
        return TrainingConfig(**{**training_state.load(out)["config"], **given})
    paper = TrainingConfig()
    warmup = min(paper.warmup, given.get("steps", paper.steps) // 10)
    return TrainingConfig(**{"sequence": min(paper.sequence, a.max_positions), "warmup": warmup, **given})


class _StopOnInterrupt:
    """Turns the first Ctrl-C into a request, which a call reports; the second one interrupts as usual."""

    def __init__(self) -> None:
        self._asked = False

    def __enter__(self) -> None:
        self._previous = signal.signal(signal.SIGINT, self._ask)

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def __call__(self) -> bool:
        return self._asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self._asked = True
        signal.signal(signal.SIGINT, self._previous)
