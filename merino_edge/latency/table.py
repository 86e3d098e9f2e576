"""The latency table: what the parts of a model cost on one device, as measured, and their sums to whole models.

Between measured points costs are interpolated; outside them the table refuses. Every answer is a multiple of 2^-30 ms
or mJ, so that sums are exact in any order. So a search compares exactly the whole model's sum with a budget. The table
knows no clock, no device and no file: `merino_edge.jetson.profiler` measures, `merino_edge.latency.table_file` reads
and writes. Its entries:

| what | costs | measured over |
|---|---|---|
| layer | one more layer with its own weights | FFN kind, window, length, width, ffn_width / width, kv_heads |
| repeat | one more layer of a block that shares its weights; in a prefill the same as a layer | the same |
| width_change | a projection between two widths | before * after; in a prefill also length |
| end | what every step costs: overhead, embedding, final norm, head | vocab_size, embedding_width; the same |
| calibration | a whole model that the step-time model is fitted to | - |
| model | a held-out whole model, which checks the sums | - |
| found | a whole model that a search found with this table, which checks what searches find | - |
| public | a public model, as a whole | - |

Mode `decode` is one token. Its layers' length is the number of cache positions that a step reads: the positions in
use, or the smallest power-of-two multiple of `cache_buckets` that holds them (0: the whole context). Mode `prefill` is
`length` tokens into an empty cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.latency.drift import merge_repetitions
from merino_edge.latency.grids import MEASURE_IT, LatencyGrids
from merino_edge.latency.measurement import EMBEDDING_AND_HEAD, SHARED_LAYER, Measurement, Mode, Point, layer_point
from merino_edge.latency.step import Step
from merino_edge.latency.step_time import COLD, WARM, Piece, StepTimeModel, Sums, rounded, single
from merino_edge.latency.verdict import Verdict, judge

# The architecture's fields that one table holds constant.
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
# Fields that came later, with their defaults: a table without them was measured so.
LATER_FAMILY: dict[str, Any] = {"qk_norm": "none", "attention_cap": 0.0}


class Interval(NamedTuple):
    """A prediction and its error bar.

    Nine of ten held-out models lay within such bounds. Of an estimated table all published speeds did that nothing was
    fitted to.
    """

    value: float
    low: float
    high: float


def slower_percent(bias_percent: float) -> float:
    """How much slower than predicted models are whose predictions are off by `bias_percent` of the measured time."""
    return 100 * (100 / (100 + bias_percent) - 1) if bias_percent > -100 else float("inf")


def family(a: Architecture) -> dict[str, Any]:
    """The fields of `a` that one table holds constant (FAMILY)."""
    later = {name: getattr(a, name) for name, default in LATER_FAMILY.items() if getattr(a, name) != default}
    return {**{name: getattr(a, name) for name in FAMILY}, **later}


def unpriced(a: Architecture) -> str:
    """What layers of `a` have that no table measures; "" where they have nothing such."""
    if a.convolves:
        return "short convolutions"
    return "heads * head_dim other than its width" if any(b.heads * a.head_dim != b.width for b in a.blocks) else ""


@dataclass
class LatencyTable:
    """A loaded table."""

    path: Path
    header: dict[str, Any]
    lines: list[Measurement]  # as in the file: one for each repetition
    validation: dict[str, Any]  # {} while the table is unfinished
    sha256: str
    step_time: StepTimeModel | None = None  # of decode; None: the entries' sum as it is
    conditions: list[dict[str, Any]] = field(default_factory=list)  # clocks before, during and after
    verdict: Verdict | None = None  # as the file has it, else by the validation; None: estimated, or unfinished
    measurements: list[Measurement] = field(
        init=False, repr=False, compare=False
    )  # one for each entry, drift-corrected
    _grids: LatencyGrids = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        self.measurements = merge_repetitions(self.lines)
        self._grids = LatencyGrids(self.path, self.measurements, self.header.get("reference"))
        self.step_time = self.step_time or self._one_piece
        if self.verdict is None and self.validation and not self.estimated:
            self.verdict = judge(self.validation, self.conditions)

    @property
    def estimated(self) -> bool:
        """Whether it was computed from a board's data instead of measured."""
        return bool(self.header["estimated"])

    @property
    def precision(self) -> str:
        """The precision of the weights, as in `--precision`."""
        return str(self.header["precision"])

    @property
    def default_length(self) -> int:
        """The length [tokens] of a latency for which none is given."""
        return int(self.header["default_length"])

    @property
    def unstable(self) -> list[Measurement]:
        """The entries whose median is uncertain."""
        return [m for m in self.measurements if m.unstable]

    @property
    def failed(self) -> list[Measurement]:
        """The entries whose shape the backend could not run."""
        return [m for m in self.measurements if m.failed]

    @property
    def moved(self) -> list[str]:
        """The clocks, power modes and throttle counters that changed during the profile, a line each."""
        return list(dict.fromkeys(line for reading in self.conditions for line in reading.get("moved", ())))

    @property
    def warnings(self) -> list[str]:
        """What whoever uses this table must know, a line each: the verdict, unless it is good, and a transfer."""
        told = self.verdict is not None and not self.verdict.is_good
        lines = [f"the verdict on table {self.path.name} is {self.verdict}"] if told else []
        return [*lines, *([self.transferred] if self.transferred else [])]

    def winners_curse(self, mode: Mode) -> str:
        """A line on how much slower than predicted found models were; "" where none were measured."""
        figures = self.validation.get(mode, {}).get("found")
        if not figures:
            return ""
        slower = slower_percent(figures["bias_percent"])
        return (
            f"{figures['models']} models that searches found with table {self.path.name} were {abs(slower):.1f} % "
            f"{'slower' if slower > 0 else 'faster'} in {mode} than predicted; what is expected is corrected by that"
        )

    def expected(self, value: float, step: Step) -> float | None:
        """What a found model of a predicted `value` takes, as those that were measured did; None where none were."""
        figures = self.validation.get(step.mode, {}).get("found")
        slower = slower_percent(figures["bias_percent"]) if figures else math.inf
        return value * (1 + slower / 100) if step.unit == "ms" and math.isfinite(slower) else None

    @property
    def transferred(self) -> str:
        """A line that says by which table this one was filled up; "" where everything was measured."""
        source = self.header.get("transferred")
        if not source:
            return ""
        kind = f"{'estimated' if source['estimated'] else 'measured'} on {source['device']}"
        return (
            f"table {self.path.name} is transferred: {source['measured']} of its {source['entries']} entries were "
            f"measured here, the others follow from {source['from']} ({source['precision']}, {kind})"
        )

    # --- costs of parts, in the unit of the step, by the step's piece ---

    def layer_cost(self, a: Architecture, block: Block, step: Step, what: str = "layer") -> float:
        """One layer of `block`'s shape, or one that shares its weights (`what` SHARED_LAYER). Raises InputError."""
        length = self.cache_positions(step, a.max_positions)
        point = layer_point(length, block.width, block.heads, block.kv_heads, block.ffn_width)
        return self._grids.cost(what, a.ffn, step, self._cold_share(step), point, window=self._window(block, length))

    def _window(self, block: Block, length: int) -> int:
        """The window whose layers a block costs as. A window that hides nothing, or was not measured, costs as none."""
        return block.window if block.window < length and self._grids.has_window(block.window) else 0

    def block_cost(self, a: Architecture, block: Block, step: Step) -> float:
        """All layers of `block`, and its share of the piece's cost of bytes. Raises InputError."""
        first = self.layer_cost(a, block, step)
        read = 0.0
        if per_mb := self._ms_per_mb(step):
            length = self.cache_positions(step, a.max_positions)
            read = _reading_ms(per_mb, counts.block_step_bytes(a, block, self.precision, length))
        if block.shared and block.layers > 1:
            return read + first + (block.layers - 1) * self.layer_cost(a, block, step, SHARED_LAYER)
        return read + block.layers * first

    def width_change_cost(self, before: int, after: int, step: Step) -> float:
        """The projection between two widths; 0 where they are equal. Raises InputError."""
        if before == after:
            return 0.0
        cost = self._cost("width_change", "", step, (*_length(step), before * after))
        if per_mb := self._ms_per_mb(step):
            parameters = counts.width_projection_parameters(before, after)
            cost += _reading_ms(per_mb, parameters * counts.MATRIX_BYTES[self.precision])
        return cost

    def embedding_and_head_cost(self, a: Architecture, step: Step) -> float:
        """The part of a step that does not depend on the depth of `a`: embedding, head, overhead, and both projections.

        It includes the constant of the step-time model's piece, which may be negative. Raises InputError.
        """
        width, first, last = a.embedding_width, a.blocks[0].width, a.blocks[-1].width
        cost = self._cost(EMBEDDING_AND_HEAD, "", step, (*_length(step), a.vocab_size, width))
        # only the last position reaches the head, in prefill too
        out = step._replace(mode="decode")
        if per_mb := self._ms_per_mb(step):
            cost += _reading_ms(per_mb, counts.table_bytes(a, self.precision))
        if step.fitted:
            cost += rounded(self._face(step).offset_ms)
        return cost + self.width_change_cost(width, first, step) + self.width_change_cost(last, width, out)

    def sum_cost(self, a: Architecture, step: Step) -> float:
        """The sum over a whole model's parts. Raises InputError."""
        self.check_family(a)
        neighbours = itertools.pairwise(block.width for block in a.blocks)
        changes = sum(self.width_change_cost(before, after, step) for before, after in neighbours)
        return (
            self.embedding_and_head_cost(a, step) + changes + sum(self.block_cost(a, block, step) for block in a.blocks)
        )

    # --- whole models ---

    @property
    def _one_piece(self) -> StepTimeModel:
        """The step-time model where none was fitted."""
        return single(COLD if self._grids.only_cold else WARM)

    def with_step_time(self, step_time: StepTimeModel | None) -> LatencyTable:
        """The same entries by another model; `dataclasses.replace` would merge their repetitions again."""
        table = copy(self)
        table.step_time = step_time or self._one_piece
        return table

    def sums(self, a: Architecture, length: int) -> Sums:
        """The sums of a decode step from which the step-time model makes a time. Raises InputError."""
        step = Step("decode", length)
        warm, cold = (self.with_step_time(single(piece)).sum_cost(a, step) for piece in (WARM, COLD))
        return Sums(warm, cold, counts.step_bytes(a, self.precision, self.cache_positions(step, a.max_positions)) / 1e6)

    def alternatives(self, step: Step) -> tuple[tuple[Step, ...], ...]:
        """`step` by each piece: a model costs the min over alternatives of the max over their steps."""
        if not step.fitted or self.step_time is None:
            return ((step,),)
        return tuple(tuple(step._replace(piece=i) for i in indices) for indices in self.step_time.alternatives)

    def model_cost(self, a: Architecture, step: Step) -> float:
        """What a step of `a` costs. Raises InputError."""
        alternatives = self.alternatives(step)
        sums = {piece: self.sum_cost(a, piece) for piece in dict.fromkeys(itertools.chain(*alternatives))}
        return min(max(sums[piece] for piece in pieces) for pieces in alternatives)

    def model_ms(self, a: Architecture, mode: Mode, length: int | None = None) -> float:
        """`model_cost` in milliseconds, at the table's default length if none is given."""
        return self.model_cost(a, Step(mode, self.default_length if length is None else length))

    def interval(self, value: float, step: Step, *, found: bool = False) -> Interval | None:
        """A predicted `value` with its error bar; None for energy, and where no model was held out.

        `found`: of a model that a search found. A search prefers models for which the table errs low, so such models
        were measured apart. The bar then holds their errors and those of random models: ten optima are few and alike.
        """
        of_mode = self.validation.get(step.mode, {})
        bars = [of_mode, of_mode.get("found", {})] if found else [of_mode]
        both = [(bar.get("low_percent"), bar.get("high_percent")) for bar in bars]
        ends = [(low, high) for low, high in both if low is not None and high is not None]
        if step.unit != "ms" or not ends:
            return None
        low, high = min(low for low, _ in ends), max(high for _, high in ends)
        return Interval(value, value * (1 + low / 100), value * (1 + high / 100))

    def model_interval(self, a: Architecture, step: Step) -> Interval | None:
        """`model_cost` with its error bar. Raises InputError."""
        return self.interval(self.model_cost(a, step), step)

    def measured_cost(self, a: Architecture, step: Step) -> float | None:
        """What a step of the public model `a` took as a whole (`profile --also`); None where that was not measured.

        Between measured lengths it is interpolated.
        """
        costs: dict[int, float] = {}
        for m in self.measurements:
            if m.what == "public" and m.mode == step.mode and not m.failed:
                measured = Architecture.from_dict(m.shape["architecture"])
                value = m.median_ms if step.unit == "ms" else m.energy_mj
                if value is not None and measured == replace(a, max_positions=measured.max_positions):
                    costs[m.length] = value
        if not costs or not min(costs) <= step.length <= max(costs):
            return None
        lengths = sorted(costs)
        return float(np.interp(step.length, lengths, [costs[length] for length in lengths]))

    def cache_positions(self, step: Step, max_positions: int) -> int:
        """A layer's length on its grid: the cache positions that a decode step reads, or the tokens of a prompt."""
        bucket = self.header.get("cache_buckets")
        if step.mode == "prefill" or bucket is None:
            return step.length
        while 0 < bucket < step.length:
            bucket *= 2
        return min(bucket or max_positions, max_positions)

    def check_family(self, a: Architecture) -> None:
        """Raise InputError where the table was measured with another kind of layer than `a`'s."""
        for name in (*FAMILY, *LATER_FAMILY):
            wanted, measured = getattr(a, name), self.header["family"].get(name, LATER_FAMILY.get(name))
            same = bool(wanted) == bool(measured) if name == "attention_cap" else wanted == measured
            if not same:
                raise InputError(f"{self.path} was measured with {name} {measured}, not {wanted}", MEASURE_IT)
        if odd := unpriced(a):
            raise InputError(f"{self.path} knows no layer with {odd}", "see: merino-edge estimate")

    def _ms_per_mb(self, step: Step) -> float:
        """The cost of a megabyte by the step's piece."""
        return self._face(step).ms_per_mb if step.fitted else 0.0

    def _cold_share(self, step: Step) -> float:
        return self._face(step).cold_share if step.fitted else 0.0

    def _face(self, step: Step) -> Piece:
        assert self.step_time is not None
        return self.step_time.pieces[step.piece]

    def gaps(self, what: str, ffn: str, step: Step, points: Sequence[Point], window: int = 0) -> list[str]:
        """What one grid lacks to cover all `points`: a line for each axis, [] where it lacks nothing."""
        return self._grids.gaps(what, ffn, step, self._cold_share(step), points, window=window)

    def axes(self, what: str, step: Step, ffn: str = "") -> list[list[float]]:
        """The values measured on each axis of a grid. Raises InputError where the table has no such grid."""
        return self._grids.axes(what, ffn, step)

    def ffns(self, step: Step) -> list[str]:
        """The FFN kinds that layers were measured with."""
        return self._grids.ffns(step)

    def _cost(self, what: str, ffn: str, step: Step, point: Point) -> float:
        return self._grids.cost(what, ffn, step, self._cold_share(step), point)

    @property
    def finished(self) -> bool:
        """Whether it was validated and has no hole, except where a shape could not be run."""
        return bool(self.validation) and (self._grids.complete or bool(self.failed))


def _reading_ms(ms_per_mb: float, byte_count: float) -> float:
    return rounded(ms_per_mb * byte_count / 1e6)


def _length(step: Step) -> tuple[int, ...]:
    """The first coordinate of entries that are no layers: none in decode."""
    return () if step.mode == "decode" else (step.length,)
