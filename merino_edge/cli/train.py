"""`merino-edge train`: trains an architecture from scratch, or fine-tunes a checkpoint, on text."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from merino_edge.architecture import Architecture
    from merino_edge.checkpoint import Checkpoint
    from merino_edge.training.config import TrainingConfig

TEACHER, OPTIMIZER, MACHINE = "Distillation", "Optimizer", "Machine"  # panels of the help


def train(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="A.json|CKPT",
            help="Architecture or search result to train from scratch, or checkpoint to fine-tune.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="Checkpoint folder to write.")],
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE",
            help="Text or .jsonl file, .xz of one, folder of them, corpus from tokenize, or hf:NAME of a data set. "
            "Repeatable.",
        ),
    ] = None,
    recipe: Annotated[
        str | None,
        typer.Option(
            metavar="NAME|FILE", help="Take corpus and options from a recipe: pile (the paper's), or a recipe file."
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Optimizer steps. [default: 600000]")] = None,
    resume: Annotated[
        bool, typer.Option("--continue", "--resume", help="Continue the unfinished training in --out.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Replace the checkpoint at --out, once the new one is saved.")
    ] = False,
    batch: Annotated[
        int | None, typer.Option("--batch", "--batch-size", help="Sequences per step. [default: 1024]")
    ] = None,
    sequence: Annotated[
        int | None,
        typer.Option(
            "--sequence", "--sequence-length", help="Tokens per sequence. [default: 1024, at most all positions]"
        ),
    ] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Peak learning rate. [default: 6e-4]")] = None,
    warmup: Annotated[
        int | None, typer.Option(help="Warm-up steps. [default: 1000, at most a tenth of --steps]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed of weights and batches. [default: 0]")] = None,
    save_every: Annotated[
        int | None, typer.Option(help="Steps between saves. [default: 1000, at most a tenth of --steps]")
    ] = None,
    teacher: Annotated[
        Path | None,
        typer.Option(
            metavar="CKPT|LOGITS",
            help="Distill from this teacher: a checkpoint with the same tokenizer, or logits from distill logits.",
            rich_help_panel=TEACHER,
        ),
    ] = None,
    teacher_weight: Annotated[
        float | None,
        typer.Option(
            "--teacher-weight",
            "--alpha",
            help="Weight of the distillation loss, 0 to 1. The loss on the text has the rest. [default: 0.5]",
            rich_help_panel=TEACHER,
        ),
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(
            help="Softmax temperature of teacher and student. Stored logits need 1. [default: 1]",
            rich_help_panel=TEACHER,
        ),
    ] = None,
    direction: Annotated[
        str | None,
        typer.Option(help="KL direction: forward or reverse. [default: forward]", rich_help_panel=TEACHER),
    ] = None,
    optimizer: Annotated[
        str | None, typer.Option(help="adamw or muon. [default: adamw]", rich_help_panel=OPTIMIZER)
    ] = None,
    weight_decay: Annotated[
        float | None, typer.Option(help="Weight decay of matrices. [default: 0.1]", rich_help_panel=OPTIMIZER)
    ] = None,
    clip: Annotated[
        float | None,
        typer.Option(
            "--clip",
            "--max-grad-norm",
            help="Gradient clipping: largest gradient norm. [default: 1.0]",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None,
    z_loss: Annotated[
        float | None,
        typer.Option(
            help="z-loss coefficient (penalty on the softmax's normaliser). [default: 0]", rich_help_panel=OPTIMIZER
        ),
    ] = None,
    ema: Annotated[
        float | None,
        typer.Option(
            help="Decay of an exponential moving average of the weights, for example 0.999. [default: off]",
            rich_help_panel=OPTIMIZER,
        ),
    ] = None,
    micro_batch: Annotated[
        int | None,
        typer.Option(
            help="Sequences computed at a time (gradient accumulation), to save memory. [default: 16]",
            rich_help_panel=MACHINE,
        ),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Precision of the computation: auto, fp32 or bf16. [default: auto]", rich_help_panel=MACHINE),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. [default: all cores]", rich_help_panel=MACHINE)
    ] = None,
    compiled: Annotated[
        bool, typer.Option("--compile", help="Compile the model with torch.compile.", rich_help_panel=MACHINE)
    ] = False,
    parallel: Annotated[
        str, typer.Option(help="Parallelism under torchrun: ddp or fsdp.", rich_help_panel=MACHINE)
    ] = "ddp",
    tensorboard: Annotated[
        Path | None, typer.Option(help="Also log to this TensorBoard folder.", rich_help_panel=MACHINE)
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print the result as one JSON object.")] = False,
) -> None:
    """Train a model on text or conversations.

    The defaults are the paper's recipe: 600,000 steps of 1024 x 1024 tokens. The model is saved and logged (log.jsonl)
    regularly. Ctrl-C finishes the step and saves, and so do SIGTERM and SIGHUP. The same command with --continue then
    goes on from that step.
    """
    from merino_edge import checkpoint
    from merino_edge.cli import console, outputs
    from merino_edge.cli.stop_on_signal import StopOnSignal
    from merino_edge.errors import InputError, OutputError, require_all

    require_all({"train": ["torch", "safetensors"], **({"tensorboard": ["tensorboard"]} if tensorboard else {})})
    is_main = os.environ.get("RANK", "0") == "0"  # of torchrun's workers
    for path, role in ((model, "the checkpoint that the training begins with"), (teacher, "the teacher")):
        if path is not None and path.resolve() == out.resolve() and not resume:
            raise OutputError(f"{out} is {role}", "choose another --out")
    if is_main:
        outputs.claim(out, checkpoint.KIND, force=force, resumes=resume)
    a, start = _open_model(model)
    from merino_edge.training import device, throughput
    from merino_edge.training import teacher as teachers
    from merino_edge.training import train as training
    from merino_edge.training.distributed import Workers
    from merino_edge.training.log import TrainingLog

    device.set_threads(threads)
    every_option = {
        "steps": steps,
        "batch": batch,
        "sequence": sequence,
        "micro_batch": micro_batch,
        "warmup": warmup,
        "learning_rate": learning_rate,
        "seed": seed,
        "precision": precision,
        "optimizer": optimizer,
        "weight_decay": weight_decay,
        "clip": clip,
        "z_loss": z_loss,
        "ema": ema,
        "teacher_weight": teacher_weight,
        "temperature": temperature,
        "direction": direction,
    }
    options = {name: value for name, value in every_option.items() if value is not None}
    sources = list(corpus or [])
    if recipe is not None:
        from merino_edge.training import recipe as recipes

        loaded = recipes.load(recipe)
        if loaded.vocab_size not in (None, a.vocab_size):
            message = f"recipe {recipe} is for a vocabulary of {loaded.vocab_size:,}, the model's is {a.vocab_size:,}"
            raise InputError(message, "give another model, or the recipe's options by hand")
        sources, options = sources or list(loaded.corpus), {**loaded.config, **options}
    if resume and (done := _already_finished(a, out, options)) is not None:
        if is_main:
            console.stderr().print(f"{out} is finished already, with all {done['step']:,} steps", soft_wrap=True)
            _print_result(out, a, done, as_json=json)
        return
    if not sources:
        raise InputError("no corpus was named", "add: --corpus FILE, or --recipe NAME")
    if teacher is not None and not resume:
        options.setdefault("teacher_weight", 0.5)
    config = _config(a, out, options, resume=resume)
    if save_every is None:
        save_every = max(1, min(1000, config.steps // 10))
    workers, stop = Workers(parallel), StopOnSignal()
    err = console.stderr()
    err.quiet = not workers.is_main
    peak = throughput.matmul_flops_per_second(workers.device, bf16=device.uses_bf16(config.precision, workers.device))
    flops = throughput.training_flops_per_token(a, config.sequence)
    shape = f"{config.steps:,} steps of {config.batch} x {config.sequence} tokens"
    err.print(
        f"{a.parameters:,} parameters, {shape}" + (f", {workers.world_size} workers" if workers.is_distributed else "")
    )

    with stop, console.progress(err) as bar, contextlib.ExitStack() as files:
        task = bar.add_task("train", total=config.steps, note="reading the corpus")
        log: TrainingLog | None = None

        def on_step(p: training.Progress) -> None:
            nonlocal log
            stop.arm()
            if workers.is_main and log is None:
                log = files.enter_context(TrainingLog(p.folder, config.steps, p.step - 1, tensorboard))
            mfu = p.tokens_per_second * flops / (peak * workers.world_size)
            if log is not None:
                log.record(p, p.step * config.tokens_per_step, mfu)
            note = f"loss {p.loss:.3f}, held out {p.validation_loss:.3f}, lr {p.learning_rate:.1e}"
            bar.update(task, completed=p.step, note=f"{note}, {p.tokens_per_second:,.0f} tokens/s, MFU {mfu:.0%}")

        outcome = training.train(
            a,
            sources,
            out,
            config,
            start=start,
            teacher=None if teacher is None else teachers.load(teacher),
            workers=workers,
            compiled=compiled,
            resume=resume,
            save_every=save_every,
            on_step=on_step,
            should_stop=stop,
        )
    workers.close()
    result = outcome.training
    loss = f"{result['validation_loss_before']:.3f} -> {result['validation_loss']:.3f} nats per token"
    speed = f"{result['tokens']:,} tokens at {result['tokens_per_second']:,.0f} tokens/s"
    err.print(f"loss on held-out text {loss}, {speed}", soft_wrap=True)
    if not outcome.finished:
        corpora = [f"--corpus={source}" for source in sources]
        words = ["merino-edge", "train", str(model), *corpora, "--out", str(out)]
        words += [] if teacher is None else ["--teacher", str(teacher)]
        words += ["--continue"] if threads is None else ["--threads", str(threads), "--continue"]
        stopped = f"stopped after step {result['step']:,} of {config.steps:,}"
        err.print(f"{stopped}; go on with: {shlex.join(words)}", soft_wrap=True, markup=False)
        raise typer.Exit(130)
    if not workers.is_main:
        return
    _print_result(out, a, result, as_json=json)


def _print_result(out: Path, a: Architecture, result: dict[str, Any], *, as_json: bool) -> None:
    from merino_edge.cli import console

    if as_json:
        console.print_json({"checkpoint": str(out), "parameters": a.parameters, **result})
    else:
        console.print_line(f"{out}: next, merino-edge export {out} --out BUNDLE")


def _already_finished(a: Architecture, out: Path, options: dict[str, Any]) -> dict[str, Any] | None:
    """The content of training.json, where `out` holds this training with its last step. Raises InputError for another.

    Scripts that give the same command again and again end here.
    """
    from merino_edge import artefact
    from merino_edge.errors import InputError
    from merino_edge.training import place, state

    if (done := place.finished(out)) is None:
        return None
    differing = {name: value for name, value in options.items() if done["config"].get(name) != value}
    differing.pop("micro_batch", None)
    if differing or done["architecture_id"] != a.id:
        name, value = next(iter(differing.items()), ("the architecture", a.id))
        then = done["config"].get(name, done["architecture_id"])
        raise InputError(f"{out} is finished, and {name} was {then}, not {value}", "choose another --out")
    state.end(out)  # what a kill after the last step left
    return {key: value for key, value in artefact.remove_envelope(done).items() if key not in ("id", "files")}


def _open_model(model: Path) -> tuple[Architecture, Checkpoint | None]:
    """The architecture at `model`, and the checkpoint if it is one. Raises ArtefactError."""
    from merino_edge import architecture, checkpoint

    if (model / "training.json").is_file():
        start = checkpoint.load(model)
        return start.architecture, start
    return architecture.load(model)[0], None


def _config(a: Architecture, out: Path, options: dict[str, Any], *, resume: bool) -> TrainingConfig:
    """The options, completed from the training that is resumed, else from the paper's recipe."""
    from merino_edge.cli.console import stderr
    from merino_edge.training import state
    from merino_edge.training.config import TrainingConfig

    if resume:
        saved = state.load(out)
        if saved["damaged"]:
            what = f"note: {saved['damaged']}; the state before it, of step {saved['step']:,}, goes on"
            stderr().print(what, soft_wrap=True, markup=False)
        return dataclasses.replace(TrainingConfig.of(saved["config"], str(out)), **options)
    paper = TrainingConfig()
    warmup = min(paper.warmup, options.get("steps", paper.steps) // 10)
    return TrainingConfig(**{"sequence": min(paper.sequence, a.max_positions), "warmup": warmup, **options})
