"""The options of `search` and `pareto`: what to search, and what it may cost."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merino_edge.cli import units
from merino_edge.search.budget import KINDS

if TYPE_CHECKING:
    from merino_edge.latency.table import LatencyTable
    from merino_edge.search.budget import Budget
    from merino_edge.search.costs import CostModel
    from merino_edge.search.result import SearchConfig
    from merino_edge.search.score import Score
    from merino_edge.search.space import Space

Limits = Mapping[str, Sequence[str] | None]  # by metric, the texts of its budgets, such as 5@1024
PANEL = "Budgets (repeatable; a share, as 25%, or a public model's name works too)"

SpaceName = Annotated[
    str | None,
    typer.Option(metavar="SPACE", help="Search space: paper, edge, wide, demo, or a space file. [default: paper]"),
]
FamilyName = Annotated[
    str | None,
    typer.Option(
        metavar="FAMILY",
        help="Only the space's models of a family that export-hf can write: llama, qwen2, qwen3, gemma3, gpt2 or opt.",
    ),
]
ScoreName = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE",
        help="Score to maximise: counting, paper, calibrated, cut, exit, parameters, flops, or your own as "
        "MODULE:NAME. [default: counting]",
    ),
]
TablePaths = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="T.jsonl",
        help="Latency table, from merino-edge profile or estimate. With --bits, one for each precision.",
    ),
]
DeviceName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name of the device. A table of another device is refused.")
]
Precision = Annotated[
    str | None,
    typer.Option(help="Precision of the weights: fp32, fp16, int8 or int4. [default: the table's, else fp16]"),
]
TargetName = Annotated[
    str | None,
    typer.Option(
        metavar="TARGET",
        help="Target of export whose bundle is counted: weights, cache, peak memory. merino-edge targets lists them. "
        "[default: that of the table, else none]",
    ),
]
Bits = Annotated[
    str | None,
    typer.Option(
        metavar="P,P[=SHARE]...",
        help="Precisions that each block may have, such as int4,int8,fp16. --precision is that of everything else. "
        "A share of a block's score that rounding costs may follow: int4=0.1. [default: the space's]",
    ),
]
Shared = Annotated[
    bool | None,
    typer.Option(
        "--shared/--no-shared",
        help="The layers of a block share one set of weights, or each has its own. [default: the space's]",
    ),
]
Seconds = Annotated[
    float | None,
    typer.Option(
        parser=units.seconds("--seconds"),
        metavar="SECONDS",
        help="Time limit of the exact solver, in seconds. At the limit it reports the bound proven so far. "
        "[default: no limit]",
    ),
]


def with_budgets(verb: Callable[..., None]) -> Callable[..., None]:
    """`verb` with one option for each metric of a search, in place of its parameter `budgets` (`Limits`)."""
    names = {kind.option.removeprefix("--").replace("-", "_"): metric for metric, kind in KINDS.items()}
    parameters: list[inspect.Parameter] = []
    for parameter in inspect.signature(verb, eval_str=True).parameters.values():
        if parameter.name != "budgets":
            parameters.append(parameter)
            continue
        for name, metric in names.items():
            kind = KINDS[metric]
            option = typer.Option(kind.option, metavar=kind.metavar, help=kind.help, rich_help_panel=PANEL)
            annotation = Annotated[list[str] | None, option]
            parameters.append(parameter.replace(name=name, default=None, annotation=annotation))

    @functools.wraps(verb)
    def run(**options: Any) -> None:
        limits = {metric: options.pop(name) for name, metric in names.items()}
        verb(**options, budgets=limits)

    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return run


def search_config(
    *,
    space: str | None,
    family: str | None = None,
    score: str | None,
    table: Sequence[Path] | None,
    device: str | None,
    precision: str | None,
    bits: str | None,
    target: str | None,
    shared: bool | None,
    limits: Limits,
    **solver: Any,
) -> SearchConfig:
    """The search that the options describe. `limits` holds the texts of each metric's budgets, such as 5@1024.

    Without a target, that of the table is taken. Raises InputError and, for a space or a table that cannot be read,
    ArtefactError. Raises UnsupportedError for a precision that the target cannot run.
    """
    import dataclasses

    from merino_edge.latency.table_file import load_table
    from merino_edge.search.block_precision import parse_bits
    from merino_edge.search.builtin_spaces import load_space
    from merino_edge.search.costs import CostModel
    from merino_edge.search.family_space import as_family
    from merino_edge.search.result import SearchConfig
    from merino_edge.search.score import DEFAULT, parse_score
    from merino_edge.storage import target_of_table

    limits = {metric: [text.lower() for text in texts or ()] for metric, texts in limits.items()}
    for metric, texts in limits.items():  # before files are read
        _check_limits(metric, texts or ())
    search_space = load_space("paper" if space is None else space)
    if family is not None:
        search_space = as_family(search_space, family)
    if shared is not None:
        search_space = dataclasses.replace(search_space, shared=(shared,))
    if bits is not None:
        search_space = dataclasses.replace(search_space, precisions=parse_bits(bits))
    tables = [load_table(path) for path in table or ()]
    first = next((one for one in tables if precision in (None, one.precision)), next(iter(tables), None))
    latency_table, more_tables = first, tuple(one for one in tables if one is not first)
    if device is not None:
        _check_device(latency_table, device)
    if precision is None:
        precision = latency_table.precision if latency_table else "fp16"
    if target is None and latency_table is not None:
        target = target_of_table(latency_table.header)
    maximised = parse_score(DEFAULT if score is None else score)
    budget = _budget(limits, search_space, maximised, CostModel(precision, latency_table, target, more_tables))
    return SearchConfig(
        search_space, budget, maximised, precision, latency_table, target=target, more_tables=more_tables, **solver
    )


def _check_limits(metric: str, texts: Sequence[str]) -> None:
    """Raises InputError for a text that is no quantity, no percentage and no name of a public model."""
    from merino_edge import names
    from merino_edge.errors import InputError
    from merino_edge.search.budget import parse_at, parse_quantity
    from merino_edge.search.reference_models import PUBLIC
    from merino_edge.search.relative_budget import PERCENT, parse_percent

    for text in texts:
        value, mark, at = text.partition("@")
        if value[:1].isalpha() and value not in PUBLIC:
            what = f"{KINDS[metric].option} {text!r} is not a positive number"
            raise InputError(what, names.choose(value, PUBLIC, ", or a number"))
        if value not in PUBLIC:
            (parse_percent if value.endswith(PERCENT) else parse_quantity)(value, KINDS[metric].option)
        if mark:
            parse_at(metric, at)


def _budget(texts_of: Limits, space: Space, score: Score, cost_model: CostModel) -> Budget:
    from merino_edge.errors import InputError
    from merino_edge.presets import preset
    from merino_edge.search.budget import Budget, Metric, parse_at, parse_quantity
    from merino_edge.search.reference_models import PUBLIC, value_of
    from merino_edge.search.relative_budget import PERCENT, parse_percent, relative_limit

    limits = []
    for name, texts in texts_of.items():
        for text in texts or ():
            value, _, at = text.partition("@")
            metric = cost_model.resolve(Metric(name, parse_at(name, at) if at else None), space)
            if value in PUBLIC:
                limit, notes = value_of(preset(value), metric, cost_model)
                if limit is None:
                    raise InputError(f"{metric.kind.option} {text}: {notes[0]}", "give a number")
            elif value.endswith(PERCENT):
                limit = relative_limit(space, metric, parse_percent(value, metric.kind.option), score, cost_model)
            else:
                limit = parse_quantity(value, metric.kind.option)
            limits.append((metric, limit))
    return Budget(tuple(limits))


def _check_device(table: LatencyTable | None, device: str) -> None:
    from merino_edge.errors import InputError

    if table is None:
        raise InputError("--device needs a latency table", "add --table T.jsonl")
    card = table.header.get("device", {})
    names = [card.get("name", ""), *card.get("compatible", [])]
    if not any(device.lower() in str(name).lower() for name in names):
        raise InputError(
            f"{table.path} was measured on {names[0] or 'an unknown device'}, not on {device}",
            f"measure it there: merino-edge profile --out {table.path.name}",
        )
