"""A score that is no function of the architecture is refused, at the search."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.random_results import OWN
from helpers.small_spaces import SMALL
from merino_edge.errors import InputError
from merino_edge.search.budget import Budget
from merino_edge.search.result import SearchConfig, run_search
from merino_edge.search.score import parse_score

UNSTEADY = """
import itertools, random

calls = itertools.count()

def random_each_time(model, block, depth, cut):
    return block.layers + random.random()

def grows(model, block, depth, cut):
    return block.layers + 1e-3 * next(calls)

def sees_other_blocks(model, block, depth, cut):
    return block.layers * model.blocks[0].width

def sees_parameters(model, block, depth, cut):
    return block.layers + model.parameters / 1e6

def whole_at_random(architecture):
    return architecture.layers + random.random()
"""
NAMES = ("random_each_time", "grows", "sees_other_blocks", "sees_parameters", "whole_at_random")


@pytest.mark.parametrize("name", NAMES)
def test_two_values_for_one_architecture_are_refused(tmp_path: Path, name: str) -> None:
    path = tmp_path / "unsteady.py"
    path.write_text(UNSTEADY)
    config = SearchConfig(SMALL, Budget.of({"parameters": 3e6}), parse_score(f"{path}:{name}"), "int4")
    with pytest.raises(InputError, match=rf"{name} gives .* and also .* for one architecture; it must depend on"):
        run_search(config)


@pytest.mark.parametrize("name", ["heads", "whole"])
def test_a_steady_score_is_searched(tmp_path: Path, name: str) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN)
    config = SearchConfig(SMALL, Budget.of({"parameters": 3e6}), parse_score(f"{path}:{name}"), "int4")
    assert run_search(config).gap_percent == 0
