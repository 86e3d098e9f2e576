"""`merino-edge profile`: measure what the parts of a space's models cost on this device, into a latency table.

`--json` prints {"table", "device", "precision", "threads", "entries", "unstable", "seconds", "estimated",
"validation": {"decode": {"mape_percent", "p95_percent", "max_percent", "bias_percent", "kendall_tau", "models"},
"prefill": {...}}}; with `--dry-run` {"probes", "grid", "eta_seconds"}.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from merino_edge.latency_table import LatencyTable


def profile(
    out: Annotated[Path, typer.Option(help="The latency table to write, NAME.jsonl.")],
    device: Annotated[str, typer.Option(help="cpu (ONNX Runtime on this machine's processor).")] = "cpu",
    space: Annotated[
        str | None, typer.Option(help="The space to cover: paper, edge, wide, demo, or a space file. [default: paper]")
    ] = None,
    precision: Annotated[str | None, typer.Option(help="fp32, fp16, int8 or int4. [default: fp32]")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads of a step. [default: the cores there are]")] = None,
    lengths: Annotated[
        str | None, typer.Option(metavar="N,N,...", help="Cache and prompt lengths. [default: up to 1024, quick 256]")
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="A small grid and fewer rounds.")] = False,
    resume: Annotated[
        bool, typer.Option("--continue", help="Finish the table at --out, or add what --space and --lengths need.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what would be measured and how long it takes.")
    ] = False,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Also plot the costs and the validation.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a latency table on this device and check it against whole models."""
    import time

    from merino_edge import limits
    from merino_edge.cli import console
    from merino_edge.counts import PRECISIONS
    from merino_edge.errors import InputError, MissingExtraError, UnsupportedError, require
    from merino_edge.latency_table import LatencyTable
    from merino_edge.search import space_file
    from merino_edge.search.spaces import SPACES, load_space

    if device != "cpu":
        raise UnsupportedError(f"unknown device {device!r}", "choose --device cpu; TensorRT devices follow")
    require("onnx_ir", "export")
    from merino_edge.jetson import profiler
    from merino_edge.jetson.probe import make_plan

    begun: dict[str, Any] = {}
    if resume and out.exists():
        begun = LatencyTable.load(out, unfinished=True).header
        quick = quick or bool(begun.get("quick"))
    if space is None and begun:
        chosen = space_file.from_dict(begun.get("space"), str(out), SPACES)
    else:
        chosen = load_space(space or "paper")
    precision = precision or begun.get("precision", "fp32")
    if precision not in PRECISIONS:
        raise InputError(f"there is no precision {precision!r}", f"choose {', '.join(PRECISIONS)}")
    threads = begun.get("threads", len(os.sched_getaffinity(0))) if threads is None else threads
    limits.check_range("threads", threads, 1, limits.MAX_THREADS)

    asked = _lengths(lengths)

    screen = console.stderr()
    if dry_run:
        plan = make_plan(chosen, precision, quick, asked, begun or None)
        eta_seconds = profiler.estimate_seconds(plan, precision, threads, quick)
        _print_plan(screen, plan.grid, len(plan.probes), eta_seconds)
        if as_json:
            console.print_json({"probes": len(plan.probes), "grid": plan.grid, "eta_seconds": eta_seconds})
        return

    started = time.perf_counter()
    try:
        with console.progress(screen) as bar:
            task = bar.add_task("measuring", total=None, note="")
            table = profiler.profile(
                out,
                chosen,
                space_file.to_dict(chosen),
                precision,
                threads,
                quick,
                resume,
                note=lambda done, total: bar.update(task, completed=done, total=total),
                lengths=asked,
            )
    except KeyboardInterrupt:
        if out.exists():
            screen.print(f"interrupted; go on with: merino-edge profile --continue --out {out}", soft_wrap=True)
        raise
    seconds = time.perf_counter() - started
    _print_validation(screen, table, seconds)
    if plot:
        from merino_edge.jetson.plot import plot_table

        try:
            plot_table(table, plot)
        except MissingExtraError as error:
            screen.print(f"no plot: {error}", markup=False)
    if as_json:
        console.print_json(
            {
                "table": str(out),
                "device": table.header["device"]["name"],
                "precision": table.precision,
                "threads": threads,
                "entries": len(table.measurements),
                "unstable": len(table.unstable),
                "seconds": seconds,
                "estimated": table.estimated,
                "validation": table.validation,
            }
        )
    else:
        console.print_line(str(out))


def _lengths(text: str | None) -> list[int] | None:
    from merino_edge import limits
    from merino_edge.errors import InputError

    if text is None:
        return None
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) < 10 for part in parts):
        raise InputError(f"--lengths {text!r} is no list of lengths", "write it as 64,256,1024")
    return [limits.check_range("--lengths", int(part), 1, limits.MAX_POSITIONS) for part in parts]


def _print_plan(screen: Console, grid: dict[str, Any], probes: int, eta_seconds: float) -> None:
    for name, values in grid.items():
        screen.print(f"{name.replace('_', ' ')}: {values}", highlight=False)
    screen.print(f"{probes} probes in decode and prefill, about {eta_seconds / 60:.1f} min")


def _print_validation(screen: Console, table: LatencyTable, seconds: float) -> None:
    unstable = len(table.unstable)
    screen.print(
        f"{len(table.measurements)} entries in {seconds:.0f} s, {unstable} unstable (over 2.5% between rounds)"
    )
    for mode, figures in table.validation.items():
        tau = figures["kendall_tau"]
        screen.print(
            f"{mode}: predicted against {figures['models']} whole models measured: "
            f"MAPE {figures['mape_percent']:.1f}%, p95 {figures['p95_percent']:.1f}%, "
            f"max {figures['max_percent']:.1f}%, Kendall tau {'-' if tau is None else f'{tau:.2f}'}",
            soft_wrap=True,
        )
