"""`merino-edge profile`: measure what the parts of a space's models cost on this device, into a latency table.

`--json` prints {"table", "device", "backend", "precision", "threads", "entries", "unstable", "failed", "seconds",
"finished", "moved": [...], "estimated", "validation": {"decode": {"mape_percent", "p95_percent", "max_percent",
"bias_percent", "kendall_tau", "low_percent", "high_percent", "visits_apart_percent", "models", "found"}, "prefill":
{...}}, "verdict": {"word", "reasons"}}. "found" has the same figures for models that a search found with the table.
With `--dry-run` {"probes", "grid", "eta_seconds", "engines", "compile_seconds"}. TensorRT compiles so many engines
first; "compile_seconds" is a part of "eta_seconds".
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merino_edge.cli import profile_printers as printers
from merino_edge.cli import profile_request, units

if TYPE_CHECKING:
    from merino_edge.jetson.profiler.profiler import Progress

REPORT_PERCENT = 10  # step of the progress that is printed where stderr is no terminal


def profile(
    out: Annotated[Path, typer.Option(help="Latency table to write, NAME.jsonl.")],
    backend: Annotated[
        str | None,
        typer.Option(
            "--backend",
            "--device",
            help="Backend that runs the models: cpu (ONNX Runtime), cuda, tensorrt, torch, or a full name. "
            "[default: cpu]",
        ),
    ] = None,
    space: Annotated[
        str | None,
        typer.Option(
            metavar="SPACE", help="Search space to cover: paper, edge, wide, demo, or a space file. [default: paper]"
        ),
    ] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision of the weights: fp32, fp16, int8 or int4. [default: fp32]")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads of a step. [default: 1]")] = None,
    lengths: Annotated[
        str | None,
        typer.Option(
            metavar="N,N,...", help="Cache and prompt lengths to measure. [default: up to 1024, quick up to 256]"
        ),
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option(
            parser=units.minutes("--minutes"),
            metavar="MINUTES",
            help="Time budget in minutes. More time gives a finer table. [default: 30]",
        ),
    ] = None,
    quick: Annotated[bool, typer.Option("--quick", help="The same as --minutes 2.")] = False,
    only: Annotated[
        str | None,
        typer.Option(
            metavar="PATTERN",
            help="Measure only entries whose kind matches this regular expression, for example 'layer decode'.",
        ),
    ] = None,
    also: Annotated[
        str | None,
        typer.Option(
            metavar="NAME,...",
            help="Also measure these public models as a whole, so that pareto has their times: opt-125m, gpt2, ...",
        ),
    ] = None,
    like: Annotated[
        Path | None,
        typer.Option(
            metavar="FULL.jsonl",
            help="Measure only a share of the entries of this full table, of another machine, power mode, precision or "
            "number of threads. The others follow from it. It takes 5 minutes, or --minutes.",
        ),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option(
            parser=units.share("--share"),
            metavar="SHARE",
            help="Share of the entries that --like measures. [default: 0.1]",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option(
            "--continue", "--resume", help="Finish the table at --out, or add what --space and --lengths need."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would be measured and how long it would take.")
    ] = False,
    plot: Annotated[
        Path | None, typer.Option(metavar="PNG", help="Also write a plot of the costs and the validation.")
    ] = None,
    exit_zero: Annotated[
        bool, typer.Option("--exit-zero", help="Exit with 0 even if the verdict is not to use the table.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Measure a latency table on this device.

    The table is then checked against whole models that are measured on the same device. The verdict says whether it is
    good, usable, or not to be used.
    """
    import time

    from merino_edge.cli import console, outputs
    from merino_edge.errors import MissingExtraError, OutputError, UnfitTableError, require
    from merino_edge.latency.table_file import KIND, load_table

    if not dry_run:
        outputs.claim(out, KIND, resumes=True)  # it says below how to go on
    begun: dict[str, Any] = {}
    if resume and out.exists():
        begun = load_table(out, unfinished=True).header
    elif out.exists() and not dry_run:
        raise OutputError(f"{out} exists", "finish it with --continue, or choose another --out")
    require("onnx_ir", "export")
    from merino_edge.jetson.profiler import profiler
    from merino_edge.jetson.profiler.time_budget import QUICK_MINUTES

    request = profile_request.make_request(
        begun,
        out,
        backend=backend,
        space=space,
        precision=precision,
        threads=threads,
        lengths=lengths,
        minutes=QUICK_MINUTES if quick else minutes,
        only=only,
        also=also,
        like=like,
        share=share,
    )
    screen = console.stderr()
    if dry_run:
        prepared = profiler.prepare(request, begun or None)
        eta_seconds = prepared.seconds
        engines = prepared.to_compile(prepared.batches())
        compile_seconds = prepared.compile_seconds(engines)
        grid, probes = prepared.plan.grid, len(prepared.plan.probes)
        printers.print_plan(screen, grid, probes, eta_seconds)
        if engines:
            printers.print_compiling(screen, len(engines), compile_seconds)
        printers.print_warnings(screen, request.backend.warnings)
        if as_json:
            compiling = {"engines": len(engines), "compile_seconds": compile_seconds}
            console.print_json({"probes": probes, "grid": grid, "eta_seconds": eta_seconds, **compiling})
        return

    started = time.perf_counter()
    try:
        with console.progress(screen, lines=False) as bar:  # it prints its own
            task = bar.add_task("measuring", total=None, note="")
            reported, to_compile = -REPORT_PERCENT, 0

            def note(progress: Progress) -> None:
                nonlocal reported, to_compile
                if to_compile != progress.to_compile:  # the compilation begins, or is over
                    reported, to_compile = -REPORT_PERCENT, progress.to_compile
                    if to_compile:
                        printers.print_compiling(screen, to_compile, progress.total_seconds)
                bar.update(
                    task,
                    description="compiling" if to_compile else "measuring",
                    completed=round(progress.done_seconds),
                    total=max(1, round(progress.total_seconds)),
                    note="; ".join(progress.moved),
                )
                percent = int(100 * progress.done_seconds / max(1.0, progress.total_seconds))
                if not screen.is_terminal and percent >= reported + REPORT_PERCENT:
                    reported = percent
                    left = (progress.total_seconds - progress.done_seconds) / 60
                    whole = f"{to_compile} engines" if to_compile else f"{progress.probes} probes"
                    screen.print(
                        f"{progress.done} of {whole}, about {max(0.0, left):.1f} min left",
                        soft_wrap=True,
                    )

            table = profiler.profile(out, request, resume=resume, on_progress=note)
    except KeyboardInterrupt:
        if out.exists():
            screen.print(f"interrupted; go on with: merino-edge profile --continue --out {out}", soft_wrap=True)
        raise
    seconds = time.perf_counter() - started
    printers.print_result(screen, table, seconds)
    printers.print_warnings(screen, request.backend.warnings)
    if plot and table.finished:
        from merino_edge.jetson.profiler.plot import plot_table

        try:
            plot_table(table, plot)
        except MissingExtraError as error:
            screen.print(f"no plot: {error}", markup=False)
    if as_json:
        console.print_json(
            {
                "table": str(out),
                "device": table.header["device"]["name"],
                "backend": table.header["backend"],
                "precision": table.precision,
                "threads": request.threads,
                "entries": len(table.measurements),
                "unstable": len(table.unstable),
                "failed": len(table.failed),
                "seconds": seconds,
                "finished": table.finished,
                "moved": table.moved,
                "estimated": table.estimated,
                "validation": table.validation,
                "verdict": table.verdict and table.verdict.to_dict(),
            }
        )
    else:
        console.print_line(str(out))
    if table.verdict is not None and table.verdict.is_unfit and not exit_zero:
        raise UnfitTableError(
            f"{out} is not to be used: {'; '.join(table.verdict.reasons)}",
            f"end other programs, then: rm {out}, and profile again, or with more --minutes",
        )
