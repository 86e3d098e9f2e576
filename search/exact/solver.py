"""The exact solver: the best architecture of a space within the budgets, and the proof that none is better.

The program separates: for a fixed frame (what all blocks share) and a fixed total depth, score and costs are sums over
blocks, a chain (merino_edge.search.exact.relaxation). A latency that is the least of alternatives makes one program for each
(merino_edge.search.problem). So the solver goes over all pairs of program and depth, and over the last block's width
where the score is multiplied by something of it:

1. A program that costs no less than another in every part is left out: it could only tie.
2. Every pair gets an upper bound (Lagrangian relaxation); a good architecture comes from a few beam searches.
3. Pairs are solved by label setting (merino_edge.search.exact.label_setting), highest bound first, until the best architecture found
   scores at least every bound that is left. That bound is the certificate.

Nothing is sampled and no cost is rounded; the same question has the same answer everywhere. Equal scores go to the
lower budgeted costs in the order of the budgets, then to the longer context, then to fewer parameters.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from merino_edge import counts
from merino_edge.errors import InputError
from merino_edge.search.budget import Metric
from merino_edge.search.exact.dominance import useful_programs
from merino_edge.search.exact.label_setting import TooManyLabels, solve
from merino_edge.search.exact.relaxation import Floats, LagrangianRelaxation, PathProblem, subgradient_descent
from merino_edge.search.problem import Problem, TemplateProgram
from merino_edge.search.space import Candidate

BEAM = 30
BEAM_SUBPROBLEMS = 6  # of the highest bounds
RELAXATIONS = 4  # that label setting weighs every child with
UNBOUNDED = 1e300  # a limit that nothing reaches, of a metric that is minimised
SCORE_BITS = 50  # of the largest sum of scores; what is finer is rounded off

Note = Callable[[str, float, float], None]  # what is being done, the best score so far, the bound so far


@dataclass(frozen=True)
class Certificate:
    """`genome` is the best found, None where nothing was; no architecture scores above `bound` (minus infinity: none
    meets the budgets)."""

    candidate: Candidate | None
    score: float
    bound: float
    subproblems: int  # pairs of program and depth
    solved: int  # of them, by label setting; the others by their bound
    labels: int
    seconds: float

    @property
    def infeasible(self) -> bool:
        """Whether it is proven that nothing meets the budgets."""
        return self.candidate is None and self.bound == -math.inf

    @property
    def gap_percent(self) -> float:
        """How far the bound is above the score; 0 is a proof of optimality."""
        if self.bound <= self.score:
            return 0.0
        return 100 * (self.bound - self.score) / abs(self.score) if math.isfinite(self.score * self.bound) else math.inf


@dataclass
class _Subproblem:
    """One program, one class of first widths (one cut), one of last widths (one factor of the score), one depth."""

    program: TemplateProgram
    cut: int
    first: range
    last: range
    depth: int
    bound: float = math.inf
    multipliers: list[Floats] = field(default_factory=list)  # of the lowest bounds


class _OutOfTime(Exception):
    pass


class ExactSolver:
    """Solves one problem. After `seconds` the best so far is returned with the bound proven by then. With `minimise`, a
    budgeted metric, its value is taken from the score: alone, where every score is 0 (merino_edge.search.exact.minimum); of one
    that is the greatest of several sums, one of them is: number `which`, counting round. Raises InputError for a score
    that is not a sum over blocks."""

    def __init__(
        self,
        problem: Problem,
        seconds: float | None = None,
        note: Note = lambda *_: None,
        minimise: Metric | None = None,
        which: int = 0,
    ) -> None:
        if problem.score.block is None:
            raise InputError(
                f"score {problem.score.spec} is not a sum over blocks, so the exact solver cannot use it",
                "write it as NAME(model, block, depth, cut), or add: --solver evolution",
            )
        self.problem, self.note = problem, note
        self.began = time.monotonic()
        self.deadline = math.inf if seconds is None else self.began + seconds
        self.best: Candidate | None = None  # found by label setting, which meets every tie
        self.met: Candidate | None = None  # the best that bounding and beams came upon
        self.score = -math.inf  # of the better of the two, on the scores' grid
        self.labels = self.solved = 0
        self._minimised, self._which = minimise, which
        space = problem.space
        self._width, self._layers = (
            np.array(space.width_of),
            np.array([choice.layers for choice in space.block_choices]),
        )
        self._order = np.lexsort((self._layers, self._width))  # genes by cell
        self._depths = range(space.blocks[0] * space.layers[0], space.blocks[-1] * space.layers[-1] + 1)
        self._raw: dict[tuple[object, ...], Floats] = {}
        self._scores: dict[tuple[object, ...], Floats] = {}
        self._useful: dict[tuple[object, ...], NDArray[np.bool_]] = {}
        self._multipliers: dict[tuple[object, ...], Floats] = {}  # by FFN kind: what the limits were worth last

    def solve(self) -> Certificate:
        subproblems = [
            subproblem for program in useful_programs(self.problem) for subproblem in self._subproblems(program)
        ]
        given_up = -math.inf  # the highest bound of tasks that are not solved
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
                self._tell("solving", max(given_up, subproblem.bound))
                try:
                    self._label(subproblem)
                except TooManyLabels:
                    given_up = max(given_up, subproblem.bound)
                subproblem.bound = -math.inf
        except _OutOfTime:
            given_up = max(given_up, *(subproblem.bound for subproblem in subproblems))
        candidate = self.met if self.best is None else self.best
        score = self.score if candidate is None or self._minimised else self.problem.total(candidate)
        bound = score if given_up <= self.score else given_up
        return Certificate(
            candidate, score, bound, len(subproblems), self.solved, self.labels, time.monotonic() - self.began
        )

    # --- what there is to solve ---

    def _subproblems(self, program: TemplateProgram) -> Iterator[_Subproblem]:
        space, widths = self.problem.space, program.widths
        embedding = space.templates[program.template].embedding_width
        wide = next((w for w in widths if space.widths[w] >= embedding), widths.stop)
        classes = [(embedding, widths)]
        if self.problem.score.uses_cut:
            classes = [(space.widths[w], range(w, w + 1)) for w in range(widths.start, wide)]
            classes += [(embedding, range(wide, widths.stop))] if wide < widths.stop else []
        ends = [widths] if self.problem.score.last is None else [range(w, w + 1) for w in widths]
        for (cut, first), last, depth in itertools.product(classes, ends, self._depths):
            if first.start < last.stop:  # widths do not decrease
                yield _Subproblem(program, cut, first, last, depth)

    def _hopeful(self, subproblems: list[_Subproblem]) -> list[_Subproblem]:
        """The tasks that may still hold the optimum or a tie with it, highest bound first."""
        return sorted(
            (subproblem for subproblem in subproblems if subproblem.bound >= self.score),
            key=lambda subproblem: -subproblem.bound,
        )

    # --- one task ---

    def _path_problem(self, subproblem: _Subproblem) -> PathProblem:
        program, space = subproblem.program, self.problem.space
        choices = self._order[self._useful_choices(subproblem)[subproblem.depth - self._depths.start]]
        choices = choices[self._width[choices] < subproblem.last.stop]
        start = program.start.copy()
        if program.peak >= 0:  # part of what is minimised too: frames differ in it
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
        """[K]: by what each cost counts in what is minimised."""
        weights, metrics = np.zeros(len(program.metrics)), self.problem.budget.metrics
        if self._minimised is not None:
            sums = [k for k, metric in enumerate(program.metrics) if metrics[metric] == self._minimised]
            chosen = sums[self._which % len(sums)]
            weights[chosen] = 1 / program.scales[chosen]
        return weights

    def _block_scores(self, subproblem: _Subproblem) -> Floats:
        """[depths, G]: every gene's score at every depth, multiplied by what it will be, on a grid on which sums are
        exact."""
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
                model, choices = problem.space.models[template], problem.space.block_choices
                self._raw[alike] = np.array(
                    [
                        [score.block_total(model, choice, depth, subproblem.cut) for choice in choices]
                        for depth in self._depths
                    ]
                )
            raw = factor * self._raw[alike]
            largest = problem.space.blocks[-1] * float(np.abs(raw).max())
            grid = 2.0 ** (math.ceil(math.log2(largest)) - SCORE_BITS) if largest else 1.0
            self._scores[key] = np.round(raw / grid) * grid
        return self._scores[key]

    def _useful_choices(self, subproblem: _Subproblem) -> NDArray[np.bool_]:
        """[depths, G in cell order]: the genes that no other of their width and layers replaces at no loss."""
        program, scores = subproblem.program, self._block_scores(subproblem)
        key = (id(program.block_costs), id(scores), program.end_activation)
        if key not in self._useful:
            space, order = self.problem.space, self._order
            useful = np.zeros((len(self._depths), len(order)), bool)
            costs = np.column_stack(
                (program.block_costs, np.maximum(program.activations - program.end_activation, 0.0))
            )
            parameters = np.array(
                [counts.block_parameters(space.models[program.template], choice) for choice in space.block_choices]
            )
            cells = self._width[order] * (self._layers.max() + 1) + self._layers[order]
            for cell in np.split(np.arange(len(order)), np.flatnonzero(np.diff(cells)) + 1):
                if self._width[order[cell[0]]] in program.widths:
                    choices = order[cell]
                    useful[:, cell] = ~_replaced(scores[:, choices], costs[choices], parameters[choices])
            self._useful[key] = useful
        return self._useful[key]

    def _bound(self, subproblem: _Subproblem) -> None:
        """Lower the task's bound as far as it is above the best score."""
        self._tell("bounding", math.inf)
        paths, alike = (
            self._path_problem(subproblem),
            (self.problem.space.templates[subproblem.program.template].ffn, subproblem.program.metrics),
        )
        usual = self._multipliers.get(alike)
        if usual is None:
            usual = np.full(len(paths.limits), np.abs(paths.score).max() / max(1, len(paths.limits)))
        multipliers = subproblem.multipliers[0] if subproblem.multipliers else usual / paths.limits
        lowest = _lowest(paths)
        tightened = subgradient_descent(paths, multipliers, max(self.score, lowest))
        if tightened.choices is not None:
            self._meet(_candidate(subproblem, paths, tightened.choices), tightened.objective)
        subproblem.bound = min(subproblem.bound, tightened.bound if tightened.bound > lowest else -math.inf)
        lower = tightened.relaxations[:: max(1, len(tightened.relaxations) // RELAXATIONS)][:RELAXATIONS]
        subproblem.multipliers = [relaxation.multipliers for relaxation in lower]
        if math.isfinite(subproblem.bound):
            self._multipliers[alike] = subproblem.multipliers[0] * paths.limits

    def _label(self, subproblem: _Subproblem, beam: int | None = None) -> None:
        """Solve the task, or with `beam` look for a good architecture in it."""
        paths = self._path_problem(subproblem)
        self.solved += beam is None

        def note(labels: int) -> None:
            self.labels += labels
            self._tell("solving", subproblem.bound)

        relaxations = [LagrangianRelaxation(paths, multipliers) for multipliers in subproblem.multipliers]
        found = solve(paths, self.score, relaxations, beam, note)
        if not found:
            return
        score = paths.objective(found[0])
        candidates = [_candidate(subproblem, paths, choices) for choices in found]
        if beam is not None:
            self._meet(candidates[0], score)
            return
        if score == self.score and self.best is not None:
            candidates.append(self.best)
        self.best, self.score = min(candidates, key=self._key), score

    def _meet(self, candidate: Candidate, score: float) -> None:
        if score > self.score:
            self.met, self.best, self.score = candidate, None, score

    def _key(self, candidate: Candidate) -> tuple[object, ...]:
        """What decides between equal scores."""
        problem, template = self.problem, self.problem.space.templates[candidate.template]
        a = problem.space.architecture(candidate)
        costs = tuple(problem.value(metric, a, candidate.template) for metric in problem.budget.metrics)
        return costs, -template.context, a.parameters, candidate

    def _tell(self, doing: str, bound: float) -> None:
        if time.monotonic() > self.deadline:
            raise _OutOfTime
        self.note(doing, self.score, bound)


def _lowest(paths: PathProblem) -> float:
    """A worth that no chain sinks to."""
    most = paths.blocks[-1]
    finite = np.where(np.isfinite(paths.cost), paths.cost, 0.0)
    dearest = paths.start.max(0) + paths.finish.max(0) + most * (finite.max(0) + paths.changes.max((0, 1)))
    dearest[paths.peak :][:1] += paths.extra.max()
    return most * min(0.0, float(paths.score.min())) - float(paths.weights @ np.maximum(dearest, 0.0)) - 1.0


def _candidate(subproblem: _Subproblem, paths: PathProblem, choices: list[int]) -> Candidate:
    """Blocks of one width may stand in any order: the genes ascend."""
    return Candidate(subproblem.program.template, tuple(sorted(int(paths.choices[choice]) for choice in choices)))


def _replaced(scores: Floats, costs: Floats, parameters: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[depths, N]: which of the genes of one cell another one replaces: scores [depths, N], costs [N, K]. Of equal ones
    the one of fewest parameters stays, of those the first."""
    no_dearer = (costs[:, None] <= costs[None]).all(-1)  # [i, j]: i costs no more than j
    rank = np.lexsort((np.arange(len(costs)), parameters)).argsort()
    preferred = (costs[:, None] < costs[None]).any(-1) | (rank[:, None] < rank[None])
    better = scores[:, :, None] > scores[:, None]  # [depth, i, j]
    equal = scores[:, :, None] == scores[:, None]
    return np.asarray((no_dearer & (better | (equal & preferred))).any(1))
