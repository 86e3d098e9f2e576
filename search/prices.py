"""Shadow prices: what a little more of each budget would be worth, and which budgets have slack.

A price is found as the optimum was: exactly, with one budget raised by RAISE and the others as they are. Each of these
searches starts from what the solver of the optimum knew. A budget whose price is 0 does not bind near its limit.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

from merino_edge.search.budget import Budget, Metric
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.result import SearchResult

RAISE = 0.1  # share; a space is so coarse that less would often buy no whole layer
SLACK = 0.9  # share of a budget below which what is left of it is called slack
NOTHING = 1e-7  # percent: a gap or a gain below it is rounding


@dataclass(frozen=True)
class Price:
    """A budget, how much of it the optimum uses, and by how much the score rises if it is raised by RAISE.

    Without a proof `gain_percent` is the least that it can be.
    """

    metric: Metric
    limit: float
    used: float
    gain_percent: float
    proven: bool

    @property
    def binds(self) -> bool:
        """Whether more of this budget is worth anything."""
        return self.gain_percent > 0 or not self.proven

    def __str__(self) -> str:
        raised = f"{self.limit * (1 + RAISE) / self.metric.kind.unit:.4g}"
        line, share = use(self.metric, self.limit, self.used), self.used / self.limit
        if not self.binds:
            nothing = f"{raised} would change nothing"
            return f"slack: {line}; its price is 0, {nothing}" if share < SLACK else f"{line}; {nothing}"
        if not self.gain_percent:
            return f"{line}; what {raised} would change was not proven in time"
        least = "" if self.proven else "at least "
        return f"{line}; {raised} would raise the score by {least}{self.gain_percent:.3g} %"


def use(metric: Metric, limit: float, used: float) -> str:
    """How much of a budget is used, in words."""
    unit = metric.kind.unit
    return f"{metric.label}: {used / unit:.4g} of {limit / unit:.4g} used ({100 * used / limit:.3g} %)"


def uses(result: SearchResult) -> list[str]:
    """How much of every budget the found architecture uses, a line each."""
    problem = result.problem
    return [use(metric, limit, problem.value(metric, result.candidate)) for metric, limit in problem.budget.limits]


def has_prices(result: SearchResult) -> bool:
    """Whether its budgets have prices: it has budgets, and is proven optimal for a score that is a sum over blocks."""
    return bool(
        result.problem.budget.limits
        and result.certificate is not None
        and result.certificate.known is not None
        and result.gap_percent == 0
        and result.total > 0
    )


def prices(result: SearchResult, seconds: float = math.inf) -> list[Price]:
    """The price of every budget, found in about `seconds` for all of them; [] where they have none."""
    if not has_prices(result):
        return []
    assert result.certificate is not None
    problem, total, known = result.problem, result.total, result.certificate.known
    deadline, limits, found = time.monotonic() + seconds, problem.budget.limits, []
    for number, (metric, limit) in enumerate(limits):
        # In the order that they have, so that the solvers share their arrays.
        raised = Budget(tuple((m, value * (1 + RAISE) if m == metric else value) for m, value in limits))
        share_s = max(0.0, deadline - time.monotonic()) / (len(limits) - number)
        best = ExactSolver(problem.limited(raised), share_s, known=known).solve()
        gain_percent = 100 * (best.score / total - 1)
        found.append(
            Price(
                metric,
                limit,
                used=problem.value(metric, result.candidate),
                gain_percent=gain_percent if gain_percent > NOTHING else 0.0,
                proven=best.gap_percent <= NOTHING,
            )
        )
    return found
