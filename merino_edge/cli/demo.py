"""`merino-edge demo`: runs every step on this machine, in about five minutes on two cores.

It runs the commands that a person would type, prints each one, and ends with a summary. The folder `--out` then holds
corpus.txt, table.jsonl (+ .png), architecture.json (+ .png), checkpoint/, bundle/ and summary.json.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

PRECISION = "int8"
BUDGET_SHARE = 0.6  # share of the predicted decode time of the largest architecture of the space
PROMPT = "One morning"


def demo(
    out: Annotated[Path, typer.Option(help="Folder for everything that the demo makes.")] = Path("demo"),
    decode_ms: Annotated[
        str | None,
        typer.Option(
            metavar="MS",
            help="Budget for the time per generated token, in ms. [default: 60 % of the largest model's time]",
        ),
    ] = None,
    params: Annotated[str, typer.Option(metavar="N", help="Budget for the parameters.")] = "3M",
    steps: Annotated[int, typer.Option(help="Training steps.")] = 400,
    threads: Annotated[
        int, typer.Option(help="CPU threads of each measurement. Models this small are not faster with more.")
    ] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print the summary as JSON.")] = False,
) -> None:
    """Run every step on this machine, from profile to generate.

    It profiles this CPU, then searches, trains, exports, checks and runs one small model, in about five minutes.
    """
    from merino_edge import artefact, limits
    from merino_edge.cli.console import print_json, stderr
    from merino_edge.data.tiny_stories import tiny_stories
    from merino_edge.errors import require
    from merino_edge.search.budget import parse_quantity

    for package, extra in (("torch", "train"), ("safetensors", "train"), ("onnx_ir", "export"), ("matplotlib", "plot")):
        require(package, extra)
    limits.check_range("steps", steps, 1, limits.MAX_ITERATIONS)
    limits.check_range("threads", threads, 1, limits.MAX_THREADS)
    for name, quantity in (("--params", params), ("--decode-ms", decode_ms)):
        if quantity is not None:
            parse_quantity(quantity, name)
    run = _Runner(stderr())
    corpus, table, architecture = out / "corpus.txt", out / "table.jsonl", out / "architecture.json"
    checkpoint, bundle = out / "checkpoint", out / "bundle"
    artefact.write_text(corpus, tiny_stories())
    for stale in filter(artefact.is_artefact_folder, (checkpoint, bundle)):  # from an earlier demo
        shutil.rmtree(stale)
    table.unlink(missing_ok=True)

    profiled = run(
        "profile",
        device="cpu",
        space="demo",
        minutes=1.0,
        precision=PRECISION,
        threads=threads,
        out=table,
        exit_zero=True,  # a demo on a busy machine goes on, and shows the verdict
        plot=out / "table.png",
    )
    budget = _decode_budget(table) if decode_ms is None else decode_ms
    searched = run(
        "search",
        space="demo",
        table=table,
        decode_ms=budget,
        params=params,
        precision=PRECISION,
        out=architecture,
        plot=out / "architecture.png",
    )
    trained = run(
        "train", architecture, corpus=corpus, steps=steps, batch=16, sequence=128, learning_rate="3e-3", out=checkpoint
    )
    context = searched["architecture"]["max_positions"]
    exported = run("export", checkpoint, precision=PRECISION, context=context, threads=threads, out=bundle)
    written = run("generate", bundle, raw=True, prompt=PROMPT, max_tokens=80, temperature=0.7, seed=0, threads=threads)
    speed = run("bench", bundle, prompt_tokens=64, new_tokens=128, threads=threads)
    summary = {
        "budgets": searched["budgets"],
        "predicted_decode_ms": next(ms for key, ms in searched["costs"].items() if key.startswith("decode_ms@")),
        "measured_decode_ms": next(r["p50_ms"] for r in speed["results"] if r["kind"] == "decode"),
        "table_error": profiled["validation"],
        "parameters": searched["costs"]["parameters"],
        "blocks": searched["architecture"]["blocks"],
        "loss_before": trained["validation_loss_before"],
        "loss_after": trained["validation_loss"],
        "parity": exported["parity"],
        "sample": PROMPT + written["text"],
        "artefacts": {
            "table": str(table),
            "architecture": str(architecture),
            "checkpoint": str(checkpoint),
            "bundle": str(bundle),
        },
    }
    artefact.write_json(out / "summary.json", "demo", summary)
    if as_json:
        print_json(summary)
    else:
        _print_summary(summary, out)


class _Runner:
    """Runs verbs of this program with `--json`. Their progress goes straight to the terminal."""

    def __init__(self, console: Console) -> None:
        self.console = console

    def __call__(self, verb: str, *arguments: object, **options: object) -> dict[str, Any]:
        """`options` as on the command line: `max_tokens=80` is `--max-tokens 80`, `raw=True` is `--raw`."""
        words = [verb, *map(str, arguments)]
        for name, value in options.items():
            words += [f"--{name.replace('_', '-')}", *([] if value is True else [str(value)])]
        self.console.print(f"\n[bold]$ merino-edge {' '.join(words)}[/bold]", soft_wrap=True, highlight=False)
        child = subprocess.Popen([*_program(), *words, "--json"], stdout=subprocess.PIPE, text=True)
        try:
            text, _ = child.communicate()
        except KeyboardInterrupt:  # the child also got the signal and prints its own refusal
            child.wait()
            raise
        if child.returncode:
            raise typer.Exit(child.returncode)  # the verb has printed why
        document: dict[str, Any] = json.loads(text)
        return document


def _program() -> list[str]:
    """How this program was started: the installed script, or the module."""
    script = Path(sys.argv[0])
    return [str(script)] if script.name == "merino-edge" and script.is_file() else [sys.executable, "-m", "merino_edge"]


def _decode_budget(table: Path) -> float:
    from merino_edge.latency.table_file import load_table
    from merino_edge.search.builtin_spaces import DEMO
    from merino_edge.search.space import Candidate

    largest = DEMO.architecture(Candidate(0, (len(DEMO.block_choices) - 1,) * DEMO.blocks[-1]))
    return float(f"{BUDGET_SHARE * load_table(table).model_ms(largest, 'decode'):.2g}")


def _print_summary(summary: dict[str, Any], out: Path) -> None:
    from rich.table import Table

    from merino_edge.cli.console import stdout
    from merino_edge.search.budget import spell_quantity

    blocks = "  ".join(f"{b['layers']} x {b['width']} (ffn {b['ffn_width']})" for b in summary["blocks"])
    error = summary["table_error"]["decode"]
    budgets = ", ".join(f"{name} at most {spell_quantity(value)}" for name, value in summary["budgets"].items())
    rows = {
        "budget": budgets,
        "decode": f"{summary['predicted_decode_ms']:.3f} ms predicted, {summary['measured_decode_ms']:.3f} ms measured "
        f"(table error on whole models: {error['mape_percent']:.1f} % mean)",
        "architecture": f"{summary['parameters']:,} parameters: {blocks}",
        "loss": f"{summary['loss_before']:.3f} before, {summary['loss_after']:.3f} after training (nats per token)",
        "parity": f"all {len(summary['parity'])} checks of the export passed",
        "sample": summary["sample"],
        "artefacts": "\n".join(summary["artefacts"].values()),
        "next": f"merino-edge generate {out / 'bundle'}",
    }
    table = Table(show_header=False, title="merino-edge demo", title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    stdout().print(table)
