"""The options of `search` and `pareto`: what to search, and what it may cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from merino_edge.latency.table import LatencyTable
    from merino_edge.search.budget import Budget
    from merino_edge.search.result import SearchConfig
    from merino_edge.search.space import Space

Limits = list[str] | None
PANEL = "Budgets (upper limits; repeatable; a public model's name stands for its cost)"


def _limit(metavar: str, text: str) -> Any:
    return typer.Option(metavar=metavar, help=text, rich_help_panel=PANEL)


SpaceName = Annotated[
    str | None,
    typer.Option(metavar="SPACE", help="Search space: paper, edge, wide, demo, or a space file. [default: paper]"),
]
ScoreName = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE",
        help="Score to maximise: effective, cut, exit, parameters, flops, or your own as MODULE:NAME. "
        "[default: effective]",
    ),
]
TablePath = Annotated[
    Path | None, typer.Option(metavar="T.jsonl", help="Latency table, from merino-edge profile or estimate.")
]
DeviceName = Annotated[
    str | None, typer.Option(metavar="NAME", help="Name of the device. A table of another device is refused.")
]
Precision = Annotated[
    str | None,
    typer.Option(help="Precision of the weights: fp32, fp16, int8 or int4. [default: the table's, else fp16]"),
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
        help="Time limit of the exact solver, in seconds. At the limit it reports the bound proven so far. "
        "[default: no limit]"
    ),
]
DecodeMs = Annotated[Limits, _limit("MS[@LENGTH]", "Time per generated token, at a cache length.")]
TextMs = Annotated[Limits, _limit("MS[@LENGTH]", "Time per 100 bytes of generated text: comparable across tokenizers.")]
PrefillMs = Annotated[Limits, _limit("MS[@TOKENS]", "Time to read a prompt of TOKENS tokens.")]
FirstTokenMs = Annotated[Limits, _limit("MS[@BYTES]", "Time to the first token, for a prompt of BYTES bytes.")]
EnergyMj = Annotated[Limits, _limit("MJ[@LENGTH]", "Energy per generated token in mJ, if the table has it.")]
WeightMb = Annotated[Limits, _limit("MB[@PRECISION]", "Stored weights.")]
KvMb = Annotated[Limits, _limit("MB[@POSITIONS]", "KV cache.")]
PeakMb = Annotated[
    Limits, _limit("MB[@TOKENS]", "Peak memory: weights, full KV cache, and activations of a prompt of TOKENS tokens.")
]
Params = Annotated[Limits, _limit("N", "Stored parameters, for example 60M.")]
Flops = Annotated[Limits, _limit("N", "FLOPs of 1024 tokens without the LM head, for example 60G.")]


def search_config(
    *,
    space: str | None,
    score: str | None,
    table: Path | None,
    device: str | None,
    precision: str | None,
    shared: bool | None,
    limits: Mapping[str, Sequence[str] | None],
    **solver: Any,
) -> SearchConfig:
    """The search that the options describe. `limits` holds the texts of each metric's budgets, such as 5@1024.

    Raises InputError and, for a space file or a table that cannot be read, ArtefactError.
    """
    import dataclasses

    from merino_edge.latency.table_file import load_table
    from merino_edge.search.builtin_spaces import load_space
    from merino_edge.search.result import SearchConfig
    from merino_edge.search.score import parse_score

    for metric, texts in limits.items():  # before files are read
        _check_limits(metric, texts or ())
    search_space = load_space(space or "paper")
    if shared is not None:
        search_space = dataclasses.replace(search_space, shared=(shared,))
    latency_table = load_table(table) if table else None
    if device is not None:
        _check_device(latency_table, device)
    precision = precision or (latency_table.precision if latency_table else "fp16")
    budget = _budget(limits, search_space, precision, latency_table)
    return SearchConfig(search_space, budget, parse_score(score or "effective"), precision, latency_table, **solver)


def _check_limits(metric: str, texts: Sequence[str]) -> None:
    """Raises InputError for a text that is neither a quantity nor the name of a public model."""
    from merino_edge.search.budget import KINDS, parse_at, parse_quantity
    from merino_edge.search.reference_models import PUBLIC

    for text in texts:
        value, mark, at = text.partition("@")
        if value not in PUBLIC:
            parse_quantity(value, KINDS[metric].option)
        if mark:
            parse_at(metric, at)


def _budget(
    texts_of: Mapping[str, Sequence[str] | None], space: Space, precision: str, table: LatencyTable | None
) -> Budget:
    from merino_edge.errors import InputError
    from merino_edge.presets import preset
    from merino_edge.search.budget import Budget, Metric, parse_at, parse_quantity
    from merino_edge.search.costs import CostModel
    from merino_edge.search.reference_models import PUBLIC, value_of

    limits, cost_model = [], CostModel(precision, table)
    for name, texts in texts_of.items():
        for text in texts or ():
            value, _, at = text.partition("@")
            metric = cost_model.resolve(Metric(name, parse_at(name, at) if at else None), space)
            if value in PUBLIC:
                limit, notes = value_of(preset(value), metric, cost_model)
                if limit is None:
                    raise InputError(f"{metric.kind.option} {text}: {notes[0]}", "give a number")
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
