"""Budgets as a share of the way from the least possible to the best architecture's cost."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.search_verb import merino
from helpers.small_spaces import SMALL
from merino_edge.errors import InputError
from merino_edge.latency.table import LatencyTable
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.builtin_spaces import DEMO
from merino_edge.search.costs import CostModel
from merino_edge.search.problem import Problem
from merino_edge.search.relative_budget import parse_percent, relative_limit
from merino_edge.search.score import parse_score


def test_the_ends_are_those_of_brute_force() -> None:
    score, cost_model = parse_score("calibrated"), CostModel("int8")
    problem = Problem(SMALL, Budget(), score, cost_model)
    parameters = {candidate: SMALL.architecture(candidate).parameters for candidate in SMALL.candidates()}
    best = max(parameters, key=problem.total)
    low, high = min(parameters.values()), parameters[best]
    for share, expected in ((1e-9, low), (0.25, low + 0.25 * (high - low)), (1.0, high)):
        limit = relative_limit(SMALL, Metric("parameters"), share, score, cost_model)
        assert limit == pytest.approx(expected)


def test_two_boards_get_the_same_share_of_their_own_times(
    write_table: Callable[..., LatencyTable], tmp_path: Path
) -> None:
    limits = []
    for number, projection_ms in enumerate((0.01, 2.0)):
        table, out = write_table(DEMO, precision="int8", projection_ms=projection_ms), tmp_path / f"{number}.json"
        merino("--space", "demo", "--table", table.path, "--decode-ms", "25%@256", "--out", out)
        document = json.loads(out.read_text())
        ((key, limit),) = document["budgets"].items()
        assert key == "decode_ms@256" and 0.7 * limit < document["costs"][key] <= limit
        limits.append(limit)
    assert limits[0] < limits[1]


@pytest.mark.parametrize("text", ["0%", "-1%", "101%", "%", "nan%", "25%%"])
def test_what_is_no_share_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--decode-ms"):
        parse_percent(text, "--decode-ms")
