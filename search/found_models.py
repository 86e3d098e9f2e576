"""Models that searches with a latency table find: what such a table is checked on beside models drawn at random.

An optimum under a budget is picked among millions, and so preferably where the table errs low: the winner's curse. Its
measured times are therefore compared apart. The budgets lie evenly among the times of random models, and the scores
take turns, so that the optima differ. In a large space an exact search takes too long. There the best random model is
changed for the better as long as there is time.
"""

from __future__ import annotations

import random
import time
from collections.abc import Collection, Sequence

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.latency.measurement import Mode
from merino_edge.latency.table import LatencyTable
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.costs import CostModel
from merino_edge.search.evolution import SECOND_MUTATION, mutate
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import parse_score
from merino_edge.search.space import Candidate, Space

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
        drawn = _drawn(problem, metric)
        exact = True  # until one search is not finished in its time: then the space is too large
        limits = _limits([value for value, _ in drawn], 2 * count)
        for number, limit in enumerate(limits):
            left_s = deadline_s - time.monotonic()
            if len(found) - len(without) >= count or left_s <= 0:
                break
            each = problem.limited(Budget(((metric, limit),)), scores[number % len(scores)])
            share_s = 2 * left_s / (len(limits) - number)
            best = None
            if exact:
                certificate = ExactSolver(each, share_s / 2).solve()
                best, exact = certificate.candidate, certificate.candidate is not None and certificate.gap_percent == 0
            if not exact:
                starts = [candidate for value, candidate in drawn if value <= limit] + ([best] if best else [])
                best = _climbed(each, starts, time.monotonic() + share_s / 2, random.Random(number))
            if best is not None:
                found.setdefault(space.architecture(best))
    except InputError:
        pass
    return list(found)[len(without) :]


def _climbed(problem: Problem, starts: list[Candidate], deadline_s: float, rng: random.Random) -> Candidate | None:
    """The best of `starts`, with changes that make it better until the time is over."""
    best = max(starts, key=problem.total, default=None)
    while best is not None and time.monotonic() < deadline_s:
        changed = mutate(problem.space, best, rng)
        if rng.random() < SECOND_MUTATION:
            changed = mutate(problem.space, changed, rng)
        if changed.template in problem.templates and problem.total(changed) > problem.total(best):
            best = changed if problem.feasible(changed) else best
    return best


def _drawn(problem: Problem, metric: Metric) -> list[tuple[float, Candidate]]:
    """Random models, each with its value of the metric, in ascending order."""
    rng, templates = random.Random(2), set(problem.templates)
    drawn = {candidate for _ in range(DRAWN) if (candidate := problem.space.sample(rng)).template in templates}
    return sorted((problem.value(metric, candidate), candidate) for candidate in drawn)


def _limits(values: Sequence[float], count: int) -> list[float]:
    """Budgets among the ascending values, in an order whose beginning is spread as evenly as all of it."""
    if not values:
        return []
    low, high = (quantile * (len(values) - 1) for quantile in QUANTILES)
    limits = [values[round(low + (high - low) * number / max(1, count - 1))] for number in range(count)]
    return [limit for start in (0, 1) for limit in limits[start::2]]
