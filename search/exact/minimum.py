"""The least that a metric can be within the other budgets, and an architecture that costs so little.

A metric that is a sum is minimised by one exact search. Of one that is the greatest of several sums, the least of each
is a bound from below, and what it leads to a bound from above; between the two, limits are tried until it is proven
that nothing costs less.
"""

from __future__ import annotations

import itertools
import math

from merino_edge.search.budget import Metric
from merino_edge.search.exact.solver import UNBOUNDED, ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import Score
from merino_edge.search.space import Candidate

NEAR = 1e-9  # of the value: with a bound from below so near, the next limit is just below the value


def minimum(problem: Problem, metric: Metric) -> tuple[float, Candidate] | None:
    """The least value of `metric` within the budgets of `problem`, its own limit aside, and a genome that has it; None
    where nothing meets the others."""
    nothing = Score("least", block=lambda model, block, depth, cut: 0.0, sees_ffn_only=True)
    best, floor, limit = None, 0.0, UNBOUNDED
    for which in itertools.count():
        limited = problem.limited(problem.budget.within(metric, limit), nothing)
        found = ExactSolver(limited, minimise=metric, which=which).solve()
        if found.candidate is not None:
            template = found.candidate.template
            best = problem.value(metric, problem.space.architecture(found.candidate), template), found.candidate
            floor, sums = max(floor, -found.score), max(map(len, problem.metric_cost(metric, template).alternatives))
            if sums == 1 or best[0] <= floor:
                break
        elif best is None or limit == math.nextafter(best[0], 0):
            break
        else:
            floor = limit
        below, middle = math.nextafter(best[0], 0), (floor + best[0]) / 2
        limit = middle if which + 1 >= sums and best[0] - floor > NEAR * best[0] else below
    return best
