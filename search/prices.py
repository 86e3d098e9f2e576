"""Shadow prices: what a little more of each budget would be worth, and which budgets have slack.

A price is found as the optimum was: exactly, with one budget raised by RAISE and the others as they are. The optimum
that is known is where each of these searches starts. A budget whose price is 0 does not bind near its limit.
"""

from __future__ import annotations

from dataclasses import dataclass

from merino_edge.search.budget import Metric
from merino_edge.search.exact.solver import ExactSolver, Known
from merino_edge.search.result import SearchResult

RAISE = 0.1  # share; a space is so coarse that less would often buy no whole layer
MIN_SECONDS = 10.0  # for each price at least; at most as long as the proof took
SLACK = 0.9  # share of a budget below which what is left of it is called slack
GRID = 1e-9  # share of a score by which sums on the solver's grid may differ from it


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
        unit, share = self.metric.kind.unit, self.used / self.limit
        raised = f"{self.limit * (1 + RAISE) / unit:.4g}"
        line = f"{self.metric.label}: {self.used / unit:.4g} of {self.limit / unit:.4g} used ({100 * share:.3g} %)"
        if not self.binds:
            nothing = f"{raised} would change nothing"
            return f"slack: {line}; its price is 0, {nothing}" if share < SLACK else f"{line}; {nothing}"
        if not self.gain_percent:
            return f"{line}; what {raised} would change was not proven in time"
        least = "" if self.proven else "at least "
        return f"{line}; {raised} would raise the score by {least}{self.gain_percent:.3g} %"


def prices(result: SearchResult, seconds: float | None = None) -> list[Price]:
    """The price of every budget, each within `seconds`; none where the result is not proven optimal."""
    problem, certificate, total = result.problem, result.certificate, result.total
    if certificate is None or result.gap_percent != 0 or problem.score.block is None or total <= 0:
        return []
    known = Known(result.candidate, total * (1 - GRID), {}, {}, {})
    found = []
    for metric, limit in problem.budget.limits:
        raised = problem.limited(problem.budget.within(metric, limit * (1 + RAISE)))
        best = ExactSolver(raised, seconds or max(MIN_SECONDS, certificate.seconds), known=known).solve()
        used = problem.value(metric, result.candidate)
        gain_percent = 100 * max(0.0, best.score / total - 1)
        found.append(Price(metric, limit, used, gain_percent, best.gap_percent <= 200 * GRID))
    return found
