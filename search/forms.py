"""The forms of a search result and of a Pareto front (merino_edge.search.result, merino_edge.search.pareto)."""

from __future__ import annotations

from typing import Annotated, Any

from merino_edge import limits
from merino_edge.forms import UNSET, Count, Form, Line, Meta, Number, Paragraph, Positive, Sha256, UnsetType


class Score(Form):
    name: Line


# --- a result: the fields that a search adds to an architecture -------------------------------------


class ScoreOfResult(Form):
    name: Line | UnsetType = UNSET


class Certificate(Form):
    bound: Number | None = None
    gap_percent: Number | None = None


class SpaceOfResult(Form):
    form: dict[str, Any]  # merino_edge.search.space_file reads it
    name: Line | UnsetType = UNSET
    sha256: Sha256 | UnsetType = UNSET


class Choices(Form):
    precisions: list[Line] | UnsetType = UNSET


class Result(Form):
    """The fields that code reads of a result. An architecture that no search found has none of them."""

    score: ScoreOfResult | UnsetType = UNSET
    certificate: Certificate | None = None
    budgets: dict[Line, Any] | UnsetType = UNSET
    precision: Line | UnsetType = UNSET
    target: Line | None = None
    choices: Choices | UnsetType = UNSET
    ties: Line | UnsetType = UNSET
    solver: Line | UnsetType = UNSET
    solver_options: dict[Line, Any] | UnsetType = UNSET
    space: SpaceOfResult | UnsetType = UNSET
    table: dict[str, Any] | None = None  # merino_edge.latency.table_file reads tables
    more_tables: tuple[dict[str, Any], ...] = ()


# --- a front ---------------------------------------------------------------------------------------


class Block(Form):
    width: Count
    layers: Count
    ffn_width: Count
    shared: bool


class Shape(Form):
    blocks: Annotated[list[Block], Meta(min_length=1, max_length=limits.MAX_BLOCKS)]


class Point(Form):
    value: Number
    score: Number
    id: Line
    architecture: Shape
    precisions: tuple[Line, ...] = ()

    def __post_init__(self) -> None:
        if self.precisions and len(self.precisions) != len(self.architecture.blocks):
            raise ValueError(f"{len(self.precisions)} precisions for {len(self.architecture.blocks)} blocks")


class Reference(Form):
    name: Line
    score: Number
    value: Number | None
    notes: Annotated[list[Line], Meta(max_length=100)]


class SpaceOfFront(Form):
    name: Line
    size: int


class Source(Form):
    """The table of a front."""

    name: Line
    estimated: bool
    device: Line
    warnings: Annotated[tuple[Paragraph, ...], Meta(max_length=100)] = ()


class Front(Form):
    """A report of merino_edge.search.pareto."""

    metric: Line
    label: Line
    unit: Positive
    score: Score
    complete: bool
    points: Annotated[list[Point], Meta(min_length=1, max_length=limits.MAX_POINTS)]
    references: Annotated[list[Reference], Meta(max_length=200)]
    budgets: Annotated[dict[Line, Number], Meta(max_length=100)]
    precision: Line
    space: SpaceOfFront
    table: Source | None
    target: Line | None = None
