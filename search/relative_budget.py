"""Budgets as a share: 0 % is the least that any architecture costs, 100 % what the best one costs without budgets.

So a budget below 100 % binds on any board, if no other one is tighter, and it can be met. Other budgets play no part
in it.
"""

from __future__ import annotations

from merino_edge.errors import InputError
from merino_edge.search.budget import Budget, Metric, parse_quantity
from merino_edge.search.costs import CostModel
from merino_edge.search.exact.minimum import minimum
from merino_edge.search.exact.solver import UNBOUNDED, ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import Score
from merino_edge.search.space import Space

PERCENT = "%"


def parse_percent(text: str, name: str) -> float:
    """The share that `text` spells, as 0.25 of "25%". Raises InputError that names `name`."""
    percent = parse_quantity(text.removesuffix(PERCENT), name)
    if percent > 100:
        raise InputError(f"{name} {text!r} is more than the best architecture needs", "give up to 100%, or a number")
    return percent / 100


def relative_limit(space: Space, metric: Metric, share: float, score: Score, cost_model: CostModel) -> float:
    """The value of `metric` at `share` of the way. Raises InputError for a score that is not a sum over blocks."""
    problem = Problem(space, Budget(((metric, UNBOUNDED),)), score, cost_model)
    best, least = ExactSolver(problem).solve().candidate, minimum(problem, metric)
    assert best is not None and least is not None  # nothing else is budgeted
    most = problem.value(metric, best)
    # Rounding must not exclude the best one.
    return most if share == 1 else min(most, least[0] + share * (most - least[0]))
