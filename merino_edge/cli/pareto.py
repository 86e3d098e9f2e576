"""`merino-edge pareto`: finds the exact Pareto front of the score and one cost, with the public models beside it.

It writes a report (merino_edge.search.pareto has its form). On request it also writes a plot and a web page.
"""

from __future__ import annotations

import functools
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from merino_edge.cli import outputs, search_options

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID


@search_options.with_budgets
def pareto(
    out: Annotated[Path, typer.Option(help="Report to write, NAME.json.")],
    against: Annotated[
        str,
        typer.Option(
            metavar="METRIC", help="The cost, such as decode_ms, decode_ms@1024, weight_mb@int4 or energy_mj."
        ),
    ] = "decode_ms",
    points: Annotated[int, typer.Option(help="Points of the front.")] = 40,
    space: search_options.SpaceName = None,
    family: search_options.FamilyName = None,
    score: search_options.ScoreName = None,
    table: search_options.TablePaths = None,
    device: search_options.DeviceName = None,
    precision: search_options.Precision = None,
    bits: search_options.Bits = None,
    target: search_options.TargetName = None,
    shared: search_options.Shared = None,
    budgets: search_options.Limits = MappingProxyType({}),  # becomes an option for each metric
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Also write a plot of the front.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="HTML", help="Also write an interactive web page.")] = None,
    resume: Annotated[bool, typer.Option("--continue", "--resume", help=outputs.CONTINUE_HELP)] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as JSON.")] = False,
) -> None:
    """Find the exact trade-off between the score and one cost.

    Each point of the Pareto front has the highest score at its cost, with proof. The report also places the public
    models beside the front.
    """
    from merino_edge import __version__, artefact, limits
    from merino_edge.cli import console
    from merino_edge.errors import MissingExtraError
    from merino_edge.search import pareto_report
    from merino_edge.search.budget import Metric
    from merino_edge.search.pareto import KIND, SCHEMA_VERSION, pareto_front
    from merino_edge.search.reference_models import references
    from merino_edge.unfinished import Unfinished

    outputs.claim(out, KIND)
    limits.check_range("points", points, 2, limits.MAX_POINTS)
    metric = Metric.parse(against)
    config = search_options.search_config(
        space=space,
        family=family,
        score=score,
        table=table,
        device=device,
        precision=precision,
        bits=bits,
        target=target,
        shared=shared,
        limits=budgets,
    )
    tables = [one.sha256 for one in (config.table, *config.more_tables) if one is not None]
    key = {**pareto_report.origin(config), "metric": metric.key, "tables": tables, "tool": __version__}
    screen = console.stderr(markup=False)
    with Unfinished(out, key, resume=resume) as unfinished:
        with console.progress(screen) as bar:
            task = bar.add_task("points", total=points, note="")
            on_point = functools.partial(_show, bar, task)
            front = pareto_front(config.problem(), metric, points, on_point, unfinished.part)
        public = references(front.metric, config.score, front.problem.cost_model)
        report = pareto_report.to_document(front, config, public)
        written = artefact.write_json(out, KIND, report, SCHEMA_VERSION)
    screen.print(pareto_report.table(report))
    if plot:
        try:
            pareto_report.plot(report, plot)
        except MissingExtraError as error:
            screen.print(f"no plot: {error}", markup=False, soft_wrap=True)
    if html:
        pareto_report.page(report, html)
    if as_json:
        console.print_json(written)
    else:
        console.print_line(str(out))


def _show(bar: Progress, task: TaskID, points: int) -> None:
    bar.update(task, completed=points)
