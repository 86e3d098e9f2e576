"""What an architecture costs in each metric: `CostModel` splits a metric into parts that add up.

A metric is a sum over blocks, width projections, and embedding with head. Every part is in the metric's units (bytes,
counts, ms), and sums of them are exact. Counts are whole numbers, bytes are multiples of 1/8, and latencies are
multiples of 2^-30 (`merino_edge.latency.table`). So parts add up to the whole architecture's count in any order, and
rounding cannot admit or exclude an architecture wrongly.

A block may have a precision of its own. Then its weights count in that precision, and its times come from the table of
that precision (`merino_edge.latency.beside`). Everything else has the precision of the search.

Two metrics are more than a sum. Peak memory adds the largest layer's activations to weights and cache. A latency is a
minimum over alternatives of a maximum of several sums (`merino_edge.latency.step_time`). The reason is that a hardware
cache may hold the weights of a small model but not of a large one. This module knows no budget and no score.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol

from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.latency.beside import beside
from merino_edge.latency.measurement import Mode, Point, layer_point
from merino_edge.latency.step import Step
from merino_edge.latency.table import LatencyTable
from merino_edge.search.additive_cost import AdditiveCost, MetricCost
from merino_edge.search.budget import Metric
from merino_edge.search.peak_memory import peak_sums, weights
from merino_edge.search.space import Space, Vocabulary
from merino_edge.storage import INT4_BLOCK, rules_of, stored_as

FLOPS_SEQUENCE = 1024
DEFAULT_TOKENS = 256  # tokens run at once, for peak_mb; also the length of latencies without a table
TEXT_BYTES = 100  # bytes of text that text_ms counts


class Table(Protocol):
    """The part of a latency table that a search uses; `merino_edge.latency.table.LatencyTable` has all of it."""

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
    def gaps(self, what: str, ffn: str, step: Step, points: Sequence[Point], window: int = ...) -> list[str]: ...
    def interval(self, value: float, step: Step, *, found: bool = ...) -> tuple[float, float, float] | None: ...
    def expected(self, value: float, step: Step) -> float | None: ...


@dataclass(frozen=True)
class CostModel:
    """What architectures cost at one weight precision, with an optional latency table.

    `target`: the target of export whose bundle is counted; None: weights as for `onnxruntime`, cache as a GPU's.
    `more_tables`: of the other precisions that blocks may have, measured like `table`.
    Raises InputError for an unknown precision, for a table of another precision, and where two tables do not go
    together. Raises UnsupportedError for a target that there is not, or that cannot run the precision.
    """

    precision: str
    table: Table | None = None
    target: str | None = None
    more_tables: tuple[LatencyTable, ...] = ()

    def __post_init__(self) -> None:
        stored_as(self.precision, self.target)
        if self.table is not None and self.table.precision != self.precision:
            raise InputError(
                f"{self.table.path} was measured in {self.table.precision}, not {self.precision}",
                f"measure it in {self.precision}, or leave --precision out",
            )
        if self.more_tables and self.table is None:
            raise _no_table(self.precision)
        assert self._tables is not None  # which checks that the tables go together

    @cached_property
    def _tables(self) -> dict[str, Table]:
        """The tables by precision, by the step-time model of `table`. Raises InputError for two of one precision."""
        tables: dict[str, Table] = {} if self.table is None else {self.precision: self.table}
        for table in self.more_tables:
            if table.precision in tables:
                raise InputError(f"{table.path} is a second table of {table.precision}", "give one for each precision")
            assert isinstance(self.table, LatencyTable)
            tables[table.precision] = beside(self.table, table)
        return tables

    def table_of(self, precision: str | None) -> Table:
        """The table that times blocks of this precision; None: of the search's. Raises InputError without one."""
        name = self.precision if precision is None else precision
        if name not in self._tables:
            raise _no_table(name)
        return self._tables[name]

    def resolve(self, metric: Metric, space: Space) -> Metric:
        """`metric` with the default after its @, if it has none.

        Raises InputError for a latency without a table, UnsupportedError for a precision that the target cannot run.
        """
        if metric.kind.latency and self.table is None:
            hint = "run: merino-edge profile --out T.jsonl, then add --table T.jsonl"
            raise InputError(f"{metric.kind.option} needs a latency table", hint)
        if metric.kind.at == "precision" and metric.at is not None:
            stored_as(str(metric.at), self.target)
        if metric.at is not None or metric.kind.at == "" or metric.name == "kv_mb":
            return metric
        if metric.kind.at == "precision":
            return dataclasses.replace(metric, at=self.precision)
        usual = DEFAULT_TOKENS if self.table is None else self.table.default_length
        tokens = min(usual, space.contexts[0])
        if metric.kind.at == "prompt bytes":  # as many bytes as the shortest tokens of the space make
            tokens = int(tokens * min(_bytes_per_token(metric, vocabulary) for vocabulary in space.vocabularies))
        return dataclasses.replace(metric, at=max(1, tokens))

    def metric_cost(self, metric: Metric, vocabulary: Vocabulary) -> MetricCost:
        """`metric` for models of one vocabulary. Raises InputError if the bytes per token are needed but unknown."""
        if metric.kind.latency:
            return self._latency_parts(metric, vocabulary)
        element_bytes = counts.cache_element_bytes(self.precision, self.target)
        if metric.name == "parameters":
            units = AdditiveCost(
                lambda a, block, own: counts.block_parameters(a, block),
                counts.width_projection_parameters,
                counts.end_parameters,
            )
        elif metric.name == "flops":
            units = AdditiveCost(
                lambda a, block, own: counts.block_flops(a, block, FLOPS_SEQUENCE),
                lambda before, after: 2 * FLOPS_SEQUENCE * counts.width_projection_parameters(before, after),
                lambda a: 0,
            )
        elif metric.name == "weight_mb":
            units = weights(str(metric.at), self.target)
        elif metric.name == "kv_mb":

            def kept(a: Architecture, block: Block) -> int:
                return counts.kept_positions(block, int(metric.at or a.max_positions), self.target)

            units = AdditiveCost(
                lambda a, block, own: counts.block_kv_bytes(a, block, kept(a, block), element_bytes),
                lambda before, after: 0,
                lambda a: 0,
            )
        elif metric.name == "peak_mb":
            return MetricCost((peak_sums(self.precision, self.target, int(metric.at or DEFAULT_TOKENS)),), 1e6)
        else:
            raise ValueError(f"metric {metric.name} has no sum here")
        return MetricCost(((units,),), 1e6 if metric.name.endswith("_mb") else 1.0)

    def _latency_parts(self, metric: Metric, vocabulary: Vocabulary) -> MetricCost:
        table = self.table
        assert table is not None

        def units(step: Step) -> AdditiveCost:
            return AdditiveCost(
                lambda a, block, own: self.table_of(own).block_cost(a, block, step),
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
        """How many positions a model needs so that `metric` is defined for it."""
        if metric.name == "first_token_ms":
            return self.step(metric, vocabulary).length
        return metric.at if isinstance(metric.at, int) else 1

    def step(self, metric: Metric, vocabulary: Vocabulary) -> Step:
        """The latency query that answers a latency metric."""
        at = int(metric.at or 0)
        if metric.name == "first_token_ms":
            return Step("prefill", math.ceil(at / _bytes_per_token(metric, vocabulary)))
        mode: Mode = "prefill" if metric.name == "prefill_ms" else "decode"
        return Step(mode, at, "mj" if metric.name == "energy_mj" else "ms")

    def check_blocks(self, space: Space, metrics: Iterable[Metric]) -> None:
        """Raise UnsupportedError where the target stores a precision in blocks that do not divide every matrix."""
        precisions = {self.precision, *(str(m.at) for m in metrics if m.kind.at == "precision")}
        precisions |= {precision.name for precision in space.precisions}
        blocked = [p for p in sorted(precisions) if self.target and stored_as(p, self.target).needs_blocks]
        inputs = {*space.widths, *space.embedding_widths, *(block.ffn_width for block in space.block_choices)}
        odd = sorted(size for size in inputs if size % INT4_BLOCK)
        if blocked and odd:
            raise UnsupportedError(
                f"{self.target} stores {blocked[0]} in blocks of {INT4_BLOCK} inputs, and a matrix of space "
                f"{space.name} has {odd[0]}",
                "leave it out of the space, or choose --precision fp16",
            )

    def check_precisions(self, space: Space) -> None:
        """Check that blocks can have the precisions that are open, and that they use every table.

        Raises UnsupportedError where the target cannot store one, InputError where a table is for none of them.
        """
        names = [precision.name for precision in space.precisions]
        for name in names:
            stored_as(name, self.target)
            if self.target and rules_of(self.target).half and (name == "fp32") != (self.precision == "fp32"):
                raise UnsupportedError(
                    f"{self.target} computes in float16 except at fp32, so blocks of {name} do not go with "
                    f"{self.precision}",
                    "choose among fp16, int8 and int4, or fp32 for all",
                )
        for table in self.more_tables:
            if table.precision not in names:
                raise InputError(
                    f"{table.path} was measured in {table.precision}, which no block of space {space.name} may have",
                    f"leave it out, or add: --bits {','.join((*names, table.precision))}",
                )

    def check_coverage(self, space: Space, templates: Iterable[int], metrics: Iterable[Metric]) -> None:
        """Check that the table answers every latency in `metrics` for every architecture of `space` in `templates`.

        Raises InputError that names what the table lacks and the command that adds it.
        """
        latencies = [metric for metric in metrics if metric.kind.latency]
        if self.table is None or not latencies:
            return
        for model in space.models:
            self.table.check_family(model)
        used_templates = [space.templates[template] for template in templates]
        vocabularies = {template.vocabulary for template in used_templates}
        for metric, vocabulary in itertools.product(latencies, vocabularies):
            self.metric_cost(metric, vocabulary)  # raises if the bytes per token are missing
        steps = sorted({self.step(metric, vocabulary) for metric in latencies for vocabulary in vocabularies})
        of_blocks = [precision.name for precision in space.precisions] or [self.precision]
        for name in dict.fromkeys((self.precision, *of_blocks)):
            table = self.table_of(name)
            gaps: dict[str, None] = {}  # an ordered set
            needed: set[int] = set()
            for step in steps:
                capacities = {table.cache_positions(step, template.context) for template in used_templates}
                missing = self._other_gaps(space, step) if name == self.precision else []
                if missing := (_layer_gaps(table, space, step, capacities) if name in of_blocks else []) + missing:
                    gaps |= dict.fromkeys(missing)
                    needed |= capacities
            if gaps:
                lines = list(gaps)
                more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
                lengths = ",".join(str(n) for n in sorted({min(needed), max(needed)}))  # the table answers between
                raise InputError(
                    f"{table.path} does not cover space {space.name}: {'; '.join(lines[:3])}{more}",
                    f"add it: merino-edge profile --continue --space {space.origin or space.name} --lengths {lengths} "
                    f"--out {table.path}",
                )

    def _other_gaps(self, space: Space, step: Step) -> list[str]:
        """What the table lacks of everything but layers."""
        assert self.table is not None
        length = () if step.mode == "decode" else (step.length,)  # in a decode step only the layers depend on it
        changes = [(*length, x * y) for x, y in space.projections]
        ends = [(*length, v.size, e) for v in space.vocabularies for e in space.embedding_widths]
        gaps = []
        for piece in itertools.chain(*self.table.alternatives(step)):
            gaps += self.table.gaps("width_change", "", piece, changes) if changes else []
            gaps += self.table.gaps("end", "", piece, ends)
        return gaps


def _layer_gaps(table: Table, space: Space, step: Step, capacities: Iterable[int]) -> list[str]:
    """What the table lacks of the layers of all blocks."""
    widths = sorted({w for template in range(len(space.templates)) for w in space.width_range(template)})
    choices = [g for w in widths for g in space.block_choices[space.first_choice[w] : space.first_choice[w + 1]]]
    shapes = {(g.width, g.heads, g.kv_heads, g.ffn_width) for g in choices}
    kinds = ["layer", *(["repeat"] if any(choice.shared and choice.layers > 1 for choice in choices) else [])]
    gaps = []
    costing_as: dict[int, set[int]] = {}  # lengths by window; one that hides nothing costs as none
    for window, at in itertools.product(space.windows, capacities):
        costing_as.setdefault(window if window < at else 0, set()).add(at)
    of_kinds = itertools.product(itertools.chain(*table.alternatives(step)), space.ffn, kinds, costing_as.items())
    for piece, ffn, kind, (window, lengths) in of_kinds:
        points = [layer_point(at, *shape) for at in lengths for shape in shapes]
        gaps += table.gaps(kind, ffn, piece, points, window)
    return gaps


def _no_table(precision: str) -> InputError:
    hint = f"measure it: merino-edge profile --precision {precision} --out T.jsonl, then add --table T.jsonl"
    return InputError(f"no table has times of {precision}", hint)


def _bytes_per_token(metric: Metric, vocabulary: Vocabulary) -> float:
    if vocabulary.bytes_per_token is None:
        raise InputError(
            f"{metric.kind.option} needs to know how many bytes a token of {vocabulary.size} stands for",
            "add bytes_per_token to the vocabulary in the space file",
        )
    return vocabulary.bytes_per_token
