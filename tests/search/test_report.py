"""What is said of a search's result."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from helpers.formula_table import write_formula_table
from helpers.small_spaces import SMALL
from merino_edge.search.budget import Budget
from merino_edge.search.report import verdict
from merino_edge.search.result import SearchConfig, run_search
from merino_edge.search.score import parse_score

OPEN = replace(SMALL, layers=(1, 2, 3), shared=(False, True))


def said(limits: dict[str, float], spec: str, *, more_weights: bool = True) -> list[str]:
    config = SearchConfig(OPEN, Budget.of(limits), parse_score(spec), "fp16", more_weights=more_weights)
    return [line for line in verdict(run_search(config)) if "repeat weights" in line]


def test_a_model_that_repeats_weights_needlessly_is_named() -> None:
    """Older results go to fewer weights where nothing is lost by it, and the paper's score loses nothing."""
    (line,) = said({"kv_mb@64": 1.0}, "paper", more_weights=False)
    assert "with weights of their own they keep the budgets too" in line and line.endswith("--score counting")
    assert not said({"kv_mb@64": 1.0}, "paper")  # the tie goes to more weights
    assert not said({"kv_mb@64": 1.0}, "counting")


def test_sharing_that_the_budget_asks_for_is_not() -> None:
    smallest = OPEN.architecture(next(iter(OPEN.candidates())))
    assert not said({"weight_mb@fp16": 1.02 * smallest.weight_bytes("fp16") / 1e6}, "paper")


def test_times_and_bytes_of_different_targets_are_said(tmp_path: Path) -> None:
    table = write_formula_table(tmp_path, SMALL, "int8")
    table.header["backend"] = "onnxruntime-cpu"
    for target, words in (("rtx", "timed bundles for onnxruntime, but bytes are counted for rtx"), ("onnxruntime", "")):
        config = SearchConfig(SMALL, Budget(), parse_score("paper"), "int8", table, target=target)
        lines = [line for line in verdict(run_search(config)) if "timed bundles" in line]
        assert len(lines) == bool(words) and all(words in line for line in lines)


@pytest.mark.parametrize("spec", ["paper", "counting"])
def test_the_last_tie_goes_to_more_weights_unless_memory_has_a_budget(spec: str) -> None:
    def found(limits: dict[str, float]) -> int:
        return run_search(SearchConfig(OPEN, Budget.of(limits), parse_score(spec), "fp16")).architecture.parameters

    plenty = {"weight_mb@fp16": 1e6}
    assert found({"kv_mb@64": 1e6}) >= found({"kv_mb@64": 1e6} | plenty)
    assert (found({}) > found(plenty)) == (spec == "paper")
