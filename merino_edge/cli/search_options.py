"""The options that say what to search and what it may cost, shared by `search` and `pareto`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from merino_edge.latency.table import LatencyTable
    from merino_edge.latency.table_file import load_table
    from merino_edge.search.budget import Budget
    from merino_edge.search.result import Question
    from merino_edge.search.space import Space

Limits = list[str] | None


def _limit(metavar: str, text: str) -> Any:
    return typer.Option(
        metavar=metavar, help=text, rich_help_panel="Budgets (repeatable; a public model's name: its own)"
    )


SpaceName = Annotated[
    str | None, typer.Option(help="paper, edge, wide, demo, or a space file. [default: paper]", show_default=False)
]
ScoreName = Annotated[
    str | None,
    typer.Option(
        metavar="SCORE",
        help="effective, cut, exit, parameters, flops, or your own as MODULE:NAME. [default: effective]",
    ),
]
TablePath = Annotated[Path | None, typer.Option(help="A latency table made by: merino-edge profile.")]
DeviceName = Annotated[str | None, typer.Option(metavar="NAME", help="Refuse a table of another device.")]
Precision = Annotated[str | None, typer.Option(help="fp32, fp16, int8 or int4. [default: the table's, else fp16]")]
Shared = Annotated[
    bool | None, typer.Option("--shared/--no-shared", help="One set of weights per block. [default: the space's]")
]
Seconds = Annotated[float | None, typer.Option(help="Stop the exact solver then, with the bound proven so far.")]
DecodeMs = Annotated[Limits, _limit("MS[@LENGTH]", "A generated token, at a cache length.")]
TextMs = Annotated[Limits, _limit("MS[@LENGTH]", "100 bytes of generated text: fair to any vocabulary.")]
PrefillMs = Annotated[Limits, _limit("MS[@TOKENS]", "A prompt of so many tokens.")]
FirstTokenMs = Annotated[Limits, _limit("MS[@BYTES]", "Until the first token, for a prompt of so many bytes.")]
EnergyMj = Annotated[Limits, _limit("MJ[@LENGTH]", "Energy of a generated token, where the table has it.")]
WeightMb = Annotated[Limits, _limit("MB[@PRECISION]", "Stored weights.")]
KvMb = Annotated[Limits, _limit("MB[@POSITIONS]", "Key-value cache.")]
PeakMb = Annotated[Limits, _limit("MB[@TOKENS]", "Weights, full cache and activations of a prompt.")]
Params = Annotated[Limits, _limit("N", "Stored parameters, as 60M.")]
Flops = Annotated[Limits, _limit("N", "FLOPs per 1024 tokens without head, as 60G.")]


def question_from_options(
    space: str | None,
    score: str | None,
    table: Path | None,
    device: str | None,
    precision: str | None,
    shared: bool | None,
    given: Mapping[str, Sequence[str] | None],
    **solver: Any,
) -> Question:
    """What was asked for on the command line. `given`: texts by metric. Raises InputError, ArtefactError."""
    import dataclasses

    from merino_edge.search.builtin_spaces import load_space
    from merino_edge.search.result import Question
    from merino_edge.search.score import parse_score

    for metric, texts in given.items():  # before files are read
        _check(metric, texts or ())
    chosen = load_space(space or "paper")
    if shared is not None:
        chosen = dataclasses.replace(chosen, shared=(shared,))
    latencies = load_table(table) if table else None
    if device is not None:
        _check_device(latencies, device)
    precision = precision or (latencies.precision if latencies else "fp16")
    budget = _budget(given, chosen, precision, latencies)
    return Question(chosen, budget, parse_score(score or "effective"), precision, latencies, **solver)


def _check(metric: str, texts: Sequence[str]) -> None:
    """Refuse what is neither a quantity nor a public model's name."""
    from merino_edge.search.budget import KINDS, parse_at, parse_quantity
    from merino_edge.search.reference_models import PUBLIC

    for text in texts:
        value, mark, at = text.partition("@")
        if value not in PUBLIC:
            parse_quantity(value, KINDS[metric].option)
        if mark:
            parse_at(metric, at)


def _budget(
    given: Mapping[str, Sequence[str] | None], space: Space, precision: str, table: LatencyTable | None
) -> Budget:
    from merino_edge.errors import InputError
    from merino_edge.presets import preset
    from merino_edge.search.budget import Budget, Metric, parse_at, parse_quantity
    from merino_edge.search.costs import Prices
    from merino_edge.search.reference_models import PUBLIC, value_of

    limits, prices = [], Prices(precision, table)
    for name, texts in given.items():
        for text in texts or ():
            value, _, at = text.partition("@")
            metric = prices.resolve(Metric(name, parse_at(name, at) if at else None), space)
            if value in PUBLIC:
                limit, notes = value_of(preset(value), metric, prices)
                if limit is None:
                    raise InputError(f"{metric.kind.option} {text}: {notes[0]}", "give a number")
            else:
                limit = parse_quantity(value, metric.kind.option)
            limits.append((metric, limit))
    return Budget(tuple(limits))


def _check_device(table: LatencyTable | None, device: str) -> None:
    from merino_edge.errors import InputError

    if table is None:
        raise InputError("--device asks for a latency table", "add --table T.jsonl")
    card = table.header.get("device", {})
    names = [card.get("name", ""), *card.get("compatible", [])]
    if not any(device.lower() in str(name).lower() for name in names):
        raise InputError(
            f"{table.path} was measured on {names[0] or 'an unknown device'}, not on {device}",
            f"measure it there: merino-edge profile --out {table.path.name}",
        )
