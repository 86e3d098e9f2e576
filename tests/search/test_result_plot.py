"""The plot of a search: score over milliseconds where there is a table, with everything to compare with."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from matplotlib.figure import Figure

from merino_edge.latency.table import LatencyTable
from merino_edge.search import result_plot
from merino_edge.search.budget import Budget
from merino_edge.search.builtin_spaces import DEMO, PAPER
from merino_edge.search.result import SearchConfig, SearchResult, run_search
from merino_edge.search.score import parse_score

WriteTable = Callable[..., LatencyTable]


def searched(limits: dict[str, float], table: LatencyTable | None) -> SearchResult:
    space = DEMO if table is None or table.header["family"]["head_dim"] == 32 else PAPER
    return run_search(SearchConfig(space, Budget.of(limits), parse_score("effective"), "int8", table))


@pytest.mark.parametrize(
    ("limits", "shown"),
    [
        ({"parameters": 3e6}, "decode_ms@64"),
        ({"parameters": 3e6, "prefill_ms@64": 1e3}, "prefill_ms@64"),
        ({"decode_ms@64": 1e3, "decode_ms@256": 3.0}, "decode_ms@256"),
    ],
)
def test_the_axis_is_a_time(limits: dict[str, float], shown: str, write_table: WriteTable) -> None:
    assert result_plot.shown_metric(searched(limits, write_table(DEMO, precision="int8"))).key == shown


def test_without_a_table_the_axis_is_the_budget_that_binds() -> None:
    assert result_plot.shown_metric(searched({"flops": 1e12, "parameters": 3e6}, None)).key == "parameters"
    assert result_plot.shown_metric(searched({}, None)).key == "parameters"


def drawn(result: SearchResult, path: Path, monkeypatch: pytest.MonkeyPatch) -> Figure:
    """The figure that the plot wrote."""
    figures: list[Figure] = []
    monkeypatch.setattr(result_plot, "save", lambda figure, path: figures.append(figure))
    result_plot.plot(result, path)
    return figures[0]


def test_everything_is_drawn(write_table: WriteTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    result = searched({"decode_ms@64": 60.0}, write_table(PAPER, precision="int8"))
    (axes,) = drawn(result, tmp_path / "a.png", monkeypatch).axes
    found = next(c for c in axes.collections if c.get_label() == "found").get_offsets()
    predicted_ms = result.problem.costs(result.candidate)["decode_ms@64"]
    assert found.tolist() == [[predicted_ms, result.total]]
    legend = axes.get_legend()
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == [
        *("drawn at random from space paper", "by hand: every layer alike", "public models", "found", "budget 60"),
    ]
    assert "opt-125m" in {text.get_text() for text in axes.texts}
    assert axes.get_xlabel() == "decode step (ms) @ 64, estimated"


def test_it_says_why_there_are_no_public_models(
    write_table: WriteTable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = searched({"decode_ms@64": 3.0}, write_table(DEMO, precision="int8"))
    (axes,) = drawn(result, tmp_path / "a.png", monkeypatch).axes
    assert axes.get_legend().get_title().get_text() == "no public models: the table has heads of 32, not 64"
