"""Models that searches with a latency table find: what such a table is checked on beside models drawn at random.

An optimum under a budget is picked among millions, and so preferably where the table errs low: the winner's curse. Its
measured times are therefore compared apart. The budgets lie evenly among the times of random models, and the scores
take turns, so that the optima differ. Where a search is not finished in time, its best model so far counts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.latency.measurement import Mode
from merino_edge.latency.table import LatencyTable
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.costs import CostModel
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import parse_score
from merino_edge.search.space import Space

SCORES = ("exit", "effective", "parameters")
DRAWN = 100  # models whose times say where budgets can lie
QUANTILES = 0.05, 0.9  # of these times: the lowest and the highest budget


def found_models(
    space: Space,
    table: LatencyTable,
    mode: Mode,
    *,
    count: int,
    seconds: float,
    without: Collection[Architecture] = (),
) -> list[Architecture]:
    """At most `count` different optima of `space` under budgets on `mode` at the table's default length.

    All searches together take about `seconds`. Models in `without` are left out. Returns what was found so far where
    the table does not cover the space.
    """
    deadline_s, found = time.monotonic() + seconds, dict.fromkeys(without)
    cost_model = CostModel(table.precision, table)
    metric = Metric(f"{mode}_ms", min(table.default_length, space.contexts[-1]))
    scores = [parse_score(name) for name in SCORES]
    try:
        problem = Problem(space, Budget(((metric, 1.0),)), scores[0], cost_model)
        for number, limit in enumerate(_limits(problem, metric, 2 * count)):
            left_s = deadline_s - time.monotonic()
            if len(found) - len(without) >= count or left_s <= 0:
                break
            each = problem.limited(Budget(((metric, limit),)), scores[number % len(scores)])
            best = ExactSolver(each, 2 * left_s / (2 * count - number)).solve().candidate
            if best is not None:
                found.setdefault(space.architecture(best))
    except InputError:
        pass
    return list(found)[len(without) :]


def _limits(problem: Problem, metric: Metric, count: int) -> list[float]:
    """Budgets among the times of random models, in an order whose beginning is spread as evenly as all of it."""
    rng, templates = random.Random(2), set(problem.templates)
    drawn = [candidate for _ in range(DRAWN) if (candidate := problem.space.sample(rng)).template in templates]
    values = sorted(problem.value(metric, c) for c in drawn)
    if not values:
        return []
    low, high = (quantile * (len(values) - 1) for quantile in QUANTILES)
    limits = [values[round(low + (high - low) * number / max(1, count - 1))] for number in range(count)]
    return [limit for start in (0, 1) for limit in limits[start::2]]
