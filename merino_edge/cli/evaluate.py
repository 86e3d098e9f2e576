"""`merino-edge evaluate CKPT|BUNDLE`: measures zero-shot accuracy and perplexity, through lm-evaluation-harness.

It prints a line as each task is done. `--out` keeps the report (merino_edge.runtime.evaluation.harness). `--against`
compares a later run with it. `--json` prints the report, with `comparison`, as one object. `--perplexity` scores a
whole text (merino_edge.runtime.evaluation.perplexity), alone or after the tasks. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merino_edge.cli import outputs
from merino_edge.cli.bundle_options import Cpu

if TYPE_CHECKING:
    from rich.status import Status

    from merino_edge.runtime.engine import Engine
    from merino_edge.tokenizer import Tokenizer


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="CKPT|BUNDLE", help="Checkpoint or bundle folder.")],
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,NAME,...",
            help="Zero-shot tasks: merino14 (the paper's fourteen), or names joined by commas. "
            "[default: merino14, none with --perplexity]",
        ),
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Use only the first N items of each task. [default: all]")] = None,
    data: Annotated[
        Path | None,
        typer.Option(
            metavar="FOLDER",
            help="Folder of the evaluation sets, with lm/ and eval/.",
            envvar="MERINO_DATA",
            show_envvar=True,
        ),
    ] = None,
    perplexity: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE", help="Also score this text (plain or .xz): perplexity per token and word, bits per byte."
        ),
    ] = None,
    window: Annotated[
        int | None, typer.Option(help="Window length in tokens, with --perplexity. [default: the model's context]")
    ] = None,
    stride: Annotated[
        int | None, typer.Option(help="Tokens from one window to the next. [default: half a window]")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Report to write (JSON).")] = None,
    against: Annotated[
        Path | None,
        typer.Option(metavar="REPORT", help="Earlier report: print the differences with 95 % confidence intervals."),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--continue", "--resume", help="Keep the tasks that the report at --out has of the same items."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace the report at --out.")] = False,
    threads: Annotated[
        int | None, typer.Option(help="CPU threads. [default: all cores, or as a bundle was tuned by build]")
    ] = None,
    cpu: Cpu = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Measure zero-shot accuracy or perplexity.

    It evaluates a checkpoint or a bundle on the paper's tasks, through lm-evaluation-harness, or on a text.
    """
    from merino_edge import artefact, limits
    from merino_edge.cli.console import print_json, print_line, stderr
    from merino_edge.errors import InputError, require_all

    of_checkpoint = {"train": ["torch", "safetensors"]} if (model / "training.json").is_file() else {}
    require_all({"evaluate": ["lm_eval"], **of_checkpoint})
    os.environ["TQDM_DISABLE"] = "1"  # no progress bars of the harness itself; read when tqdm is imported
    from merino_edge.runtime.evaluation import harness
    from merino_edge.runtime.evaluation import perplexity as of_text
    from merino_edge.runtime.evaluation.forms import Report
    from merino_edge.runtime.evaluation.tasks import parse_task_names

    names = [] if perplexity is not None and tasks is None else parse_task_names("merino14" if tasks is None else tasks)
    if perplexity is None and (window, stride) != (None, None):
        raise InputError("--window and --stride need a text", "add: --perplexity FILE")
    if limit is not None:
        limits.check_range("limit", limit, 1, limits.MAX_ITEMS)
    if names and data is None:
        raise InputError("the folder of the evaluation sets is unknown", "set MERINO_DATA, or give --data FOLDER")
    kind, newest = harness.KIND, harness.SCHEMA_VERSION
    if resume and out is None:
        raise InputError("--continue needs the report of the interrupted run", "add: --out REPORT.json")
    if out is not None:
        outputs.claim(out, kind, force=force, resumes=resume)
    other = None if against is None else artefact.read_json(against, kind, newest, form=Report)
    engine, tokenizer, card = open_model(model, threads, cpu=cpu)
    report: dict[str, Any] = {"model": card, "engine": type(engine).__name__, "limit": limit, "tasks": {}}
    report["mean_accuracy"] = None
    begun = _begun(out, report) if resume and out is not None and out.exists() else {"tasks": {}}
    done = {name: begun["tasks"][name] for name in names if name in begun["tasks"]}

    def save() -> None:
        """After each task, so that an interruption loses only the next one. What is done already stays too."""
        if out is not None:
            tasks = {name: entry for name in names if (entry := report["tasks"].get(name) or done.get(name))}
            mean = harness.mean_accuracy(tasks)
            artefact.write_json(out, kind, {**report, "tasks": tasks, "mean_accuracy": mean}, newest)

    with contextlib.closing(engine), stderr().status("opening") as status:
        if perplexity is not None:
            on_step = functools.partial(_show_progress, status, perplexity.name)
            entry = of_text.perplexity(
                perplexity,
                engine,
                tokenizer,
                window=window,
                stride=stride,
                on_step=on_step,
                before=begun.get(of_text.KEY),
            )
            report[of_text.KEY] = entry
            save()
            if not as_json:
                print_line(_text_line(entry))
        for name in names:
            status.update(name)
            on_step = functools.partial(_show_progress, status, name)
            entry = harness.evaluate_task(
                name, engine, tokenizer, data or Path(), limit=limit, on_step=on_step, before=done.get(name)
            )
            report["tasks"][name] = entry
            report["mean_accuracy"] = harness.mean_accuracy(report["tasks"])
            save()
            if not as_json:
                print_line(_line(name, entry))
    comparison = []
    if other is not None:
        comparison = [*harness.differences(report, other), *of_text.differences(report, other)]
    if as_json:
        print_json({**report, "comparison": comparison})
        return
    if report["mean_accuracy"] is not None:
        count = sum("acc" in entry["metrics"] for entry in report["tasks"].values())
        print_line(f"{'mean accuracy':<14} {100 * report['mean_accuracy']:6.2f} %   over {count} tasks")
    for row in comparison:
        print_line(_comparison_line(row))
    if other is not None and not comparison:
        stderr().print(f"note: {against} has none of these items", highlight=False, markup=False)


def _begun(out: Path, report: dict[str, Any]) -> dict[str, Any]:
    """The report that an interrupted run left at `out`. Raises InputError where it is of another model or limit."""
    from merino_edge import artefact
    from merino_edge.errors import InputError
    from merino_edge.runtime.evaluation import harness
    from merino_edge.runtime.evaluation.forms import Report

    begun = artefact.read_json(out, harness.KIND, harness.SCHEMA_VERSION, form=Report)
    for name in ("model", "engine", "limit"):
        if begun.get(name) != report[name]:
            raise InputError(f"{out} began with another {name}", "give what it began with, or choose another --out")
    return begun


def open_model(path: Path, threads: int | None, *, cpu: bool) -> tuple[Engine, Tokenizer, dict[str, Any]]:
    """Open a checkpoint with PyTorch, or a bundle with its engine: the engine, the tokenizer and the model's card.

    Raises what merino_edge.runtime.open_bundle.open_engine and merino_edge.checkpoint.load raise.
    """
    from merino_edge import limits

    if not (path / "training.json").is_file():
        from merino_edge.cli.bundle_options import open_bundle

        engine, tokenizer, opened = open_bundle(path, threads, cpu=cpu)
        return engine, tokenizer, opened.card()
    from merino_edge import checkpoint
    from merino_edge.errors import require
    from merino_edge.tokenizer import Tokenizer

    require("torch", "train")
    from merino_edge.pytorch.engine import TorchEngine
    from merino_edge.pytorch.model import Model

    if threads is not None:
        limits.check_range("threads", threads, 1, limits.MAX_THREADS)
    source = checkpoint.load(path)
    model = Model.from_weights(source.architecture, source.weights, copy=False)
    card = {"checkpoint_sha256": source.training["sha256"], "architecture": source.architecture.id, "precision": "fp32"}
    return TorchEngine(model, threads=threads), Tokenizer.load(path), card


def _show_progress(status: Status, name: str, done: int, of: int) -> None:
    status.update(f"{name}: {done} of {of}")


def _line(name: str, entry: dict[str, Any]) -> str:
    figures = (_figure(metric, measured["value"], measured["stderr"]) for metric, measured in entry["metrics"].items())
    return f"{name:<14} {'   '.join(figures)}   ({entry['items']} items, {entry['seconds']:.0f} s)"


def _text_line(entry: dict[str, Any]) -> str:
    figures = (_figure(metric, measured["value"], measured["stderr"]) for metric, measured in entry["metrics"].items())
    how = f"{entry['file']}: {entry['tokens']} tokens, windows of {entry['window']}, stride {entry['stride']}"
    return f"{'perplexity':<14} {'   '.join(figures)}   ({how}, {entry['seconds']:.0f} s)"


def _figure(metric: str, value: float, stderr: float | None) -> str:
    (scale, unit), digits = _scale(metric), _digits(metric)
    spread = "" if stderr is None else f" ± {scale * stderr:.{digits}f}"
    return f"{metric} {scale * value:.{digits}f}{spread}{unit}"


def _digits(metric: str) -> int:
    return 4 if metric == "bits_per_byte" else 2


def _scale(metric: str) -> tuple[float, str]:
    from merino_edge.runtime.evaluation.harness import PERPLEXITIES

    return (1, "") if metric in PERPLEXITIES else (100, " %")


def _comparison_line(row: dict[str, Any]) -> str:
    scale, unit = _scale(row["metric"])
    digits = _digits(row["metric"])
    value, other, difference = (scale * row[key] for key in ("value", "other", "difference"))
    line = f"{row['task']:<14} {row['metric']:<16} {value:.{digits}f} against {other:.{digits}f}{unit}: "
    line += f"{difference:+.{digits}f}"
    if row["low"] is None:
        return f"{line} (no interval: other windows)"
    low, high = scale * row["low"], scale * row["high"]
    return f"{line} ({low:+.{digits}f} to {high:+.{digits}f}){'' if low <= 0 <= high else '  *'}"
