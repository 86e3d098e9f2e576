"""The error for budgets that no architecture meets. It names the budgets that bind, and the nearest value of each."""

from __future__ import annotations

from merino_edge.errors import BudgetError
from merino_edge.search.budget import Budget, Metric, spell_quantity
from merino_edge.search.exact.minimum import minimum
from merino_edge.search.problem import Problem

STEPS = 12  # bisection steps for the factor by which all budgets must grow


def infeasibility_error(problem: Problem) -> BudgetError:
    """The error for a problem that is proven to have no solution."""
    budget = problem.budget
    alone = {metric: _minimum(problem, Budget(((metric, limit),)), metric) for metric, limit in budget.limits}
    impossible = [metric for metric, limit in budget.limits if alone[metric] > limit]
    where = f"no architecture of space {problem.space.name} meets"
    if impossible:
        # Together with the other budgets, the minimum of an impossible one may be higher than alone.
        rest = budget.without(*impossible)
        nearest = {
            metric: _minimum(problem, rest.within(metric, 1.0), metric) or alone[metric] for metric in impossible
        }
        what = " and ".join(
            f"{_spell(problem, metric)} (the least possible is {spell_quantity(nearest[metric])})"
            for metric in impossible
        )
        return BudgetError(f"{where} {what}", f"raise {' and '.join(_options(impossible))}")
    together = " and ".join(_spell(problem, metric) for metric in budget.metrics)
    nearest = {metric: _minimum(problem, budget, metric) for metric in budget.metrics}
    sufficient = [metric for metric in budget.metrics if nearest[metric]]
    if sufficient:
        what = " or ".join(f"{metric.key} to {spell_quantity(nearest[metric])}" for metric in sufficient)
        return BudgetError(f"{where} {together} together", f"raise {what}, leaving the others as they are")
    factor = _common_factor(problem)
    return BudgetError(
        f"{where} {together} together, nor with any one of them raised", f"raise all of them, by {factor:.2f} or more"
    )


def _options(metrics: list[Metric]) -> list[str]:
    return list(dict.fromkeys(metric.kind.option for metric in metrics))


def _spell(problem: Problem, metric: Metric) -> str:
    return f"{metric.key} {spell_quantity(dict(problem.budget.limits)[metric])}"


def _minimum(problem: Problem, budget: Budget, metric: Metric) -> float:
    """The minimum of `metric` within the other budgets of `budget`; 0 where they cannot be met."""
    optimum = minimum(problem.limited(budget), metric)
    return optimum[0] if optimum else 0.0


def _common_factor(problem: Problem) -> float:
    """The factor by which all limits must grow together, rounded up to about three digits."""

    def met(factor: float) -> bool:
        grown = Budget(tuple((metric, limit * factor) for metric, limit in problem.budget.limits))
        first, limit = grown.limits[0]
        return 0 < _minimum(problem, grown, first) <= limit

    low, high = 1.0, 2.0
    while not met(high):
        low, high = high, high * 2
    for _ in range(STEPS):
        middle = (low + high) / 2
        low, high = (low, middle) if met(middle) else (middle, high)
    return high
