"""The mathematical program (paper section 6): a space, a budget and a score, as arrays that a solver adds up.

`Problem` selects the model templates whose context is as long as the budgets ask. It turns each into
`TemplateProgram`s: a cost vector for each block choice, width projection, first width and last width, and the limits.
All costs are in the metrics' exact units (`merino_edge.search.costs`).

A metric may be a minimum over alternatives of a maximum of several sums. Then each sum is a column, and each
alternative is a program of its own. An architecture is within the budgets if it is within all limits of one program.
`Problem` also judges whole candidates, for the evolution, for brute force and for reports. It solves nothing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import statistics
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.latency.step import Step
from merino_edge.search.additive_cost import AdditiveCost, MetricCost, unit_limit
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.costs import CostModel, Table
from merino_edge.search.score import Score
from merino_edge.search.space import Candidate, Space

MEMORY = {"parameters", "weight_mb", "peak_mb"}  # the metrics that say what weights may take

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


@dataclass(frozen=True)
class TemplateProgram:
    """The costs and limits of one template, for one alternative of every metric, in units.

    It has K sums, G block choices and W widths (all widths of the space; `widths` are the allowed ones). A path costs
    start[first width] + the sum of its blocks' costs + the sum of changes[before, after] + finish[last width]. Its
    activations are the largest of its blocks' and `end_activation`. They count towards sum `peak`.
    """

    template: int
    widths: range
    block_costs: Floats  # [G, K]
    changes: Floats  # [W, W, K]: from, to
    start: Floats  # [W, K]
    finish: Floats  # [W, K]
    limits: Floats  # [K]
    scales: Floats  # [K]: how many units make one of the metric
    metrics: tuple[int, ...]  # [K]: the index of the budgeted metric that each sum belongs to
    peak: int  # -1 if peak memory has no budget
    activations: Floats  # [G], bytes
    end_activation: float  # of embedding and head, bytes

    def units(self, choices: tuple[int, ...], widths: list[int]) -> Floats:
        """The costs [K] of a path of block choices with these width indices."""
        total = self.start[widths[0]] + self.finish[widths[-1]] + self.block_costs[list(choices)].sum(0)
        total = total + self.changes[widths[:-1], widths[1:]].sum(0)
        if self.peak >= 0:
            total[self.peak] += max(self.end_activation, float(self.activations[list(choices)].max()))
        return np.asarray(total)

    def within(self, choices: tuple[int, ...], widths: list[int]) -> bool:
        """Whether every sum of a path is at most its limit."""
        return bool((self.units(choices, widths) <= self.limits).all())


class Problem:
    """A search problem: maximise `score` over `space`, within `budget`, where `cost_model` says what costs how much.

    `shared` is a problem with the same space and cost model. This one then reuses its cost arrays. With `more_weights`
    the last tie goes to more decoder parameters, unless memory has a budget; else it goes to fewer. Raises InputError
    if a latency is budgeted and there is no table, or the table does not cover the space.
    """

    def __init__(
        self,
        space: Space,
        budget: Budget,
        score: Score,
        cost_model: CostModel,
        shared: Problem | None = None,
        *,
        more_weights: bool = True,
    ) -> None:
        limits = tuple((cost_model.resolve(metric, space), limit) for metric, limit in budget.limits)
        self.space, self.score, self.cost_model = space, score, cost_model
        self.budget = Budget(limits)  # with every metric resolved
        self.more_weights = more_weights
        self.prefers_weights = more_weights and not MEMORY & {metric.name for metric in self.budget.metrics}
        self._programs: dict[int, list[TemplateProgram]] = {}
        self._block_cost_cache: dict[tuple[object, ...], tuple[list[Floats], Floats]] = (
            {} if shared is None else shared._block_cost_cache
        )
        self._costs_of_width: dict[tuple[object, ...], tuple[Floats, Floats]] = (
            {} if shared is None else shared._costs_of_width
        )
        self.templates = self._templates()
        if [metric.name for metric in self.budget.metrics].count("peak_mb") > 1:  # only one sum may have activations
            raise InputError("peak memory has two budgets", "give --peak-mb once, for the longest prompt")
        if space.precisions and score.whole is not None:
            raise InputError(
                f"score {score.spec} is not a sum over blocks, so it cannot say what their precisions cost",
                "write it as NAME(model, block, depth, cut), or leave out the precisions",
            )
        cost_model.check_precisions(space)
        cost_model.check_blocks(space, self.budget.metrics)
        if shared is None or not set(self.budget.metrics) <= set(shared.budget.metrics):
            cost_model.check_coverage(space, self.templates, self.budget.metrics)

    def limited(self, budget: Budget, score: Score | None = None) -> Problem:
        """The same problem with other limits, or with another score."""
        return Problem(self.space, budget, score or self.score, self.cost_model, self, more_weights=self.more_weights)

    def _templates(self) -> list[int]:
        """The templates whose context is as long as every budget asks. Raises InputError where there is none."""
        long_enough = list(range(len(self.space.templates)))
        for metric in self.budget.metrics:
            needed = {i: self.cost_model.positions(metric, self.space.templates[i].vocabulary) for i in long_enough}
            long_enough = [i for i in long_enough if self.space.templates[i].context >= needed[i]]
            if not long_enough:
                raise InputError(
                    f"{metric.key} needs {min(needed.values())} positions, but space {self.space.name} has contexts up "
                    f"to {self.space.contexts[-1]}",
                    "ask for less, or add a context to the space",
                )
        return long_enough

    # --- one template ---

    def programs(self, template: int) -> list[TemplateProgram]:
        """The programs of a template, one for each combination of the metrics' alternatives."""
        if template not in self._programs:
            self._programs[template] = self._template_programs(template)
        return self._programs[template]

    def metric_cost(self, metric: Metric, template: int) -> MetricCost:
        """`metric` for the models of one template."""
        return self.cost_model.metric_cost(metric, self.space.templates[template].vocabulary)

    def _template_programs(self, template: int) -> list[TemplateProgram]:
        space, model = self.space, self.space.models[template]
        metric_costs = [self.metric_cost(metric, template) for metric in self.budget.metrics]
        sums = [each for cost in metric_costs for each in cost.sums]
        widths = space.width_range(template)
        count, low, high = len(space.widths), widths[0], widths[-1]
        changes, start, finish = (np.zeros((*shape, len(sums))) for shape in ((count, count), (count,), (count,)))
        blocks = {w: space.block_choices[space.first_choice[w]] for w in widths}

        def end(each: AdditiveCost, first: int, last: int) -> float:
            return each.end(dataclasses.replace(model, blocks=(blocks[first], blocks[last])))

        for k, each in enumerate(sums):
            both = end(each, low, high)
            for w in widths:
                start[w, k] = end(each, w, high)
                finish[w, k] = end(each, low, w) - both
                for after in range(w + 1, high + 1):
                    changes[w, after, k] = each.change(space.widths[w], space.widths[after])
        limits = [
            unit_limit(limit, cost.scale) for (_, limit), cost in zip(self.budget.limits, metric_costs, strict=True)
        ]
        peak = next((k for k, each in enumerate(sums) if each.activation), -1)
        end_activation = sums[peak].end_activation if peak >= 0 else None
        selected = [
            _columns(sums, alternatives)
            for alternatives in itertools.product(*(cost.alternatives for cost in metric_costs))
        ]
        block_costs, activations = self._block_costs(template, sums, peak, [columns for columns, _ in selected])
        return [
            TemplateProgram(
                template=template,
                widths=widths,
                block_costs=costs,
                changes=changes.take(columns, -1),
                start=start.take(columns, -1),
                finish=finish.take(columns, -1),
                limits=np.array([limits[k] for k in metrics]),
                scales=np.array([metric_costs[k].scale for k in metrics]),
                metrics=tuple(metrics),
                peak=columns.index(peak) if peak >= 0 else -1,
                activations=activations,
                end_activation=end_activation(model) if end_activation else 0.0,
            )
            for costs, (columns, metrics) in zip(block_costs, selected, strict=True)
        ]

    def _block_costs(
        self, template: int, sums: list[AdditiveCost], peak: int, selected: list[list[int]]
    ) -> tuple[list[Floats], Floats]:
        """The costs [G, K] of the block choices in each program, whose sums are `selected`, and their activations [G].

        Templates share the result if they differ only in properties that blocks do not depend on.
        """
        space, model, shape = self.space, self.space.models[template], self.space.templates[template]
        per_text = any(metric.kind.at == "prompt bytes" for metric in self.budget.metrics)
        alike = (self.budget.metrics, shape.ffn, shape.context, per_text and shape.vocabulary)
        key = (*alike, space.width_range(template))
        if key not in self._block_cost_cache:
            costs = np.full((len(space.block_choices), len(sums)), np.inf)
            activations = np.zeros(len(space.block_choices))
            for w in space.width_range(template):
                of_width = slice(space.first_choice[w], space.first_choice[w + 1])
                if (*alike, w) not in self._costs_of_width:
                    self._costs_of_width[(*alike, w)] = self._costs(model, of_width, sums, peak)
                costs[of_width], activations[of_width] = self._costs_of_width[(*alike, w)]
            self._block_cost_cache[key] = [costs.take(columns, -1) for columns in selected], activations
        return self._block_cost_cache[key]

    def _costs(self, model: Architecture, choices: slice, sums: list[AdditiveCost], peak: int) -> tuple[Floats, Floats]:
        """The sums [G, S] and the activations [G] of some block choices."""
        space, activation = self.space, sums[peak].activation if peak >= 0 else None
        blocks = space.block_choices[choices]
        precisions = [space.precision_of(g) for g in range(choices.start, choices.stop)]
        names = [None if precision is None else precision.name for precision in precisions]
        costs = [[each.block(model, block, own) for each in sums] for block, own in zip(blocks, names, strict=True)]
        activations = [activation(model, block) if activation else 0.0 for block in blocks]
        return np.array(costs, float).reshape(len(blocks), len(sums)), np.array(activations, float)

    # --- whole candidates ---

    def total(self, candidate: Candidate) -> float:
        """The candidate's score."""
        lost = [precision.lost for precision in self.space.precisions_of(candidate)]
        return self.score.total(self.space.architecture(candidate), lost)

    def feasible(self, candidate: Candidate) -> bool:
        """Whether the candidate is within the budgets."""
        widths = [self.space.width_of[choice] for choice in candidate.choices]
        return any(program.within(candidate.choices, widths) for program in self.programs(candidate.template))

    def costs(self, candidate: Candidate) -> dict[str, float]:
        """The costs that are reported: the usual metrics that can be answered, and the budgeted ones."""
        usual = [Metric("parameters"), Metric("flops"), Metric("weight_mb"), Metric("kv_mb"), Metric("peak_mb")]
        if self.cost_model.table is not None:
            usual += [Metric("decode_ms"), Metric("prefill_ms")]
        values = {}
        for metric in (self.cost_model.resolve(metric, self.space) for metric in usual):
            with contextlib.suppress(InputError):  # a table need not cover a metric without a budget
                values[metric.key] = self.value(metric, candidate)
        values |= {metric.key: self.value(metric, candidate) for metric in self.budget.metrics}
        return values

    def intervals(self, candidate: Candidate) -> dict[str, tuple[float, float]]:
        """The intervals in which the table's validation expects the reported times, by metric key."""
        bounds = {}
        for key, value, step, tables in self._times(candidate):
            found = [table.interval(value, step, found=True) for table in tables]
            if intervals := list(filter(None, found)):  # of several tables the widest
                bounds[key] = min(low for _, low, _ in intervals), max(high for _, _, high in intervals)
        return bounds

    def expected(self, candidate: Candidate) -> dict[str, float]:
        """The reported times, corrected by how found models ran that were measured for the table, by metric key."""
        corrected = {}
        for key, value, step, tables in self._times(candidate):
            if times := [time for table in tables if (time := table.expected(value, step)) is not None]:
                corrected[key] = statistics.fmean(times)
        return corrected

    def _times(self, candidate: Candidate) -> Iterator[tuple[str, float, Step, list[Table]]]:
        """(metric key, time, its step, the tables of the candidate's precisions)."""
        names = dict.fromkeys((self.cost_model.precision, *(p.name for p in self.space.precisions_of(candidate))))
        for key, value in self.costs(candidate).items():
            metric = Metric.parse(key)
            if metric.kind.latency:
                step = self.cost_model.step(metric, self.space.templates[candidate.template].vocabulary)
                yield key, value, step, [self.cost_model.table_of(name) for name in names]

    def value(self, metric: Metric, candidate: Candidate) -> float:
        """The value of one metric for a candidate."""
        precisions = [precision.name for precision in self.space.precisions_of(candidate)]
        value = self.metric_cost(metric, candidate.template).value(self.space.architecture(candidate), precisions)
        return int(value) if metric.kind.whole else value


def _columns(
    sums: list[AdditiveCost], alternatives: tuple[tuple[AdditiveCost, ...], ...]
) -> tuple[list[int], list[int]]:
    """The sums of one alternative of every metric, as column indices, and the index of each sum's metric."""
    pairs = [(sums.index(each), k) for k, alternative in enumerate(alternatives) for each in alternative]
    return [column for column, _ in pairs], [k for _, k in pairs]
