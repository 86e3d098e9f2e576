"""A latency table: what the parts of a model cost on one device, as measured. Sums to whole models.

Its file form stands in `merino_edge.latency.table_file`. What an entry can be:

| what | costs | measured over |
|---|---|---|
| layer | one more layer that has its own weights | FFN kind, length, width, ffn_width / width, kv_heads |
| repeat | one more layer of a block that shares its weights; in a prefill as much as any other | the same |
| width_change | a projection between two widths | before * after; of a prefill also length |
| end | what a step costs however deep: overhead, embedding, final norm, head | vocab_size, embedding_width; the same |
| calibration | a whole model, to fit the step_time to | - |
| model | a whole model that no other line was made from: checks the sum, is not part of it | - |

`mode` decode is one token; its layers' length is how many cache_positions of the cache a step reads: the positions in use, or
where there are `cache_buckets`, the smallest of them, doubled until the sequence fits (0: the whole context). `mode`
prefill is `length` tokens into an empty cache. Between measured points cost is interpolated, outside refused. Every
answer is a multiple of 2^-30 ms (a picosecond) or mJ, so that sums are exact in any order: a search that adds parts
compares with a budget exactly what the whole model's sum would. The table knows no clock, no device and no file:
`merino_edge.jetson.profiler.profiler` measures.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.latency.drift import merge_repetitions
from merino_edge.latency.grids import AGAIN, LatencyGrids
from merino_edge.latency.measurement import Measurement, Mode, Point, layer_point
from merino_edge.latency.step import Step
from merino_edge.latency.step_time import COLD, WARM, Piece, StepTimeModel, Sums, rounded, single

# What a layer of the table holds constant beside its shape.
FAMILY = (
    "head_dim",
    "tied_head",
    "norm",
    "norm_placement",
    "positions",
    "rotary_dim",
    "bias",
    "parallel_residual",
)


class Interval(NamedTuple):
    """A prediction, and between which bounds nine of ten held-out models' times lay around theirs; of an estimated
    table, all published speeds that nothing was fitted to."""

    value: float
    low: float
    high: float


def family(a: Architecture) -> dict[str, Any]:
    """What a table holds constant: which nodes, beside the FFN's, a layer of `a` has."""
    return {name: getattr(a, name) for name in FAMILY}


@dataclass
class LatencyTable:
    """A loaded table."""

    path: Path
    header: dict[str, Any]
    lines: list[Measurement]  # as they stand in the file, a line for every repetition
    validation: dict[str, Any]  # {} while the table is unfinished
    sha256: str
    step_time: StepTimeModel | None = None  # of decode; None: as entries are, unfitted
    conditions: list[dict[str, Any]] = field(default_factory=list)  # clocks before, during and after
    measurements: list[Measurement] = field(init=False, repr=False, compare=False)  # an entry each, evened
    _grids: LatencyGrids = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.measurements = merge_repetitions(self.lines)
        self._grids = LatencyGrids(self.path, self.measurements, self.header.get("reference"))
        if self.step_time is None:
            self.step_time = single(COLD if self._grids.only_cold else WARM)

    @property
    def estimated(self) -> bool:
        return bool(self.header["estimated"])

    @property
    def precision(self) -> str:
        return str(self.header["precision"])

    @property
    def default_length(self) -> int:
        return int(self.header["default_length"])

    @property
    def unstable(self) -> list[Measurement]:
        return [m for m in self.measurements if m.unstable]

    @property
    def failed(self) -> list[Measurement]:
        """What the backend could not run."""
        return [m for m in self.measurements if m.failed]

    @property
    def moved(self) -> list[str]:
        """Which clocks, power modes and throttle counters changed while it was measured."""
        return list(dict.fromkeys(line for reading in self.conditions for line in reading.get("moved", ())))

    # --- costs: in the unit of the step, of one piece ---

    def layer_cost(self, a: Architecture, block: Block, step: Step, what: str = "layer") -> float:
        """One layer of `block`'s shape; `what` "repeat": one more that shares its weights. Raises InputError."""
        cache_positions = self.cache_positions(step, a.max_positions)
        return self._cost(
            what, a.ffn, step, layer_point(cache_positions, block.width, block.heads, block.kv_heads, block.ffn_width)
        )

    def block_cost(self, a: Architecture, block: Block, step: Step) -> float:
        """All layers of `block`. Raises InputError."""
        first = self.layer_cost(a, block, step)
        read = 0.0
        if per_mb := self._ms_per_mb(step):
            cache_positions = self.cache_positions(step, a.max_positions)
            read = _reading_ms(per_mb, counts.block_step_bytes(a, block, self.precision, cache_positions))
        if block.shared and block.layers > 1:
            return read + first + (block.layers - 1) * self.layer_cost(a, block, step, "repeat")
        return read + block.layers * first

    def width_change_cost(self, before: int, after: int, step: Step) -> float:
        """The projection between two widths; nothing when they are equal. Raises InputError."""
        if before == after:
            return 0.0
        cost = self._cost("width_change", "", step, (*_length(step), before * after))
        if per_mb := self._ms_per_mb(step):
            parameters = counts.width_projection_parameters(before, after)
            cost += _reading_ms(per_mb, parameters * counts.MATRIX_BYTES[self.precision])
        return cost

    def embedding_and_head_cost(self, a: Architecture, step: Step) -> float:
        """What a step costs however deep `a` is, the projections at either end and the face's constant, which may be
        negative, included. Raises InputError."""
        width, first, last = a.embedding_width, a.blocks[0].width, a.blocks[-1].width
        cost = self._cost("end", "", step, (*_length(step), a.vocab_size, width))
        # only the last position reaches the head, in prefill too
        out = step._replace(mode="decode")
        if per_mb := self._ms_per_mb(step):
            cost += _reading_ms(per_mb, counts.table_bytes(a, self.precision))
        if step.fitted:
            cost += rounded(self._face(step).offset_ms)
        return cost + self.width_change_cost(width, first, step) + self.width_change_cost(last, width, out)

    def sum_cost(self, a: Architecture, step: Step) -> float:
        """A whole model's parts: its ends, blocks and width changes. Raises InputError."""
        self.check_family(a)
        neighbours = itertools.pairwise(block.width for block in a.blocks)
        changes = sum(self.width_change_cost(before, after, step) for before, after in neighbours)
        return self.embedding_and_head_cost(a, step) + changes + sum(self.block_cost(a, block, step) for block in a.blocks)

    # --- whole models ---

    def sums(self, a: Architecture, length: int) -> Sums:
        """Of a decode step: what the step_time make a time of. Raises InputError."""
        step = Step("decode", length)
        warm, cold = (replace(self, step_time=single(piece)).sum_cost(a, step) for piece in (WARM, COLD))
        return Sums(warm, cold, counts.step_bytes(a, self.precision, self.cache_positions(step, a.max_positions)) / 1e6)

    def alternatives(self, step: Step) -> tuple[tuple[Step, ...], ...]:
        """`step` by each piece: a model costs the least over alternatives of the greatest over their steps."""
        if not step.fitted or self.step_time is None:
            return ((step,),)
        return tuple(tuple(step._replace(piece=i) for i in indices) for indices in self.step_time.alternatives)

    def model_cost(self, a: Architecture, step: Step) -> float:
        """What a step of `a` costs. Raises InputError."""
        sums = {piece: self.sum_cost(a, piece) for piece in dict.fromkeys(itertools.chain(*self.alternatives(step)))}
        return min(max(sums[piece] for piece in step_time) for step_time in self.alternatives(step))

    def model_ms(self, a: Architecture, mode: Mode, length: int | None = None) -> float:
        """`model_cost` in milliseconds, at the table's default length if none is given."""
        return self.model_cost(a, Step(mode, self.default_length if length is None else length))

    def interval(self, value: float, step: Step) -> Interval | None:
        """The error bar of a predicted `value`; None where nothing was held out, or for energy."""
        known = self.validation.get(step.mode, {})
        low, high = known.get("low_percent"), known.get("high_percent")
        if step.unit != "ms" or low is None or high is None:
            return None
        return Interval(value, value * (1 + low / 100), value * (1 + high / 100))

    def model_interval(self, a: Architecture, step: Step) -> Interval | None:
        """`model_cost` with its error bar. Raises InputError."""
        return self.interval(self.model_cost(a, step), step)

    def cache_positions(self, step: Step, max_positions: int) -> int:
        """Where on the axis of lengths a layer stands: a prompt's tokens, or the cache_positions of the cache that are read."""
        bucket = self.header.get("cache_buckets")
        if step.mode == "prefill" or bucket is None:
            return step.length
        while 0 < bucket < step.length:
            bucket *= 2
        return min(bucket or max_positions, max_positions)

    def check_family(self, a: Architecture) -> None:
        """Raise InputError when the table was measured with another kind of layer than `a`'s."""
        mine = self.header["family"]
        for name in FAMILY:
            if getattr(a, name) != mine[name]:
                raise InputError(f"{self.path} was measured with {name} {mine[name]}, not {getattr(a, name)}", AGAIN)

    def _ms_per_mb(self, step: Step) -> float:
        """What the piece says of bytes."""
        return self._face(step).ms_per_mb if step.fitted else 0.0

    def _cold_share(self, step: Step) -> float:
        return self._face(step).cold_share if step.fitted else 0.0

    def _face(self, step: Step) -> Piece:
        assert self.step_time is not None
        return self.step_time.pieces[step.piece]

    def gaps(self, what: str, ffn: str, step: Step, points: Sequence[Point]) -> list[str]:
        """What the table lacks to answer for all `points` of one grid: a line for each axis, [] where nothing."""
        return self._grids.gaps(what, ffn, step, self._cold_share(step), points)

    def axes(self, what: str, step: Step, ffn: str = "") -> list[list[float]]:
        """The values measured on each axis of a grid. Raises InputError where there is none."""
        return self._grids.axes(what, ffn, step)

    def ffns(self, step: Step) -> list[str]:
        """The FFN kinds that layers were measured with."""
        return self._grids.ffns(step)

    def _cost(self, what: str, ffn: str, step: Step, point: Point) -> float:
        return self._grids.cost(what, ffn, step, self._cold_share(step), point)

    @property
    def finished(self) -> bool:
        """Whether it was validated, and has no hole but where a shape could not be run."""
        return bool(self.validation) and (self._grids.complete or bool(self.failed))


def _reading_ms(ms_per_mb: float, byte_count: float) -> float:
    return rounded(ms_per_mb * byte_count / 1e6)


def _length(step: Step) -> tuple[int, ...]:
    """The first coordinate of what is no layer."""
    return () if step.mode == "decode" else (step.length,)
