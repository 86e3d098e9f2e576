"""The exact Pareto front of score against one cost. At every point, no architecture scores more at that cost or less.

The front runs from the lowest cost within the budgets to the cost beyond which the score no longer rises. Each point is
solved exactly under its own limit (`merino_edge.search.exact.solver`). Among equal scores the cheapest is taken, so no
point is dominated. The next limit lies in the widest gap between points, until there are enough points or no more
exist.

The report `NAME.json` has kind "pareto_front" and schema 1. `complete` says whether the front has no other points:

    {"metric": "decode_ms@256", "label", "unit", "score": {"name": "effective", ...}, "complete": false,
     "points": [{"limit": 5.0, "value", "score", "bound", "costs": {...}, "id", "architecture": {...},
                 "precisions": ["int4", ...] of blocks, where the space opens them}, ...],
     "references": [{"name", "score", "value": number or null, "notes": [...], "architecture": {...}}, ...],
     "budgets": {...}, "precision": "int4", "target": "rtx" or null, "space": {"name", "size", "form"},
     "table": {"name", "sha256", "estimated", "device"} or null}
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merino_edge.errors import InputError
from merino_edge.search.budget import Metric
from merino_edge.search.exact.certificate import Known
from merino_edge.search.exact.minimum import minimum
from merino_edge.search.exact.solver import UNBOUNDED, ExactSolver
from merino_edge.search.infeasible import infeasibility_error
from merino_edge.search.problem import Problem
from merino_edge.search.space import Candidate

KIND = "pareto_front"
SCHEMA_VERSION = 1

Part = Callable[[str, Callable[[], Any]], Any]  # (name, what makes the part) -> the part, as JSON


@dataclass(frozen=True)
class Point:
    """The best candidate that costs at most `limit`, with its cost `value`, its score and the proven bound."""

    limit: float
    value: float
    candidate: Candidate
    score: float
    bound: float


@dataclass(frozen=True)
class Front:
    """The points by rising cost. `complete` says that the front has no point between them."""

    metric: Metric
    problem: Problem
    points: tuple[Point, ...]
    complete: bool


def pareto_front(
    problem: Problem,
    metric: Metric,
    count: int,
    on_point: Callable[[int], None] = lambda points: None,
    part: Part = lambda name, make: make(),
) -> Front:
    """Find up to `count` points of score against `metric`, within the problem's other budgets.

    `on_point` gets the number of points so far. `part` keeps the solution of each limit, for a front that was
    interrupted (merino_edge.unfinished). Raises BudgetError where nothing meets the other budgets. Raises
    InputError for fewer than two points, or for a score that is not a sum over blocks.
    """
    if count < 2:
        raise InputError(f"a front of {count} points", "ask for at least 2")
    metric = problem.cost_model.resolve(metric, problem.space)
    highest = dict(problem.budget.limits).get(metric, UNBOUNDED)
    problem = Problem(problem.space, problem.budget.within(metric, highest), problem.score, problem.cost_model)

    known: dict[float, Known] = {}  # by the values of the points

    def solve(limit: float, cheaper: float = math.nan) -> Point | None:
        """`cheaper`: the value of a point within the limit."""

        def found() -> list[Any] | None:
            limited = problem.limited(problem.budget.within(metric, limit))
            certificate = ExactSolver(limited, known=known.get(cheaper)).solve()
            if certificate.candidate is None or certificate.known is None:
                return None
            known.setdefault(problem.value(metric, certificate.candidate), certificate.known)
            return [*certificate.candidate, certificate.score, certificate.bound]

        if (solution := part(repr(limit), found)) is None:
            return None
        template, choices, score, bound = solution
        candidate = Candidate(template, tuple(choices))
        value = problem.value(metric, candidate)
        return Point(value if limit == UNBOUNDED else limit, value, candidate, score, bound)

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
        point = solve(gap.limit, gap.low)
        assert point is not None  # the lower point is within this limit
        if point.value > gap.low:
            points[point.value] = point
            on_point(len(points))
            gaps.append(_Gap(gap.low, gap.known, point.value))
        if not gap.last:
            low, last_try = (gap.low, True) if point.value == gap.low else (point.value, False)
            gaps.append(_Gap(low, gap.limit, gap.high, last_try))
    return Front(metric, problem, tuple(points[value] for value in sorted(points)), not gaps)


@dataclass(frozen=True)
class _Gap:
    """The costs between two points of the front, where other points may be.

    Every limit from `low` to `known` gives the lower point. If `last`, the next limit is the highest one below `high`.
    Its solution is the upper point's neighbour.
    """

    low: float
    known: float
    high: float
    last: bool = False

    @property
    def width(self) -> float:
        return math.log(self.high / self.low) if self.low > 0 else math.inf

    @property
    def limit(self) -> float:
        middle = math.sqrt(self.known * self.high)
        below = math.nextafter(self.high, 0)
        return below if self.last else min(max(middle, self.known), below)
