"""The error for impossible budgets names those that bind, and values that can be met."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest

from helpers.small_spaces import SMALL
from merino_edge.latency.table import LatencyTable
from merino_edge.search.budget import Budget, parse_quantity
from merino_edge.search.builtin_spaces import PAPER
from merino_edge.search.costs import CostModel
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.infeasible import infeasibility_error
from merino_edge.search.problem import Problem
from merino_edge.search.score import effective
from merino_edge.search.space import Space

WriteTable = Callable[..., LatencyTable]


def make_problem(space: Space, limits: dict[str, float], table: LatencyTable | None = None) -> Problem:
    problem = Problem(space, Budget.of(limits), effective(), CostModel("fp32" if table else "int8", table))
    return problem


def met(space: Space, limits: dict[str, float], table: LatencyTable | None = None) -> bool:
    return ExactSolver(make_problem(space, limits, table)).solve().candidate is not None


def test_an_impossible_budget_names_the_minimum_which_then_is_met() -> None:
    limits = {"parameters": 1e6, "flops": 60e9, "weight_mb@int8": 10.0}
    message = str(infeasibility_error(make_problem(PAPER, limits)))
    assert "parameters 1M (the least" in message and "weight_mb@int8 10 (the least" in message
    assert "flops" not in message and message.endswith("raise --params and --weight-mb")
    minima = [parse_quantity(part.split(")")[0]) for part in message.split("possible is ")[1:]]
    raised = {**limits, "parameters": minima[0], "weight_mb@int8": minima[1]}
    assert met(PAPER, raised)
    for key in ("parameters", "weight_mb@int8"):
        assert not met(PAPER, {**raised, key: raised[key] * 0.998})


@pytest.mark.parametrize("seed", range(4))
def test_the_minimum_of_a_piecewise_step_time_is_met(write_piecewise: WriteTable, seed: int) -> None:
    """Width projections are expensive here, so the fastest model is not the smallest."""
    table = write_piecewise(SMALL, seed=seed, projection_ms=1.0)
    message = str(infeasibility_error(make_problem(SMALL, {"decode_ms@64": 0.01, "parameters": 2e6}, table)))
    assert message.endswith("raise --decode-ms")
    minimum = parse_quantity(message.split("possible is ")[1].split(")")[0])
    assert met(SMALL, {"decode_ms@64": minimum, "parameters": 2e6}, table)
    assert not met(SMALL, {"decode_ms@64": minimum * 0.998, "parameters": 2e6}, table)


def test_budgets_that_exclude_each_other_each_have_a_way_out(write_table: WriteTable) -> None:
    """Width projections are expensive here. A fast model must be as wide as the embedding, a small one narrower."""
    table = write_table(SMALL, projection_ms=5.0)
    limits = {"parameters": 1_400_000.0, "decode_ms@64": 3.0}
    assert all(met(SMALL, {key: limit}, table) for key, limit in limits.items()) and not met(SMALL, limits, table)
    message = str(infeasibility_error(make_problem(SMALL, limits, table)))
    assert "no architecture of space small meets parameters 1.4M and decode_ms@64 3 together" in message
    assert message.endswith("leaving the others as they are")
    ways = re.findall(r"(parameters|decode_ms@64) to ([0-9.]+[KMG]?)", message)
    assert len(ways) == 2
    for key, text in ways:
        value = parse_quantity(text)
        assert met(SMALL, {**limits, key: value}, table)
        assert not met(SMALL, {**limits, key: value * 0.998}, table)


def test_where_no_single_budget_is_to_blame_all_must_grow(write_table: WriteTable) -> None:
    table = write_table(SMALL, projection_ms=5.0)
    # Fast against small, and again fast against small at another length and precision.
    limits = {"parameters": 1_400_000.0, "decode_ms@64": 3.0, "decode_ms@100": 3.1, "weight_mb@int4": 1.7}
    assert not met(SMALL, limits, table)
    message = str(infeasibility_error(make_problem(SMALL, limits, table)))
    assert "together, nor with any one of them raised" in message
    factor = float(re.findall(r"by ([0-9.]+) or more", message)[0])
    assert met(SMALL, {key: limit * factor * 1.01 for key, limit in limits.items()}, table)
    assert not met(SMALL, {key: limit * factor * 0.97 for key, limit in limits.items()}, table)


@pytest.mark.parametrize("limits", [{"parameters": 1.0}, {"parameters": 1.0, "kv_mb": 1e-9, "flops": 1.0}])
def test_a_refusal_is_one_line(limits: dict[str, float]) -> None:
    message = str(infeasibility_error(make_problem(SMALL, limits)))
    assert "\n" not in message and message.count("the least possible is") == len(limits)
