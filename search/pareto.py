"""The exact trade-off between score and one cost: for every point, no architecture scores more at that cost or less.

The front runs from the least cost within the budgets to where more of it buys nothing. Each point is solved exactly
(merino_edge.search.exact.solver) under its own limit; among equal scores the cheapest is taken, so no point is dominated. A
limit in the widest gap left is tried next until there are as many points as asked for, or no more to be found.

Report `NAME.json`, kind "pareto_front", schema 1:

    {"metric": "decode_ms@256", "label", "unit", "score": {"name": "effective", ...}, "complete": false,
     "points": [{"limit": 5.0, "value", "score", "bound", "costs": {...}, "id", "architecture": {...}}, ...],
     "references": [{"name", "score", "value": number or null, "notes": [...], "architecture": {...}}, ...],
     "budgets": {...}, "precision": "int4", "space": {"name", "size", "form"},
     "table": {"name", "sha256", "estimated", "device"} or null}

`complete`: whether the front has no point besides these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from merino_edge.errors import InputError
from merino_edge.search.budget import Metric
from merino_edge.search.exact.minimum import minimum
from merino_edge.search.exact.solver import UNBOUNDED, ExactSolver
from merino_edge.search.infeasible import infeasibility_error
from merino_edge.search.problem import Problem
from merino_edge.search.space import Candidate

KIND = "pareto_front"
SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Point:
    """The best architecture that costs at most `limit`, what it costs and scores, and the proven bound on the score."""

    limit: float
    value: float
    candidate: Candidate
    score: float
    bound: float


@dataclass(frozen=True)
class Front:
    """Points by rising cost. `complete`: there is none between them."""

    metric: Metric
    problem: Problem
    points: tuple[Point, ...]
    complete: bool


def pareto_front(
    problem: Problem, metric: Metric, count: int, note: Callable[[int], None] = lambda points: None
) -> Front:
    """At most `count` points of score against `metric`, within the problem's other budgets. Raises BudgetError where
    nothing meets those, InputError for fewer than two points or a score that is not a sum over blocks."""
    if count < 2:
        raise InputError(f"a front of {count} points", "ask for at least 2")
    metric = problem.cost_model.resolve(metric, problem.space)
    most = dict(problem.budget.limits).get(metric, UNBOUNDED)
    problem = Problem(problem.space, problem.budget.within(metric, most), problem.score, problem.cost_model)

    def solve(limit: float) -> Point | None:
        limited = problem.limited(problem.budget.within(metric, limit))
        found = ExactSolver(limited).solve()
        if found.candidate is None:
            return None
        value = problem.value(metric, problem.space.architecture(found.candidate), found.candidate.template)
        return Point(value if limit == UNBOUNDED else limit, value, found.candidate, found.score, found.bound)

    last = solve(dict(problem.budget.limits)[metric])
    if last is None:
        raise infeasibility_error(problem)
    cheapest = minimum(problem, metric)
    assert cheapest is not None
    first = solve(cheapest[0])
    assert first is not None
    points = {point.value: point for point in (first, last)}
    gaps = [_Gap(first.value, first.value, last.value)] if first.value < last.value else []
    while gaps and len(points) < count:
        gap = gaps.pop(max(range(len(gaps)), key=lambda i: gaps[i].width))
        point = solve(gap.limit)
        assert point is not None  # the lower one costs less
        if point.value > gap.low:
            points[point.value] = point
            note(len(points))
            gaps.append(_Gap(gap.low, gap.known, point.value))
        if not gap.last:
            low, last_try = (gap.low, True) if point.value == gap.low else (point.value, False)
            gaps.append(_Gap(low, gap.limit, gap.high, last_try))
    return Front(metric, problem, tuple(points[value] for value in sorted(points)), not gaps)


@dataclass(frozen=True)
class _Gap:
    """Between two points of the front. Every limit from `low` to `known` gives the lower one. `last`: the next limit is
    the highest below `high`, whose answer is the neighbour of the upper point."""

    low: float
    known: float
    high: float
    last: bool = False

    @property
    def width(self) -> float:
        return math.log(self.high / self.low)

    @property
    def limit(self) -> float:
        middle = math.sqrt(self.known * self.high)
        below = math.nextafter(self.high, 0)
        return below if self.last else min(max(middle, self.known), below)
