"""`merino-edge evaluate CKPT|BUNDLE`: zero-shot accuracy and perplexity, through lm-evaluation-harness.

Prints a line as each task is done; `--out` keeps the report (merino_edge.runtime.evaluation), which another run is
compared with by `--against`. `--json` prints the report, with `comparison`, as one object. Nothing is downloaded.
"""

from __future__ import annotations

import contextlib
import functools
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.status import Status

    from merino_edge.runtime.engine import Engine
    from merino_edge.tokenizer import Tokenizer


def evaluate(
    model: Annotated[Path, typer.Argument(metavar="CKPT|BUNDLE", help="Checkpoint or bundle folder.")],
    tasks: Annotated[
        str, typer.Option(help="merino14, the paper's fourteen, or names of them joined by commas.")
    ] = "merino14",
    limit: Annotated[int | None, typer.Option(help="Only the first so many items of each task.")] = None,
    data: Annotated[
        Path | None,
        typer.Option(help="Folder of the sets, with lm/ and eval/.", envvar="MERINO_DATA", show_envvar=True),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="Report to write (JSON).")] = None,
    against: Annotated[
        Path | None, typer.Option(metavar="REPORT", help="An earlier report: differences with their 95 % intervals.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.")] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Run a bundle's graph on the CPU, whatever engines it has.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
) -> None:
    """Evaluate a checkpoint or a bundle on the paper's zero-shot tasks."""
    from merino_edge import artefact, limits
    from merino_edge.cli.console import print_json, print_line, stderr
    from merino_edge.errors import InputError, require

    require("lm_eval", "evaluate")
    os.environ["TQDM_DISABLE"] = "1"  # the harness's own bars; read when tqdm is imported
    from merino_edge.runtime import evaluation
    from merino_edge.runtime.evaluation_tasks import chosen

    names = chosen(tasks)
    if limit is not None:
        limits.check_range("limit", limit, 1, limits.MAX_ITEMS)
    if data is None:
        raise InputError("nothing says where the evaluation sets are", "set MERINO_DATA, or give --data FOLDER")
    kind, newest = evaluation.KIND, evaluation.SCHEMA_VERSION
    other = None if against is None else artefact.read_json(against, kind, newest)
    engine, tokenizer, card = open_model(model, threads, cpu)
    report: dict[str, Any] = {"model": card, "engine": type(engine).__name__, "limit": limit, "tasks": {}}
    with contextlib.closing(engine), stderr().status("opening") as status:
        for name in names:
            status.update(name)
            told = functools.partial(_tell, status, name)
            entry = evaluation.evaluate_task(name, engine, tokenizer, data, limit, told)
            report["tasks"][name] = entry
            report["mean_accuracy"] = evaluation.mean_accuracy(report["tasks"])
            if out is not None:  # what is done by now: whoever interrupts the next task keeps it
                artefact.write_json(out, kind, report, newest)
            if not as_json:
                print_line(_line(name, entry))
    comparison = [] if other is None else evaluation.differences(report, other)
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


def open_model(path: Path, threads: int | None, cpu: bool) -> tuple[Engine, Tokenizer, dict[str, Any]]:
    """A checkpoint by PyTorch or a bundle by its engine, with its tokenizer and what a report calls it."""
    from merino_edge import limits

    if not (path / "training.json").is_file():
        from merino_edge.cli.opening import open_bundle

        engine, tokenizer, opened = open_bundle(path, threads, cpu)
        return engine, tokenizer, opened.card()
    from merino_edge import checkpoint
    from merino_edge.errors import require
    from merino_edge.tokenizer import Tokenizer

    require("torch", "train")
    from merino_edge.model import Model
    from merino_edge.torch_engine import TorchEngine

    if threads is not None:
        limits.check_range("threads", threads, 1, limits.MAX_THREADS)
    source = checkpoint.load(path)
    model = Model.from_weights(source.architecture, source.weights)
    card = {"checkpoint_sha256": source.training["sha256"], "architecture": source.architecture.id, "precision": "fp32"}
    return TorchEngine(model, threads=threads), Tokenizer.load(path), card


def _tell(status: Status, name: str, done: int, of: int) -> None:
    status.update(f"{name}: {done} of {of}")


def _line(name: str, entry: dict[str, Any]) -> str:
    figures = (_figure(metric, found["value"], found["stderr"]) for metric, found in entry["metrics"].items())
    return f"{name:<14} {'   '.join(figures)}   ({entry['items']} items, {entry['seconds']:.0f} s)"


def _figure(metric: str, value: float, stderr: float | None) -> str:
    scale, unit = _scale(metric)
    spread = "" if stderr is None else f" ± {scale * stderr:.2f}"
    return f"{metric} {scale * value:.2f}{spread}{unit}"


def _scale(metric: str) -> tuple[float, str]:
    from merino_edge.runtime.evaluation import PERPLEXITIES

    return (1, "") if metric in PERPLEXITIES else (100, " %")


def _comparison_line(row: dict[str, Any]) -> str:
    scale, unit = _scale(row["metric"])
    value, other, difference, low, high = (scale * row[key] for key in ("value", "other", "difference", "low", "high"))
    sure = "" if low <= 0 <= high else "  *"
    return (
        f"{row['task']:<14} {row['metric']:<16} {value:.2f} against {other:.2f}{unit}: "
        f"{difference:+.2f} ({low:+.2f} to {high:+.2f}){sure}"
    )
