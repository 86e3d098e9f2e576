"""The exact solver: the best architecture of a space within the budgets, and the proof that none is better.

The problem separates. For one model template (what all blocks share) and one total depth, the score and all costs are
sums over the blocks. That is a path problem (`merino_edge.search.exact.relaxation`). If a latency is a minimum over
alternatives, each alternative gives a program of its own (`merino_edge.search.problem`). If the score has a factor that
depends on the last block's width, each such width gives a subproblem too. The solver works in three steps:

1. It leaves out every program that costs no less than another one in every part, because it could only tie.
2. It bounds every subproblem by Lagrangian relaxation. A few beam searches give a good architecture early.
3. It solves subproblems by label setting, highest bound first, until the best score reaches every bound that is left.

That last bound is the certificate. Nothing is sampled and no cost is rounded, so the same problem has the same result
everywhere. Ties go to lower budgeted costs in the budgets' order, then to longer contexts, then to fewer parameters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from merino_edge import counts
from merino_edge.errors import InputError
from merino_edge.search.budget import Metric
from merino_edge.search.exact.certificate import Certificate
from merino_edge.search.exact.dominance import replaced_choices, useful_programs
from merino_edge.search.exact.label_setting import TooManyLabels, solve
from merino_edge.search.exact.relaxation import Floats, LagrangianRelaxation, PathProblem, subgradient_descent
from merino_edge.search.problem import Problem, TemplateProgram
from merino_edge.search.score import after_rounding
from merino_edge.search.space import Candidate

BEAM = 30  # labels kept at each width and depth in a beam search
BEAM_SUBPROBLEMS = 6  # how many subproblems, highest bounds first, get a beam search
RELAXATIONS = 4  # how many relaxations label setting bounds every label with
UNBOUNDED = 1e300  # the limit of a metric that is minimised: nothing reaches it
SCORE_BITS = 50  # precision of the largest sum of scores; scores are rounded to that grid

OnProgress = Callable[[str, float, float], None]  # gets the current step, the best score and the bound


@dataclass
class _Subproblem:
    """One program at one depth, with one class of first widths (one cut) and one of last widths (one score factor)."""

    program: TemplateProgram
    cut: int
    first: range
    last: range
    depth: int
    bound: float = math.inf
    multipliers: list[Floats] = field(default_factory=list)  # those with the lowest bounds


class _OutOfTime(Exception):
    pass


class Known(NamedTuple):
    """What a solver knows at its end, for the same problem under higher limits."""

    candidate: Candidate | None
    score: float  # of the candidate, on the scores' grid
    raw: dict[tuple[object, ...], Floats]  # scores of block choices
    scores: dict[tuple[object, ...], Floats]  # the same, on the grid
    multipliers: dict[tuple[object, ...], Floats]


class ExactSolver:
    """Solves one problem exactly.

    After `seconds` it stops with the best candidate so far and the bound proven by then. With `minimise`, a budgeted
    metric, that metric's value is subtracted from the score (`merino_edge.search.exact.minimum` uses it with scores of
    0). If the metric is a maximum of several sums, sum number `which`, modulo their number, is subtracted. `known` is
    what the solver of the same problem under lower limits found: this one starts from it.
    Raises InputError for a score that is not a sum over blocks.
    """

    def __init__(
        self,
        problem: Problem,
        seconds: float | None = None,
        on_progress: OnProgress = lambda *_: None,
        *,
        minimise: Metric | None = None,
        which: int = 0,
        known: Known | None = None,
    ) -> None:
        if problem.score.block is None:
            raise InputError(
                f"score {problem.score.spec} is not a sum over blocks, so the exact solver cannot use it",
                "write it as NAME(model, block, depth, cut), or add: --solver evolution",
            )
        self.problem, self.on_progress = problem, on_progress
        self.began = time.monotonic()
        self.deadline = math.inf if seconds is None else self.began + seconds
        self.best: Candidate | None = None  # found by label setting, which finds every tie
        self.met: Candidate | None = None  # the best one met in bounding and in beam searches
        self.score = -math.inf  # the score of the better of the two, on the scores' grid
        self.labels = self.solved = 0
        self._minimised, self._which = minimise, which
        space = problem.space
        self._width = np.array(space.width_of)
        self._layers = np.array([choice.layers for choice in space.block_choices])
        self._order = np.lexsort((self._layers, self._width))  # block choices by cell
        self._depths = range(space.blocks[0] * space.layers[0], space.blocks[-1] * space.layers[-1] + 1)
        self._raw: dict[tuple[object, ...], Floats] = {}
        self._scores: dict[tuple[object, ...], Floats] = {}
        self._useful: dict[tuple[object, ...], NDArray[np.bool_]] = {}
        self._multipliers: dict[tuple[object, ...], Floats] = {}  # last multipliers times limits
        if known is not None:  # its candidate is within these limits too; ties with it are still looked for
            self.met, self.score, self._raw, self._scores, multipliers = known
            self._multipliers = dict(multipliers)

    @property
    def known(self) -> Known:
        """What this solver knows now."""
        return Known(self.found, self.score, self._raw, self._scores, self._multipliers)

    @property
    def found(self) -> Candidate | None:
        """The best candidate so far."""
        return self.met if self.best is None else self.best

    def solve(self) -> Certificate:
        """Solve the problem. The deadline only leaves a gap between score and bound; it raises nothing."""
        programs = useful_programs(self.problem)
        subproblems = [subproblem for program in programs for subproblem in self._subproblems(program)]
        given_up = -math.inf  # the highest bound of the subproblems that remain unsolved
        try:
            for subproblem in subproblems:
                self._bound(subproblem)
            for subproblem in self._hopeful(subproblems)[:BEAM_SUBPROBLEMS]:
                with contextlib.suppress(TooManyLabels):
                    self._label(subproblem, BEAM)
            for subproblem in self._hopeful(subproblems):
                self._bound(subproblem)
            for subproblem in self._hopeful(subproblems):
                if subproblem.bound < self.score:
                    break
                self._report("solving", max(given_up, subproblem.bound))
                try:
                    self._label(subproblem)
                except TooManyLabels:
                    given_up = max(given_up, subproblem.bound)
                subproblem.bound = -math.inf
        except _OutOfTime:
            given_up = max(given_up, *(subproblem.bound for subproblem in subproblems))
        candidate = self.found
        score = self.score if candidate is None or self._minimised else self.problem.total(candidate)
        bound = score if given_up <= self.score else given_up
        return Certificate(
            candidate=candidate,
            score=score,
            bound=bound,
            subproblems=len(subproblems),
            solved=self.solved,
            labels=self.labels,
            seconds=time.monotonic() - self.began,
        )

    # --- the subproblems ---

    def _subproblems(self, program: TemplateProgram) -> Iterator[_Subproblem]:
        """Split a program by cut, by last width and by depth, as far as the score depends on them."""
        space, widths = self.problem.space, program.widths
        embedding = space.templates[program.template].embedding_width
        first_wide = next((w for w in widths if space.widths[w] >= embedding), widths.stop)
        classes = [(embedding, widths)]
        if self.problem.score.uses_cut:
            classes = [(space.widths[w], range(w, w + 1)) for w in range(widths.start, first_wide)]
            classes += [(embedding, range(first_wide, widths.stop))] if first_wide < widths.stop else []
        ends = [widths] if self.problem.score.last is None else [range(w, w + 1) for w in widths]
        for (cut, first), last, depth in itertools.product(classes, ends, self._depths):
            if first.start < last.stop:  # because widths do not decrease
                yield _Subproblem(program, cut, first, last, depth)

    def _hopeful(self, subproblems: list[_Subproblem]) -> list[_Subproblem]:
        """The subproblems that may still hold the optimum or a tie with it, highest bound first."""
        hopeful = [subproblem for subproblem in subproblems if subproblem.bound >= self.score]
        return sorted(hopeful, key=lambda subproblem: -subproblem.bound)

    # --- one subproblem ---

    def _path_problem(self, subproblem: _Subproblem) -> PathProblem:
        """The subproblem as arrays, without the block choices that others replace."""
        program, space = subproblem.program, self.problem.space
        choices = self._order[self._useful_choices(subproblem)[subproblem.depth - self._depths.start]]
        choices = choices[self._width[choices] < subproblem.last.stop]
        start = program.start.copy()
        if program.peak >= 0:  # needed if peak memory is minimised: templates differ in this part
            start[:, program.peak] += program.end_activation
        return PathProblem(
            width=self._width[choices],
            layers=self._layers[choices],
            score=self._block_scores(subproblem)[subproblem.depth - self._depths.start, choices],
            cost=program.block_costs[choices],
            extra=np.maximum(program.activations[choices] - program.end_activation, 0.0),
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

    def _block_scores(self, subproblem: _Subproblem) -> Floats:
        """The score of every block choice at every depth, [depths, G].

        The score's factor is multiplied in. The values are rounded to a grid on which sums are exact.
        """
        problem = self.problem
        score, template = problem.score, subproblem.program.template
        alike = (
            problem.space.templates[template].ffn if score.sees_ffn_only else template,
            subproblem.cut if score.uses_cut else None,
        )
        factor = score.factor(problem.space.widths[subproblem.last[-1]])
        key = (*alike, factor)
        if key not in self._scores:
            if alike not in self._raw:
                model, precisions = problem.space.models[template], problem.space.precisions
                choices = problem.space.block_choices[:: max(1, len(precisions))]  # each block once
                raw = np.array(
                    [
                        [score.block_total(model, choice, depth, subproblem.cut) for choice in choices]
                        for depth in self._depths
                    ]
                )  # [depths, G / precisions]
                if precisions:
                    lost = np.array([precision.lost for precision in precisions])
                    raw = after_rounding(raw[:, :, None], lost).reshape(len(raw), -1)
                self._raw[alike] = raw
            raw = factor * self._raw[alike]
            largest = problem.space.blocks[-1] * float(np.abs(raw).max())
            grid = 2.0 ** (math.ceil(math.log2(largest)) - SCORE_BITS) if largest else 1.0
            self._scores[key] = np.round(raw / grid) * grid
        return self._scores[key]

    def _useful_choices(self, subproblem: _Subproblem) -> NDArray[np.bool_]:
        """A [depths, G in cell order] mask of the block choices that no other in their cell replaces at no loss."""
        program, scores = subproblem.program, self._block_scores(subproblem)
        key = (id(program.block_costs), id(scores), program.end_activation)
        if key not in self._useful:
            space, order = self.problem.space, self._order
            useful = np.zeros((len(self._depths), len(order)), bool)
            extra = np.maximum(program.activations - program.end_activation, 0.0)
            costs = np.column_stack((program.block_costs, extra))
            model = space.models[program.template]
            parameters = np.array([counts.block_parameters(model, choice) for choice in space.block_choices])
            cells = self._width[order] * (self._layers.max() + 1) + self._layers[order]
            for cell in np.split(np.arange(len(order)), np.flatnonzero(np.diff(cells)) + 1):
                if self._width[order[cell[0]]] in program.widths:
                    choices = order[cell]
                    useful[:, cell] = ~replaced_choices(scores[:, choices], costs[choices], parameters[choices])
            self._useful[key] = useful
        return self._useful[key]

    def _bound(self, subproblem: _Subproblem) -> None:
        """Lower the subproblem's bound, at most down to the best score."""
        self._report("bounding", math.inf)
        program, paths = subproblem.program, self._path_problem(subproblem)
        alike = (self.problem.space.templates[program.template].ffn, program.metrics)
        usual = self._multipliers.get(alike)
        if usual is None:
            usual = np.full(len(paths.limits), np.abs(paths.score).max() / max(1, len(paths.limits)))
        multipliers = subproblem.multipliers[0] if subproblem.multipliers else usual / paths.limits
        lowest = _lowest(paths)
        descent = subgradient_descent(paths, multipliers, max(self.score, lowest))
        if descent.choices is not None:
            self._meet(_candidate(subproblem, paths, descent.choices), descent.objective)
        subproblem.bound = min(subproblem.bound, descent.bound if descent.bound > lowest else -math.inf)
        lower = descent.relaxations[:: max(1, len(descent.relaxations) // RELAXATIONS)][:RELAXATIONS]
        subproblem.multipliers = [relaxation.multipliers for relaxation in lower]
        if math.isfinite(subproblem.bound):
            self._multipliers[alike] = subproblem.multipliers[0] * paths.limits

    def _label(self, subproblem: _Subproblem, beam: int | None = None) -> None:
        """Solve the subproblem, or with `beam` look for a good architecture in it."""
        paths = self._path_problem(subproblem)
        self.solved += beam is None

        def count(labels: int) -> None:
            self.labels += labels
            self._report("solving", subproblem.bound)

        relaxations = [LagrangianRelaxation(paths, multipliers) for multipliers in subproblem.multipliers]
        optima = solve(paths, self.score, relaxations, beam, count)
        if not optima:
            return
        score = paths.objective(optima[0])
        candidates = [_candidate(subproblem, paths, choices) for choices in optima]
        if beam is not None:
            self._meet(candidates[0], score)
            return
        if score == self.score and self.best is not None:
            candidates.append(self.best)
        self.best, self.score = min(candidates, key=self._key), score

    def _meet(self, candidate: Candidate, score: float) -> None:
        """Keep a candidate that bounding or a beam search met, if it is the best so far."""
        if score > self.score:
            self.met, self.best, self.score = candidate, None, score

    def _key(self, candidate: Candidate) -> tuple[object, ...]:
        """The sort key that decides between equal scores."""
        problem, template = self.problem, self.problem.space.templates[candidate.template]
        a = problem.space.architecture(candidate)
        costs = tuple(problem.value(metric, candidate) for metric in problem.budget.metrics)
        return costs, -template.context, a.parameters, candidate

    def _report(self, step: str, bound: float) -> None:
        """Report progress. Raises _OutOfTime after the deadline."""
        if time.monotonic() > self.deadline:
            raise _OutOfTime
        self.on_progress(step, self.score, bound)


def _lowest(paths: PathProblem) -> float:
    """An objective that every path exceeds."""
    max_blocks = paths.blocks[-1]
    finite = np.where(np.isfinite(paths.cost), paths.cost, 0.0)
    highest_cost = paths.start.max(0) + paths.finish.max(0) + max_blocks * (finite.max(0) + paths.changes.max((0, 1)))
    highest_cost[paths.peak :][:1] += paths.extra.max()
    return max_blocks * min(0.0, float(paths.score.min())) - float(paths.weights @ np.maximum(highest_cost, 0.0)) - 1.0


def _candidate(subproblem: _Subproblem, paths: PathProblem, choices: list[int]) -> Candidate:
    """The candidate of a path. Blocks of one width may stand in any order, so the choices are sorted."""
    return Candidate(subproblem.program.template, tuple(sorted(int(paths.choices[choice]) for choice in choices)))
