"""Prices of budgets: those of brute force, with slack where there is slack."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.small_spaces import MIXED, SMALL
from merino_edge.search import prices as module
from merino_edge.search.brute_force import brute_force
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.prices import RAISE, Price, prices, uses
from merino_edge.search.result import SearchConfig, run_search
from merino_edge.search.score import parse_score
from merino_edge.search.space import Space


@pytest.mark.parametrize(
    ("space", "limits"),
    [
        (SMALL, {"parameters": 2e6, "flops": 1e12}),
        (SMALL, {"weight_mb@int8": 2.0, "flops": 1.5e9}),
        (MIXED, {"weight_mb@int4": 1.0, "kv_mb": 0.3}),
    ],
)
def test_a_price_is_the_gain_of_the_raised_budget(space: Space, limits: dict[str, float]) -> None:
    result = run_search(SearchConfig(space, Budget.of(limits), parse_score("exit:shared_layer=0.1"), "int8"))
    found = prices(result)
    assert [price.metric.key for price in found] == list(limits)
    for price in found:
        raised = result.problem.limited(result.problem.budget.within(price.metric, price.limit * (1 + RAISE)))
        best = brute_force(raised)
        assert price.proven and price.gain_percent == pytest.approx(100 * (best.score / result.total - 1), abs=1e-6)
        assert price.used == result.problem.value(price.metric, result.candidate)


def test_slack_is_said() -> None:
    result = run_search(SearchConfig(SMALL, Budget.of({"parameters": 1e9, "flops": 1e9}), parse_score("exit"), "int8"))
    slack, binding = prices(result)
    assert not slack.binds and str(slack).startswith("slack: parameters (M): ") and "its price is 0" in str(slack)
    assert binding.binds and "would raise the score by" in str(binding)
    assert "1.1 would raise" in str(binding)  # in the unit that is shown, 10^9


def test_what_is_not_proven_is_said() -> None:
    price = Price(Metric.parse("decode_ms@64"), 5.0, 4.0, 2.0, proven=False)
    assert price.binds and "5.5 would raise the score by at least 2 %" in str(price)
    assert "not proven in time" in str(Price(price.metric, 5.0, 4.0, 0.0, proven=False))
    assert str(price).startswith("decode step (ms) @ 64: 4 of 5 used (80 %)")


def test_prices_start_from_what_the_search_knew(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each solver gets the scores, the costs and the prices of the first, and the time is for all of them."""
    budget = Budget.of({"weight_mb@int8": 2.0, "flops": 1.5e9})
    result = run_search(SearchConfig(SMALL, budget, parse_score("exit"), "int8"))
    assert result.certificate is not None
    asked: list[ExactSolver] = []

    class Watched(ExactSolver):
        def __init__(self, *arguments: Any, **options: Any) -> None:
            super().__init__(*arguments, **options)
            asked.append(self)

    monkeypatch.setattr(module, "ExactSolver", Watched)
    found = prices(result, 1000.0)
    assert all(price.proven for price in found)
    for solver in asked:
        assert solver.problem.budget.metrics == result.problem.budget.metrics
        assert solver.problem._block_cost_cache is result.problem._block_cost_cache
        assert solver._splitter.raw is result.certificate.known.raw
    assert len(result.problem._block_cost_cache) == 1
    assert all(solver.deadline - solver.began <= 1000.0 for solver in asked)
    assert sum(solver.deadline - solver.began for solver in asked) <= 1500.0
    assert [price.used for price in prices(result, 0.0)] == [price.used for price in found]


def test_how_much_is_used_is_said_without_prices() -> None:
    result = run_search(SearchConfig(SMALL, Budget.of({"flops": 1e9}), parse_score("exit"), "int8"))
    (line,) = uses(result)
    assert line.startswith("GFLOPs of 1024 tokens, head excluded: ") and line.endswith(" %)")
    assert str(prices(result)[0]).startswith(line)


def test_without_a_proof_there_are_no_prices() -> None:
    options = {"iterations": 1, "population": 2, "parents": 1, "seed": 0}
    budget = Budget.of({"flops": 20e9})
    result = run_search(SearchConfig(SMALL, budget, parse_score("exit"), "int8", solver="evolution", options=options))
    assert result.gap_percent and prices(result) == []
