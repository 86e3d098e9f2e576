"""The mathematical program (paper section 6): a space, a budget and a score, as arrays that a solver adds up.

`Problem` says which frames can meet the budget's lengths at all, and gives each as `FrameProgram`s: a cost vector per
gene, width change, first width and last width, and the limits, all in the metrics' exact units
(merino_edge.search.costs). A metric that is the least over alternatives of the greatest of several sums has a column
for each sum, and the frame a program for each alternative: an architecture is within the budgets if it is within all
limits of one of them. `Problem` judges whole genomes for the evolution, for enumeration and for reports. It solves
nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.costs import Parts, Prices, Sum, unit_limit
from merino_edge.search.score import Score
from merino_edge.search.space import Genome, Space

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class FrameProgram:
    """One frame's costs in units, by one alternative of every metric: K sums, G genes, W widths (all of the space's;
    `widths` are those allowed).

    A chain costs start[first] + sum of genes + sum of changes[before, after] + finish[last]; its activations are the
    largest of its genes' and `end_activation`, and count towards sum `peak` (-1: none).
    """

    frame: int
    widths: range
    genes: Floats  # [G, K]
    changes: Floats  # [W, W, K]: from, to
    start: Floats  # [W, K]
    finish: Floats  # [W, K]
    limits: Floats  # [K]
    scales: Floats  # [K]: units per metric
    metrics: tuple[int, ...]  # [K]: which of the budget's each is a sum of
    peak: int
    activations: Floats  # [G]
    end_activation: float

    def units(self, genes: tuple[int, ...], widths: list[int]) -> Floats:
        """The cost [K] of a chain of genes with these width indices."""
        total = self.start[widths[0]] + self.finish[widths[-1]] + self.genes[list(genes)].sum(0)
        total = total + self.changes[widths[:-1], widths[1:]].sum(0)
        if self.peak >= 0:
            total[self.peak] += max(self.end_activation, float(self.activations[list(genes)].max()))
        return np.asarray(total)

    def within(self, genes: tuple[int, ...], widths: list[int]) -> bool:
        """Whether every sum of a chain is at most its limit."""
        return bool((self.units(genes, widths) <= self.limits).all())


class Problem:
    """Raises InputError where a latency is budgeted that no table, or not this one, can answer.

    `shared`: a problem of the same space and prices, whose tables of costs this one may use.
    """

    def __init__(
        self, space: Space, budget: Budget, score: Score, prices: Prices, shared: Problem | None = None
    ) -> None:
        limits = tuple((prices.resolve(metric, space), limit) for metric, limit in budget.limits)
        self.space, self.score, self.prices = space, score, prices
        self.budget = Budget(limits)  # with every metric resolved
        self._programs: dict[int, list[FrameProgram]] = {}
        self._genes: dict[tuple[object, ...], tuple[list[Floats], Floats]] = {} if shared is None else shared._genes
        self.frames = self._frames()
        if shared is None or not set(self.budget.metrics) <= set(shared.budget.metrics):
            prices.check_coverage(space, self.frames, self.budget.metrics)

    def limited(self, budget: Budget, score: Score | None = None) -> Problem:
        """The same question with other limits, or another score."""
        return Problem(self.space, budget, score or self.score, self.prices, self)

    def _frames(self) -> list[int]:
        """The frames whose context is as long as every budget asks. Raises InputError where there is none."""
        found = list(range(len(self.space.frames)))
        for metric in self.budget.metrics:
            needed = {i: self.prices.positions(metric, self.space.frames[i].vocabulary) for i in found}
            found = [i for i in found if self.space.frames[i].context >= needed[i]]
            if not found:
                raise InputError(
                    f"{metric.key} needs {min(needed.values())} positions, but space {self.space.name} has contexts up "
                    f"to {self.space.contexts[-1]}",
                    "ask for less, or add a context to the space",
                )
        return found

    # --- one frame ---

    def programs(self, frame: int) -> list[FrameProgram]:
        """One for each combination of the metrics' alternatives, all with the same frame and metrics."""
        if frame not in self._programs:
            self._programs[frame] = self._frame_programs(frame)
        return self._programs[frame]

    def parts(self, metric: Metric, frame: int) -> Parts:
        return self.prices.parts(metric, self.space.frames[frame].vocabulary)

    def _frame_programs(self, frame: int) -> list[FrameProgram]:
        space, model = self.space, self.space.models[frame]
        parts = [self.parts(metric, frame) for metric in self.budget.metrics]
        sums = [each for part in parts for each in part.sums]
        widths = space.width_range(frame)
        count, low, high = len(space.widths), widths[0], widths[-1]
        changes, start, finish = (np.zeros((*shape, len(sums))) for shape in ((count, count), (count,), (count,)))
        blocks = {w: space.genes[space.first_gene[w]] for w in widths}

        def end(each: Sum, first: int, last: int) -> float:
            return each.end(dataclasses.replace(model, blocks=(blocks[first], blocks[last])))

        for k, each in enumerate(sums):
            for w in widths:
                start[w, k] = end(each, w, high)
                finish[w, k] = end(each, low, w) - end(each, low, high)
                for after in range(w + 1, high + 1):
                    changes[w, after, k] = each.change(space.widths[w], space.widths[after])
        limits = [unit_limit(limit, part.scale) for (_, limit), part in zip(self.budget.limits, parts, strict=True)]
        peak = next((k for k, each in enumerate(sums) if each.activation), -1)
        end_activation = sums[peak].end_activation if peak >= 0 else None
        chosen = [_columns(sums, alternatives) for alternatives in itertools.product(*(p.alternatives for p in parts))]
        genes, activations = self._gene_costs(frame, sums, peak, [columns for columns, _ in chosen])
        return [
            FrameProgram(
                frame, widths, costs, changes.take(columns, -1), start.take(columns, -1), finish.take(columns, -1),
                np.array([limits[k] for k in metrics]), np.array([parts[k].scale for k in metrics]), tuple(metrics),
                columns.index(peak) if peak >= 0 else -1, activations, end_activation(model) if end_activation else 0.0,
            )
            for costs, (columns, metrics) in zip(genes, chosen, strict=True)
        ]  # fmt: skip

    def _gene_costs(
        self, frame: int, sums: list[Sum], peak: int, chosen: list[list[int]]
    ) -> tuple[list[Floats], Floats]:
        """[G, K] of each program, whose sums are `chosen`, and [G]; the same for frames that differ only in what blocks
        do not see."""
        space, model, shape = self.space, self.space.models[frame], self.space.frames[frame]
        per_text = any(metric.kind.at == "prompt bytes" for metric in self.budget.metrics)
        key = (self.budget.metrics, shape.ffn, shape.context, space.width_range(frame), per_text and shape.vocabulary)
        if key not in self._genes:
            costs = np.full((len(space.genes), len(sums)), np.inf)
            activations = np.zeros(len(space.genes))
            activation = sums[peak].activation if peak >= 0 else None
            widths = space.width_range(frame)
            for g in range(space.first_gene[widths.start], space.first_gene[widths.stop]):
                block = space.genes[g]
                costs[g] = [each.block(model, block) for each in sums]
                if activation:
                    activations[g] = activation(model, block)
            self._genes[key] = [costs.take(columns, -1) for columns in chosen], activations
        return self._genes[key]

    # --- whole genomes ---

    def total(self, genome: Genome) -> float:
        """The score."""
        return self.score.total(self.space.architecture(genome))

    def feasible(self, genome: Genome) -> bool:
        widths = [self.space.width_of[gene] for gene in genome.genes]
        return any(program.within(genome.genes, widths) for program in self.programs(genome.frame))

    def costs(self, genome: Genome) -> dict[str, float]:
        """What is reported of an architecture: every metric that can be answered, and the budgeted ones."""
        usual = [Metric("parameters"), Metric("flops"), Metric("weight_mb"), Metric("kv_mb"), Metric("peak_mb")]
        if self.prices.table is not None:
            usual += [Metric("decode_ms"), Metric("prefill_ms")]
        a, found = self.space.architecture(genome), {}
        for metric in (self.prices.resolve(metric, self.space) for metric in usual):
            with contextlib.suppress(InputError):  # a table may lack what nobody budgeted
                found[metric.key] = self.value(metric, a, genome.frame)
        found |= {metric.key: self.value(metric, a, genome.frame) for metric in self.budget.metrics}
        return found

    def intervals(self, genome: Genome) -> dict[str, tuple[float, float]]:
        """Of the reported times: between which bounds the table's validation expects them."""
        table, found = self.prices.table, {}
        for key, value in self.costs(genome).items():
            metric = Metric.parse(key)
            if table is not None and metric.kind.latency:
                step = self.prices.step(metric, self.space.frames[genome.frame].vocabulary)
                if (interval := table.interval(value, step)) is not None:
                    found[key] = interval[1:]
        return found

    def value(self, metric: Metric, a: Architecture, frame: int) -> float:
        """One metric of a whole architecture."""
        value = self.parts(metric, frame).value(a)
        return int(value) if metric.name in ("parameters", "flops") else value


def _columns(sums: list[Sum], alternatives: tuple[tuple[Sum, ...], ...]) -> tuple[list[int], list[int]]:
    """Which sums an alternative of every metric has, and of which metric each is."""
    pairs = [(sums.index(each), k) for k, chosen in enumerate(alternatives) for each in chosen]
    return [column for column, _ in pairs], [k for _, k in pairs]
