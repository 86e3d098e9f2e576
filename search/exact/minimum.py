"""The minimum of one metric within the other budgets, and a candidate that reaches it.

One exact search minimises a metric that is a sum. A metric that is a maximum of several sums needs more. The minimum of
each sum is a lower bound, and the candidate it leads to gives an upper bound. Then limits between the two bounds are
tried until it is proven that nothing costs less.
"""

from __future__ import annotations

import itertools
import math

from merino_edge.search.budget import Metric
from merino_edge.search.exact.solver import UNBOUNDED, ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import Score
from merino_edge.search.space import Candidate

NEAR = 1e-9  # share of the value: if the lower bound is so near, the next limit tried is just below the value


def minimum(problem: Problem, metric: Metric) -> tuple[float, Candidate] | None:
    """The minimum of `metric` within the other budgets of `problem`, and a candidate that has it.

    The metric's own limit is ignored. The result is None where no architecture meets the other budgets.
    """
    zero = Score("zero", block=lambda model, block, depth, cut: 0.0, sees_ffn_only=True)
    best, floor, limit = None, 0.0, UNBOUNDED
    for which in itertools.count():
        limited = problem.limited(problem.budget.within(metric, limit), zero)
        certificate = ExactSolver(limited, minimise=metric, which=which).solve()
        if certificate.candidate is not None:
            candidate = certificate.candidate
            best = problem.value(metric, candidate), candidate
            floor = max(floor, -certificate.score)
            sums = max(map(len, problem.metric_cost(metric, candidate.template).alternatives))
            if sums == 1 or best[0] <= floor:
                break
        elif best is None or limit == math.nextafter(best[0], 0):
            break
        else:
            floor = limit
        below, middle = math.nextafter(best[0], 0), (floor + best[0]) / 2
        limit = middle if which + 1 >= sums and best[0] - floor > NEAR * best[0] else below
    return best
