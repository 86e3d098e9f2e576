"""Subproblems: a search problem, split so far that each part is a path problem at a fixed depth.

A program is split by the total depth. It is also split by the cut and by the last block's width, as far as the score
depends on them. Where peak memory has a budget, it is split by the largest activation too. Only the largest activation
of a model counts, so no sum over blocks can hold it, but within a narrow band it is nearly known.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from merino_edge import counts
from merino_edge.search.budget import Metric
from merino_edge.search.exact.dominance import ProgramGroup, replaced_choices
from merino_edge.search.exact.relaxation import Floats, PathProblem
from merino_edge.search.problem import Problem, TemplateProgram
from merino_edge.search.score import after_rounding
from merino_edge.search.space import Candidate

SCORE_BITS = 50  # precision of the largest sum of scores; scores are rounded to that grid
BANDS = 8  # of activations, where peak memory has a budget
EVERY_ACTIVATION = (0.0, math.inf)


@dataclass
class Subproblem:
    """One program at one depth, with one class of first widths, one of last widths and one band of activations."""

    group: ProgramGroup
    cut: int
    first: range
    last: range
    band: tuple[float, float]  # the largest activation [bytes] is above the first number and at most the second
    depth: int
    bound: float = math.inf  # no open path of it has a higher objective
    multipliers: list[Floats] = field(default_factory=list)  # those with the lowest bounds
    proven: float = math.inf  # the bound by the first multipliers, before safety is added
    rounds: int = 0  # how often its bound was lowered
    is_open: bool = False  # whether its models are its own task, and not those of a wider or of narrower subproblems
    tried: bool = False  # whether label setting found every path that matters

    @property
    def program(self) -> TemplateProgram:
        return self.group.program


class Splitter:
    """Splits a problem, and makes the path problems. It keeps the arrays that subproblems share.

    `raw` and `scores` are those of an earlier splitter for the same space and score.
    """

    def __init__(self, problem: Problem, minimised: Metric | None = None, which: int = 0) -> None:
        self.problem, self._minimised, self._which = problem, minimised, which
        space = problem.space
        self._width = np.array(space.width_of)
        self._layers = np.array([choice.layers for choice in space.block_choices])
        self._order = np.lexsort((self._layers, self._width))  # block choices by cell
        self.depths = range(space.blocks[0] * space.layers[0], space.blocks[-1] * space.layers[-1] + 1)
        self.raw: dict[tuple[object, ...], Floats] = {}  # scores of block choices
        self.scores: dict[tuple[object, ...], Floats] = {}  # the same, on the grid
        self._useful: dict[tuple[object, ...], NDArray[np.bool_]] = {}

    def split(self, group: ProgramGroup) -> Iterator[list[Subproblem]]:
        """Split a program by its cuts. A class of subproblems has one for each depth."""
        program, space = group.program, self.problem.space
        widths, embedding = program.widths, space.templates[program.template].embedding_width
        first_wide = next((w for w in widths if space.widths[w] >= embedding), widths.stop)
        classes = [(embedding, widths)]
        if self.problem.score.uses_cut:
            classes = [(space.widths[w], range(w, w + 1)) for w in range(widths.start, first_wide)]
            classes += [(embedding, range(first_wide, widths.stop))] if first_wide < widths.stop else []
        for cut, first in classes:
            last = range(first.start, widths.stop)  # because widths do not decrease
            yield [Subproblem(group, cut, first, last, EVERY_ACTIVATION, depth) for depth in self.depths]

    def knows_score(self, subproblem: Subproblem) -> bool:
        """Whether its block scores are those of every path, and not the highest for any last width."""
        return self.problem.score.last is None or len(subproblem.last) == 1

    def narrower(self, subproblem: Subproblem) -> list[list[Subproblem]]:
        """The classes that its class is made of, by last width or else by activations; [] if it cannot be split."""
        one, lasts, bands = subproblem, [subproblem.last], [subproblem.band]
        if not self.knows_score(one):
            lasts = [range(w, w + 1) for w in one.last]
        elif one.band == EVERY_ACTIVATION:
            bands = self._bands(one.program)
        if len(lasts) * len(bands) == 1:
            return []
        return [
            [Subproblem(one.group, one.cut, one.first, last, band, depth) for depth in self.depths]
            for last, band in itertools.product(lasts, bands)
        ]

    def _bands(self, program: TemplateProgram) -> list[tuple[float, float]]:
        """The bands of the largest activation, about equally wide up to the limit."""
        if program.peak < 0:
            return [EVERY_ACTIVATION]
        values = np.unique(program.activations[np.isin(self._width, program.widths)])
        values = values[values > program.end_activation]
        if not len(values):
            return [EVERY_ACTIVATION]
        most = max(min(float(values[-1]), float(program.limits[program.peak])), program.end_activation)
        below = np.searchsorted(values, np.linspace(program.end_activation, most, BANDS + 1)[1:-1], side="right")
        ends = np.unique([values[i - 1] for i in below if 0 < i < len(values)])
        return list(itertools.pairwise([0.0, *ends.tolist(), math.inf]))

    def score_of(self, candidate: Candidate) -> float:
        """The candidate's score on the grid of the scores."""
        problem, widths = self.problem, [int(self._width[choice]) for choice in candidate.choices]
        depth = int(self._layers[list(candidate.choices)].sum())
        embedding = problem.space.templates[candidate.template].embedding_width
        cut = min(embedding, problem.space.widths[widths[0]])
        scores = self._scores_by(candidate.template, cut, widths[-1])
        return float(scores[depth - self.depths.start, list(candidate.choices)].sum())

    def path_problem(self, subproblem: Subproblem) -> PathProblem | None:
        """The subproblem as arrays, without the block choices that others replace; None if no block is left."""
        useful = self._useful_choices(subproblem)[subproblem.depth - self.depths.start]
        return self._path_problem(subproblem, useful)

    def of_every_depth(self, subproblem: Subproblem) -> tuple[PathProblem, Floats] | None:
        """The problem that its class has at every depth, with the scores [depths, G]; None if no block is left."""
        paths = self._path_problem(subproblem, np.any(self._useful_choices(subproblem), axis=0))
        return None if paths is None else (paths, self.block_scores(subproblem)[:, paths.choices])

    def _path_problem(self, subproblem: Subproblem, useful: NDArray[np.bool_]) -> PathProblem | None:
        program, space, (low, high) = subproblem.program, self.problem.space, subproblem.band
        choices = self._order[useful]
        choices = choices[self._width[choices] < subproblem.last.stop]
        start, least = program.start, 0.0
        if program.peak >= 0:
            choices = choices[program.activations[choices] <= high]
            least = max(program.end_activation, low)
            start = start.copy()
            start[:, program.peak] += least
        if not len(choices):
            return None
        return PathProblem(
            width=self._width[choices],
            layers=self._layers[choices],
            score=self.block_scores(subproblem)[subproblem.depth - self.depths.start, choices],
            cost=program.block_costs[choices],
            extra=np.maximum(program.activations[choices] - least, 0.0),
            first=np.array(subproblem.first),
            last=np.array(subproblem.last),
            start=start,
            changes=program.changes,
            finish=program.finish,
            limits=program.limits,
            peak=program.peak,
            depth=subproblem.depth,
            blocks=space.blocks,
            choices=choices,
            weights=self._weights(program),
        )

    def _weights(self, program: TemplateProgram) -> Floats:
        """How much each cost [K] lowers the objective."""
        weights, metrics = np.zeros(len(program.metrics)), self.problem.budget.metrics
        if self._minimised is not None:
            sums = [k for k, metric in enumerate(program.metrics) if metrics[metric] == self._minimised]
            target = sums[self._which % len(sums)]
            weights[target] = 1 / program.scales[target]
        return weights

    def block_scores(self, subproblem: Subproblem) -> Floats:
        """The score of every block choice at every depth, [depths, G], for the widest last block."""
        return self._scores_by(subproblem.program.template, subproblem.cut, subproblem.last[-1])

    def _raw_key(self, template: int, cut: int) -> tuple[object, ...]:
        score = self.problem.score
        return (
            self.problem.space.templates[template].ffn if score.sees_ffn_only else template,
            cut if score.uses_cut else None,
        )

    def _scores_by(self, template: int, cut: int, last: int) -> Floats:
        """The block scores of a template behind a cut, with the factor of a last width, multiplied in.

        The values are rounded to a grid on which sums are exact.
        """
        problem, score = self.problem, self.problem.score
        alike = self._raw_key(template, cut)
        factor = score.factor(problem.space.widths[last])
        key = (*alike, factor)
        if key not in self.scores:
            if alike not in self.raw:
                model, precisions = problem.space.models[template], problem.space.precisions
                choices = problem.space.block_choices[:: max(1, len(precisions))]  # each block once
                depths = self.depths if score.sees_depth else self.depths[:1]
                raw = np.array(
                    [[score.block_total(model, choice, depth, cut) for choice in choices] for depth in depths]
                )  # [depths, G / precisions]
                if precisions:
                    lost = np.array([precision.lost for precision in precisions])
                    raw = after_rounding(raw[:, :, None], lost).reshape(len(raw), -1)
                self.raw[alike] = np.broadcast_to(raw, (len(self.depths), raw.shape[1]))
            raw = factor * self.raw[alike]
            largest = problem.space.blocks[-1] * float(np.abs(raw).max())
            grid = 2.0 ** (math.ceil(math.log2(largest)) - SCORE_BITS) if largest else 1.0
            self.scores[key] = np.round(raw / grid) * grid
        return self.scores[key]

    def _useful_choices(self, subproblem: Subproblem) -> NDArray[np.bool_]:
        """A [depths, G in cell order] mask of the block choices that no other in their cell replaces at no loss."""
        program, space = subproblem.program, self.problem.space
        self.block_scores(subproblem)
        scores = self.raw[self._raw_key(program.template, subproblem.cut)]  # a factor does not change their order
        key = (id(program.block_costs), id(scores), program.end_activation)
        scores = scores if self.problem.score.sees_depth else scores[:1]
        if key not in self._useful:
            order = self._order
            useful = np.zeros((len(self.depths), len(order)), bool)
            extra = np.maximum(program.activations - program.end_activation, 0.0)
            costs = np.column_stack((program.block_costs, extra))
            model = space.models[program.template]
            ties = np.array([counts.block_parameters(model, choice) for choice in space.block_choices])
            ties = -ties if self.problem.prefers_weights else ties
            cells = self._width[order] * (self._layers.max() + 1) + self._layers[order]
            for cell in np.split(np.arange(len(order)), np.flatnonzero(np.diff(cells)) + 1):
                if self._width[order[cell[0]]] in program.widths:
                    choices = order[cell]
                    useful[:, cell] = ~replaced_choices(scores[:, choices], costs[choices], ties[choices])
            self._useful[key] = useful
        return self._useful[key]


def lowest_objective(paths: PathProblem) -> float:
    """An objective that every path exceeds."""
    max_blocks = paths.blocks[-1]
    finite = np.where(np.isfinite(paths.cost), paths.cost, 0.0)
    highest_cost = paths.start.max(0) + paths.finish.max(0) + max_blocks * (finite.max(0) + paths.changes.max((0, 1)))
    highest_cost[paths.peak :][:1] += paths.extra.max()
    return max_blocks * min(0.0, float(paths.score.min())) - float(paths.weights @ np.maximum(highest_cost, 0.0)) - 1.0


def candidate_of(subproblem: Subproblem, paths: PathProblem, choices: list[int]) -> Candidate:
    """The candidate of a path. Blocks of one width may stand in any order, so the choices are sorted."""
    return Candidate(subproblem.program.template, tuple(sorted(int(paths.choices[choice]) for choice in choices)))
