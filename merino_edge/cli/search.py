"""`merino-edge search`: finds the architecture with the highest score within budgets.

It writes an architecture artefact (merino_edge.architecture). The artefact also holds how the architecture was found
(merino_edge.search.result). That is enough for `merino-edge search --from RESULT` to repeat the search.
"""

from __future__ import annotations

import math
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Annotated

import typer

from merino_edge.cli import search_options

if TYPE_CHECKING:
    from merino_edge.search.result import SearchConfig, SearchResult

UNASKED_SECONDS = 5.0  # prices are found unasked where the proof took less, and then take no more


@search_options.with_budgets
def search(
    out: Annotated[Path, typer.Option(help="Architecture file to write, NAME.json.")],
    space: search_options.SpaceName = None,
    family: search_options.FamilyName = None,
    solver: Annotated[
        str | None,
        typer.Option(help="exact (proven optimal) or evolution (the paper's algorithm). [default: exact]"),
    ] = None,
    score: search_options.ScoreName = None,
    table: search_options.TablePaths = None,
    device: search_options.DeviceName = None,
    precision: search_options.Precision = None,
    bits: search_options.Bits = None,
    target: search_options.TargetName = None,
    shared: search_options.Shared = None,
    budgets: search_options.Limits = MappingProxyType({}),  # becomes an option for each metric
    seconds: search_options.Seconds = None,
    iterations: Annotated[
        int | None, typer.Option(help="Mutations to try. [default: 100000]", rich_help_panel="Evolution")
    ] = None,
    population: Annotated[
        int | None, typer.Option(help="Architectures in the population. [default: 512]", rich_help_panel="Evolution")
    ] = None,
    parents: Annotated[
        int | None,
        typer.Option(help="Best architectures, which are mutated. [default: 64]", rich_help_panel="Evolution"),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Random seed. [default: 0]", rich_help_panel="Evolution")] = None,
    repeat: Annotated[
        Path | None,
        typer.Option("--from", metavar="RESULT", help="Repeat the search that found RESULT, and compare."),
    ] = None,
    priced: Annotated[
        bool | None,
        typer.Option(
            "--prices/--no-prices",
            help="Say what a tenth more of each budget would be worth. [default: if the search took less than 5 s]",
        ),
    ] = None,
    plot: Annotated[Path | None, typer.Option(metavar="PNG", help="Also write a plot of the search.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Find the architecture with the highest score within budgets.

    The exact solver proves that no architecture of the space that meets the budgets scores higher.
    """
    from merino_edge import architecture, limits
    from merino_edge.cli import console, outputs
    from merino_edge.errors import InputError, Interrupted, MissingExtraError
    from merino_edge.search import report, result_plot
    from merino_edge.search.result import run_search

    outputs.claim(out, architecture.KIND)
    evolution = {"iterations": iterations, "population": population, "parents": parents, "seed": seed}
    options = {name: value for name, value in evolution.items() if value is not None}
    limits.check_seconds(seconds)
    expected: tuple[str, ...] = ()
    if repeat is None:
        if options and solver != "evolution":
            raise InputError(f"--{next(iter(options))} is an option of the evolution", "add: --solver evolution")
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
            solver="exact" if solver is None else solver,
            options=options,
        )
    else:
        described = (space, family, solver, table, device, precision, bits, target, shared, seconds, *budgets.values())
        if options or any(value is not None for value in described):
            raise InputError("--from repeats a search with its own options", "leave out every other option but --out")
        config, expected = _config_of(repeat, score)

    screen = console.stderr()
    with screen.status("searching") as status:
        result = run_search(config, seconds, lambda *progress: status.update(_progress(*progress)))
    found = (result.architecture.id, *result.precisions)
    if repeat is not None and found != expected:
        raise InputError(
            f"{repeat} holds architecture {' '.join(expected)}, the search found {' '.join(found)}",
            "it was made by another version of the tool",
        )
    document = architecture.save(out, result.architecture, **result.document())
    screen.print(report.summary(result))
    for line in report.verdict(result):
        screen.print(line, markup=False, soft_wrap=True)
    if plot:
        try:
            result_plot.plot(result, plot)
        except MissingExtraError as error:
            screen.print(f"no plot: {error}", markup=False, soft_wrap=True)
    try:
        with screen.status("pricing the budgets"):
            lines = _prices(result, priced=priced, seconds=seconds)
    except KeyboardInterrupt:
        raise Interrupted(f"interrupted while it priced the budgets; {out} is complete", "use it as it is") from None
    for line in lines:
        screen.print(line, markup=False, soft_wrap=True)
    if as_json:
        console.print_json(document)
    else:
        console.print_line(str(out))


def _config_of(path: Path, score: str | None) -> tuple[SearchConfig, tuple[str, ...]]:
    """The search that found the result at `path`, the id of its architecture, and its blocks' precisions.

    `score` is a user's score that may be imported.
    """
    from merino_edge import architecture
    from merino_edge.errors import InputError
    from merino_edge.search.result import SearchConfig

    a, document = architecture.load(path)
    config = SearchConfig.of(document, str(path), score)
    if score is not None and score != config.score.spec:
        raise InputError(f"{path} was found with score {config.score.spec}", "leave --score out")
    return config, (a.id, *document.get("choices", {}).get("precisions", ()))


def _prices(result: SearchResult, *, priced: bool | None, seconds: float | None) -> list[str]:
    """What each budget is worth, a line each. Where nobody asked, it takes no more time than a search does at ease."""
    from merino_edge.search.prices import has_prices, prices, uses

    if priced is False or not has_prices(result):
        return []
    if priced is None and result.certificate is not None and result.certificate.seconds > UNASKED_SECONDS:
        return [*uses(result), "what more of a budget would be worth takes about as long again to find: add --prices"]
    limit_s = UNASKED_SECONDS if priced is None else math.inf
    return list(map(str, prices(result, limit_s if seconds is None else min(limit_s, seconds))))


def _progress(doing: str, score: float, bound: float) -> str:
    best = f", best {score:.6g}" if score > -float("inf") else ""
    return f"{doing}{best}" + (f", none above {bound:.6g}" if bound < float("inf") else "")
