"""The models that a profile measures beside random ones: optima where there is time for it, and good ones elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest

from helpers.small_spaces import SMALL
from merino_edge.latency.measurement import MODES, Mode
from merino_edge.latency.table import LatencyTable
from merino_edge.search import found_models as module
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.costs import CostModel
from merino_edge.search.exact.certificate import Certificate
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.found_models import SCORES, found_models
from merino_edge.search.problem import Problem
from merino_edge.search.score import parse_score

WriteTable = Callable[..., LatencyTable]
SECONDS = 600.0  # more than any machine needs; the searches here take milliseconds
FEW = replace(SMALL, blocks=(2,), widths=SMALL.widths[:2], vocabularies=SMALL.vocabularies[:1])


@pytest.mark.parametrize("mode", MODES)
def test_each_found_model_is_the_best_of_all_that_are_as_fast(write_table: WriteTable, mode: Mode) -> None:
    table = write_table(FEW, "int8")
    found = found_models(FEW, table, mode, count=4, seconds=SECONDS)
    assert len(found) == len(set(found)) >= 2
    scores, all_models = [parse_score(name) for name in SCORES], [FEW.architecture(g) for g in FEW.candidates()]
    for a in found:
        as_fast = [other for other in all_models if table.model_ms(other, mode) <= table.model_ms(a, mode)]
        assert any(score.total(a) == max(map(score.total, as_fast)) for score in scores)
    assert not set(found) & set(found_models(FEW, table, mode, count=4, seconds=SECONDS, without=found))


def test_without_time_for_a_proof_the_best_random_model_is_improved(
    write_table: WriteTable, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "DRAWN", 8)
    nothing = Certificate(None, float("-inf"), float("inf"), 0, 0, 0, 0.0)
    monkeypatch.setattr(ExactSolver, "solve", lambda self: nothing)
    table = write_table(FEW, "int8")
    found = found_models(FEW, table, "decode", count=3, seconds=1.0)
    assert found and len(set(found)) == len(found)
    drawn = [
        value
        for value, _ in module._drawn(
            Problem(FEW, Budget(()), parse_score("exit"), CostModel("int8", table)), Metric("decode_ms", 64)
        )
    ]
    assert all(table.model_ms(a, "decode") <= max(drawn) for a in found)


def test_a_table_that_does_not_cover_the_space_gives_none(write_table: WriteTable) -> None:
    table = write_table(SMALL, "int8")
    wider = replace(SMALL, widths=(*SMALL.widths, 2 * SMALL.widths[-1]))
    assert found_models(wider, table, "decode", count=3, seconds=1.0) == []
