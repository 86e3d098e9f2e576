"""What architectures cost in each metric: `Prices` takes a metric apart into what blocks, width changes and ends add.

Every part is a number of the metric's units (bytes, counts, ms), and sums of them are exact: counts are whole, bytes
multiples of an eighth, latencies multiples of 2^-30 (merino_edge.latency.table). So adding parts in any order gives
the same as the whole architecture's count, and no rounding can admit or exclude an architecture wrongly. Two metrics
are more than a sum: peak memory is weights and cache, plus the largest layer's activations; a latency is the least over
alternatives of the greatest of several sums (merino_edge.latency.step_time), since caches hold a small model and not a large one.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol

from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.latency.measurement import Mode, Point, layer_point
from merino_edge.latency.step import Step
from merino_edge.search.budget import Metric
from merino_edge.search.space import Space, Vocabulary

FLOPS_SEQUENCE = 1024
DEFAULT_TOKENS = 256  # run at once, for peak_mb; and the length of latencies where no table says
TEXT_BYTES = 100  # that text_ms is for


class Table(Protocol):
    """What a search needs of a latency table."""

    @property
    def path(self) -> object: ...
    @property
    def precision(self) -> str: ...
    @property
    def default_length(self) -> int: ...
    def check_family(self, a: Architecture) -> None: ...
    def alternatives(self, step: Step) -> tuple[tuple[Step, ...], ...]: ...
    def cache_positions(self, step: Step, max_positions: int) -> int: ...
    def block_cost(self, a: Architecture, block: Block, step: Step) -> float: ...
    def width_change_cost(self, before: int, after: int, step: Step) -> float: ...
    def embedding_and_head_cost(self, a: Architecture, step: Step) -> float: ...
    def gaps(self, what: str, ffn: str, step: Step, points: Sequence[Point]) -> list[str]: ...
    def interval(self, value: float, step: Step) -> tuple[float, float, float] | None: ...  # value, low, high


@dataclass(frozen=True)
class AdditiveCost:
    """A sum over the parts of models of one vocabulary, in units."""

    block: Callable[[Architecture, Block], float]
    change: Callable[[int, int], float]
    end: Callable[[Architecture], float]  # depends on the outer widths alone, and is a sum over them
    # Of these only the largest counts.
    activation: Callable[[Architecture, Block], float] | None = None
    end_activation: Callable[[Architecture], float] | None = None

    def units(self, a: Architecture) -> float:
        """Of a whole architecture."""
        changes = (self.change(x.width, y.width) for x, y in itertools.pairwise(a.blocks))
        total = self.end(a) + sum(changes) + sum(self.block(a, block) for block in a.blocks)
        if self.activation is not None and self.end_activation is not None:
            total += max(self.end_activation(a), *(self.activation(a, block) for block in a.blocks))
        return total


@dataclass(frozen=True)
class MetricCost:
    """One metric over models of one vocabulary: the least over `alternatives` of the greatest of their sums. `scale`
    units are one of the metric."""

    alternatives: tuple[tuple[AdditiveCost, ...], ...]
    scale: float = 1.0

    @property
    def sums(self) -> list[AdditiveCost]:
        """Each once."""
        return list(dict.fromkeys(itertools.chain(*self.alternatives)))

    def value(self, a: Architecture) -> float:
        """The whole architecture's cost, in the metric."""
        units = {each: each.units(a) for each in self.sums}
        return min(max(units[each] for each in sums) for sums in self.alternatives) / self.scale


def unit_limit(limit: float, scale: float) -> float:
    """The largest number of units whose value, units / scale, is at most `limit`."""
    units = limit * scale
    while units / scale > limit:
        units = math.nextafter(units, 0)
    while math.nextafter(units, math.inf) / scale <= limit:
        units = math.nextafter(units, math.inf)
    return units


@dataclass(frozen=True)
class CostModel:
    """Raises InputError on an unknown precision, or a table of another."""

    precision: str
    table: Table | None = None

    def __post_init__(self) -> None:
        counts.check_precision(self.precision)
        if self.table is not None and self.table.precision != self.precision:
            raise InputError(
                f"{self.table.path} was measured in {self.table.precision}, not {self.precision}",
                f"measure it in {self.precision}, or leave --precision out",
            )

    def resolve(self, metric: Metric, space: Space) -> Metric:
        """`metric` with what it is at, where that was left open. Raises InputError for a latency without a table."""
        if metric.kind.latency and self.table is None:
            hint = "run: merino-edge profile --out T.jsonl, then add --table T.jsonl"
            raise InputError(f"{metric.kind.option} needs a latency table", hint)
        if metric.at is not None or metric.kind.at == "" or metric.name == "kv_mb":
            return metric
        if metric.kind.at == "precision":
            return dataclasses.replace(metric, at=self.precision)
        usual = DEFAULT_TOKENS if self.table is None else self.table.default_length
        tokens = min(usual, space.contexts[0])
        if metric.kind.at == "prompt bytes":  # of as many tokens, where a token is shortest
            tokens = int(tokens * min(_bytes_per_token(metric, vocabulary) for vocabulary in space.vocabularies))
        return dataclasses.replace(metric, at=max(1, tokens))

    def metric_cost(self, metric: Metric, vocabulary: Vocabulary) -> MetricCost:
        """Raises InputError where the vocabulary does not say how many bytes a token stands for, and is asked."""
        if metric.kind.latency:
            return self._latency_parts(metric, vocabulary)
        element_bytes = counts.cache_element_bytes(self.precision)
        if metric.name == "parameters":
            units = AdditiveCost(counts.block_parameters, counts.width_projection_parameters, counts.end_parameters)
        elif metric.name == "flops":
            units = AdditiveCost(
                lambda a, block: counts.block_flops(a, block, FLOPS_SEQUENCE),
                lambda before, after: 2 * FLOPS_SEQUENCE * counts.width_projection_parameters(before, after),
                lambda a: 0,
            )
        elif metric.name == "weight_mb":
            units = _weights(str(metric.at))
        elif metric.name == "kv_mb":
            positions = metric.at
            units = AdditiveCost(
                lambda a, block: counts.block_kv_bytes(a, block, int(positions or a.max_positions), element_bytes),
                lambda before, after: 0,
                lambda a: 0,
            )
        else:
            weights, tokens = _weights(self.precision), int(metric.at or DEFAULT_TOKENS)
            units = dataclasses.replace(
                weights,
                block=lambda a, block: (
                    weights.block(a, block) + counts.block_kv_bytes(a, block, a.max_positions, element_bytes)
                ),
                activation=lambda a, block: counts.layer_activation_bytes(a, block, tokens),
                end_activation=lambda a: counts.end_activation_bytes(a, tokens),
            )
        return MetricCost(((units,),), 1e6 if metric.name.endswith("_mb") else 1.0)

    def _latency_parts(self, metric: Metric, vocabulary: Vocabulary) -> MetricCost:
        table = self.table
        assert table is not None

        def units(step: Step) -> AdditiveCost:
            return AdditiveCost(
                lambda a, block: table.block_cost(a, block, step),
                lambda before, after: table.width_change_cost(before, after, step),
                lambda a: table.embedding_and_head_cost(a, step),
            )

        alternatives = table.alternatives(self.step(metric, vocabulary))
        sums = {step: units(step) for step in itertools.chain(*alternatives)}
        return MetricCost(
            tuple(tuple(sums[step] for step in steps) for steps in alternatives),
            _bytes_per_token(metric, vocabulary) / TEXT_BYTES if metric.name == "text_ms" else 1.0,
        )

    def positions(self, metric: Metric, vocabulary: Vocabulary) -> int:
        """How many positions a model must have for `metric` to mean anything."""
        if metric.name == "first_token_ms":
            return self.step(metric, vocabulary).length
        return metric.at if isinstance(metric.at, int) else 1

    def step(self, metric: Metric, vocabulary: Vocabulary) -> Step:
        """What a latency metric asks of the table."""
        at = int(metric.at or 0)
        if metric.name == "first_token_ms":
            return Step("prefill", math.ceil(at / _bytes_per_token(metric, vocabulary)))
        mode: Mode = "prefill" if metric.name == "prefill_ms" else "decode"
        return Step(mode, at, "mj" if metric.name == "energy_mj" else "ms")

    def check_coverage(self, space: Space, templates: Iterable[int], metrics: Iterable[Metric]) -> None:
        """Raise InputError, naming what the table lacks and the command that adds it, where a latency in `metrics`
        cannot be answered for every architecture of `space` in these frames."""
        asked = [metric for metric in metrics if metric.kind.latency]
        if self.table is None or not asked:
            return
        for model in space.models:
            self.table.check_family(model)
        chosen = [space.templates[template] for template in templates]
        vocabularies = {template.vocabulary for template in chosen}
        for metric, vocabulary in itertools.product(asked, vocabularies):
            self.metric_cost(metric, vocabulary)  # which says if a token's length is missing
        steps = sorted({self.step(metric, vocabulary) for metric in asked for vocabulary in vocabularies})
        gaps: dict[str, None] = {}  # in order, each once
        needed: set[int] = set()
        for step in steps:
            places = {self.table.cache_positions(step, template.context) for template in chosen}
            if found := self._gaps(space, step, places):
                gaps |= dict.fromkeys(found)
                needed |= places
        if gaps:
            lines = list(gaps)
            more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
            lengths = ",".join(str(n) for n in sorted({min(needed), max(needed)}))  # the table answers between
            raise InputError(
                f"{self.table.path} does not cover space {space.name}: {'; '.join(lines[:3])}{more}",
                f"add it: merino-edge profile --continue --space {space.origin or space.name} --lengths {lengths} "
                f"--out {self.table.path}",
            )

    def _gaps(self, space: Space, step: Step, places: Iterable[int]) -> list[str]:
        assert self.table is not None
        used = sorted({w for template in range(len(space.templates)) for w in space.width_range(template)})
        choices = [g for w in used for g in space.block_choices[space.first_choice[w] : space.first_choice[w + 1]]]
        shapes = {(g.width, g.heads, g.kv_heads, g.ffn_width) for g in choices}
        layers = [layer_point(at, *shape) for at in places for shape in shapes]
        length = () if step.mode == "decode" else (step.length,)  # which only the layers of a decode step depend on
        changes = [(*length, x * y) for x, y in space.projections]
        ends = [(*length, v.size, e) for v in space.vocabularies for e in space.embedding_widths]
        gaps = []
        for piece in itertools.chain(*self.table.alternatives(step)):
            for ffn in space.ffn:
                gaps += self.table.gaps("layer", ffn, piece, layers)
                if any(choice.shared and choice.layers > 1 for choice in choices):
                    gaps += self.table.gaps("repeat", ffn, piece, layers)
            gaps += self.table.gaps("width_change", "", piece, changes) if changes else []
            gaps += self.table.gaps("end", "", piece, ends)
        return gaps


def _weights(precision: str) -> AdditiveCost:
    matrix_bytes = counts.MATRIX_BYTES[precision]
    return AdditiveCost(
        lambda a, block: counts.block_weight_bytes(a, block, precision),
        lambda before, after: counts.width_projection_parameters(before, after) * matrix_bytes,
        lambda a: counts.end_weight_bytes(a, precision),
    )


def _bytes_per_token(metric: Metric, vocabulary: Vocabulary) -> float:
    if vocabulary.bytes_per_token is None:
        raise InputError(
            f"{metric.kind.option} needs to know how many bytes a token of {vocabulary.size} stands for",
            "add bytes_per_token to the vocabulary in the space file",
        )
    return vocabulary.bytes_per_token
