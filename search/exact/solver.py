"""The exact solver: the best architecture of a space within the budgets, and the proof that none is better.

The problem separates. For one model template (what all blocks share) and one total depth, the score and all costs are
sums over the blocks. That is a path problem (`merino_edge.search.exact.relaxation`). If a latency is a minimum over
alternatives, each alternative gives a program of its own (`merino_edge.search.problem`). More of the score and of peak
memory becomes a sum by splitting further (`merino_edge.search.exact.subproblem`). The solver works in four steps:

1. It leaves out every program that costs no less than another one in every part, because it could only tie.
2. It bounds every subproblem as if nothing had a price. So there is a bound at once, whenever the time ends.
3. It lowers the highest bound by Lagrangian relaxation, again and again. A few beam searches give a good architecture.
4. It solves subproblems by label setting, highest bound first, until the best score reaches every bound that is left.

That last bound is the certificate, and the multipliers prove it (`merino_edge.search.exact.proof`). Nothing is sampled
and no cost is rounded, so the same problem has the same result everywhere. Ties go to lower budgeted costs in the
budgets' order, then to longer contexts, then to more or fewer parameters (`Problem.prefers_weights`).
"""

from __future__ import annotations

import contextlib
import heapq
import itertools
import math
import time
from collections.abc import Callable

import numpy as np

from merino_edge import counts
from merino_edge.errors import InputError
from merino_edge.search.budget import Metric
from merino_edge.search.exact import proof
from merino_edge.search.exact.certificate import Certificate, Known
from merino_edge.search.exact.dominance import program_groups
from merino_edge.search.exact.label_setting import TooManyLabels, solve
from merino_edge.search.exact.relaxation import (
    STEPS,
    Floats,
    LagrangianRelaxation,
    bounds_by_depth,
    short,
    subgradient_descent,
)
from merino_edge.search.exact.subproblem import Splitter, Subproblem, candidate_of, lowest_objective
from merino_edge.search.problem import Problem
from merino_edge.search.space import Candidate
from merino_edge.search.steady_score import require_equal

BEAM = 30  # labels kept at each width and depth in a beam search
BEAM_SUBPROBLEMS = 6  # how many subproblems, highest bounds first, get a beam search
LOOKS = 3  # beam searches at a depth, where the time ended before anything was found
RELAXATIONS = 4  # how many relaxations label setting bounds every label with
UNBOUNDED = 1e300  # the limit of a metric that is minimised: nothing reaches it
ROUND = 8  # subgradient steps before the next subproblem, if its bound is then higher
STALLED = 1e-3  # share by which a round must lower a bound, or it is the last one

OnProgress = Callable[[str, float, float], None]  # gets the current step, the best score and the bound


class _OutOfTime(Exception):
    pass


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
        self._minimised = minimise
        self._splitter = Splitter(problem, minimise, which)
        self._multipliers: dict[tuple[object, ...], dict[int, Floats]] = {}  # times limits; by likeness, then depth
        self._classes: list[list[Subproblem]] = []  # of each, the subproblems at all depths
        self._split: dict[int, list[list[Subproblem]]] = {}  # by id of a class: the classes that it is made of
        self._free: dict[tuple[object, ...], tuple[Floats, Floats]] = {}  # bounds without prices, and their slack
        if known is not None:  # its candidate is within these limits too; ties with it are still looked for
            self.met, self.score, self._splitter.raw, self._splitter.scores, multipliers = known
            self._multipliers = {key: dict(by_depth) for key, by_depth in multipliers.items()}

    @property
    def found(self) -> Candidate | None:
        """The best candidate so far."""
        return self.met if self.best is None else self.best

    def solve(self) -> Certificate:
        """Solve the problem. The deadline only leaves a gap between score and bound; it raises nothing."""
        groups, too_dear = program_groups(self.problem)
        for members in itertools.chain(*map(self._splitter.split, groups)):
            self._bound_free(members)
            self._classes.append(members)
            for member in members:
                member.is_open = True
        try:
            self._lower_bounds()
            for subproblem in self._hopeful()[:BEAM_SUBPROBLEMS]:
                self._beam(subproblem)
            for subproblem in self._hopeful():
                self._bound(subproblem, subproblem.multipliers[0])
            self._solve_all()
        except _OutOfTime:
            self.deadline = math.inf
            self._look_for_any()
        tasks = [one for members in self._classes for one in members if one.is_open]
        candidate, open_bound = self.found, max((one.bound for one in tasks), default=-math.inf)
        score = self.score
        if candidate is not None and self._minimised is None:
            score = self.problem.total(candidate)
            require_equal(self.problem, self.score, score)
        return Certificate(
            candidate=candidate,
            score=score,
            bound=score if open_bound <= self.score else open_bound,
            subproblems=len(tasks),
            solved=self.solved,
            labels=self.labels,
            seconds=time.monotonic() - self.began,
            proof=proof.to_dict(self.problem.space, groups, too_dear, tasks),
            known=Known(self.found, self.score, self._splitter.raw, self._splitter.scores, self._multipliers),
        )

    def _lower_bounds(self) -> None:
        """Lower the highest bound, a few steps at a time, until the best score reaches it or all steps are taken.

        A subproblem that can be split is split after a round.
        """
        order = itertools.count()
        heap = [(-one.bound, next(order), one, members) for members in self._classes for one in members]
        heapq.heapify(heap)
        beam = True
        while heap:
            highest, _, subproblem, members = heapq.heappop(heap)
            before = subproblem.bound
            if -highest > before:  # its class was bounded meanwhile
                heapq.heappush(heap, (-before, next(order), subproblem, members))
                continue
            if before < self.score or before == -math.inf:
                break
            self._report("bounding", before)
            subproblem.rounds += 1
            again = [(subproblem, members)]
            if subproblem.rounds == 1 and self._multipliers:
                self._bound_class(members, subproblem)
            elif subproblem.rounds > 2 and (narrower := self._narrower(members, subproblem)):
                place = subproblem.depth - self._splitter.depths.start
                subproblem.is_open, again = False, [(others[place], others) for others in narrower]
                for one, _ in again:
                    one.is_open = True
            else:
                self._bound(subproblem, subproblem.multipliers[0] if subproblem.rounds > 2 else None, ROUND)
                lowered = before - subproblem.bound > STALLED * abs(before)
                if subproblem.rounds > 2 and (subproblem.rounds >= STEPS / ROUND or not lowered):
                    again = []
                    if beam:
                        beam = False
                        self._beam(subproblem)
            for one, others in again:
                heapq.heappush(heap, (-one.bound, next(order), one, others))

    def _narrower(self, members: list[Subproblem], one: Subproblem) -> list[list[Subproblem]]:
        """The classes that a class is made of, bounded by the multipliers of `one`; [] if it cannot be split."""
        if id(members) not in self._split:
            self._split[id(members)] = self._splitter.narrower(one)
            for others in self._split[id(members)]:
                self._lower(others, one.multipliers[0], *self._bounds_of_class(others[0], one.multipliers[0]))
            self._classes += self._split[id(members)]
        return self._split[id(members)]

    def _look_for_any(self) -> None:
        """Look for an architecture, if there is none yet: at the largest depth, then at half of it, and so on."""
        hopeful = self._hopeful()
        depths = sorted({one.depth for one in hopeful})
        while depths and self.found is None:
            for subproblem in [one for one in hopeful if one.depth == depths[-1]][:LOOKS]:
                self._beam(subproblem)
            depths = depths[: len(depths) // 2]

    def _beam(self, subproblem: Subproblem) -> None:
        if BEAM_SUBPROBLEMS:
            with contextlib.suppress(TooManyLabels):
                self._label(subproblem, BEAM)

    def _solve_all(self) -> None:
        """Solve subproblems, highest bound first, until the best score reaches every bound that is left."""
        unsolved = -math.inf
        for subproblem in self._hopeful():
            if subproblem.bound < self.score:
                break
            self._report("solving", max(unsolved, subproblem.bound))
            try:
                self._label(subproblem)
                subproblem.tried, subproblem.bound = True, -math.inf
            except TooManyLabels:
                unsolved = max(unsolved, subproblem.bound)

    def _hopeful(self) -> list[Subproblem]:
        """The subproblems that may still hold the optimum or a tie with it, highest bound first."""
        tasks = itertools.chain(*self._classes)
        hopeful = [one for one in tasks if one.is_open and one.bound >= self.score and one.bound > -math.inf]
        return sorted(hopeful, key=lambda subproblem: -subproblem.bound)

    # --- one subproblem ---

    def _bound_free(self, members: list[Subproblem]) -> None:
        """Bound a class of subproblems as if nothing had a price. Those that differ in costs alone share the bounds."""
        one = members[0]
        program, scores = one.program, self._splitter.block_scores(one)
        costs = id(program) if self._minimised else (program.widths, id(program.activations))
        key = (id(scores), costs, one.first, one.last, one.band)
        nothing = np.zeros(len(program.limits))
        if key not in self._free:
            self._free[key] = self._bounds_of_class(one, nothing)
        self._lower(members, nothing, *self._free[key])

    def _bound_class(self, members: list[Subproblem], one: Subproblem) -> None:
        """Bound a whole class by the usual multipliers of one of its members."""
        multipliers = short(self._usual(one) / one.program.limits)
        self._lower(members, multipliers, *self._bounds_of_class(one, multipliers))
        for member in members:
            member.rounds = max(1, member.rounds)

    def _bounds_of_class(self, one: Subproblem, multipliers: Floats) -> tuple[Floats, Floats]:
        """The bounds at every depth, and the slack in each."""
        if (at_every_depth := self._splitter.of_every_depth(one)) is None:
            return np.full(len(self._splitter.depths), -np.inf), np.zeros(len(self._splitter.depths))
        return bounds_by_depth(*at_every_depth, self._splitter.depths, multipliers)

    def _lower(self, members: list[Subproblem], multipliers: Floats, bounds: Floats, slack: Floats) -> None:
        for member, bound, more in zip(members, bounds.tolist(), slack.tolist(), strict=True):
            if bound < member.bound:
                member.bound, member.proven, member.multipliers = bound, bound - more, [multipliers]

    def _bound(self, subproblem: Subproblem, multipliers: Floats | None, steps: int = STEPS) -> None:
        """Lower the subproblem's bound, at most down to the best score, from `multipliers` or from the usual ones."""
        paths = self._splitter.path_problem(subproblem)
        assert paths is not None  # else it had no bound to lower
        if multipliers is None:
            multipliers = self._usual(subproblem) / paths.limits
        lowest = lowest_objective(paths)
        descent = subgradient_descent(paths, multipliers, max(self.score, lowest), steps)
        if descent.choices is not None:
            self._meet(candidate_of(subproblem, paths, descent.choices), descent.objective)
        if descent.bound >= subproblem.bound:
            return
        subproblem.bound = descent.bound if descent.bound > lowest else -math.inf
        lower = descent.relaxations[:: max(1, len(descent.relaxations) // RELAXATIONS)][:RELAXATIONS]
        subproblem.multipliers = [relaxation.multipliers for relaxation in lower]
        subproblem.proven = lower[0].bound - lower[0].slack
        if math.isfinite(subproblem.bound):
            for key in self._alike(subproblem):
                self._multipliers.setdefault(key, {})[subproblem.depth] = subproblem.multipliers[0] * paths.limits

    def _alike(self, subproblem: Subproblem) -> list[tuple[object, ...]]:
        """The keys under which multipliers are kept for like subproblems, most alike first."""
        program = subproblem.program
        kind = (self.problem.space.templates[program.template].ffn, program.metrics)
        outer = (subproblem.first, subproblem.last, subproblem.band)
        return [(program.template, *kind, *outer), (*kind, *outer[1:]), kind]

    def _usual(self, subproblem: Subproblem) -> Floats:
        """The multipliers, times limits, of the most alike subproblem whose bound was lowered."""
        for key in self._alike(subproblem):
            if by_depth := self._multipliers.get(key):
                return by_depth[min(by_depth, key=lambda depth: abs(depth - subproblem.depth))]
        scores = self._splitter.block_scores(subproblem)[subproblem.depth - self._splitter.depths.start]
        sums = len(subproblem.program.limits)
        return np.full(sums, np.abs(scores).max() / max(1, sums))

    def _label(self, subproblem: Subproblem, beam: int | None = None) -> None:
        """Solve the subproblem, or with `beam` look for a good architecture in it."""
        paths = self._splitter.path_problem(subproblem)
        assert paths is not None  # else it had no bound
        self.solved += beam is None

        def count(labels: int) -> None:
            self.labels += labels
            self._report("solving", subproblem.bound)

        relaxations = [LagrangianRelaxation(paths, multipliers) for multipliers in subproblem.multipliers]
        optima = solve(paths, self.score, relaxations, beam, count)
        if not optima:
            return
        score = paths.objective(optima[0])
        candidates = [candidate_of(subproblem, paths, choices) for choices in optima]
        if beam is not None:
            self._meet(candidates[0], score)
            return
        if score == self.score and self.best is not None:
            candidates.append(self.best)
        self.best, self.score = min(candidates, key=self._key), score

    def _meet(self, candidate: Candidate, objective: float) -> None:
        """Keep a candidate that bounding or a beam search met, if it is the best so far."""
        # A subproblem that is not split yet may rate it too high.
        score = objective if self._minimised else self._splitter.score_of(candidate)
        if score > self.score:
            self.met, self.best, self.score = candidate, None, score

    def _key(self, candidate: Candidate) -> tuple[object, ...]:
        """The sort key that decides between equal scores."""
        problem, template = self.problem, self.problem.space.templates[candidate.template]
        a = problem.space.architecture(candidate)
        costs = tuple(problem.value(metric, candidate) for metric in problem.budget.metrics)
        decoder = sum(counts.block_parameters(a, block) for block in a.blocks)
        weights = -decoder if problem.prefers_weights else 0
        return costs, -template.context, weights, a.parameters, candidate

    def _report(self, step: str, bound: float) -> None:
        """Report progress. Raises _OutOfTime after the deadline."""
        if time.monotonic() > self.deadline:
            raise _OutOfTime
        self.on_progress(step, self.score, bound)
