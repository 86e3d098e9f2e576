"""One line of a latency table: its statistics, and the lines that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.linear_table import measurements, table_text
from merino_edge.errors import ArtefactError
from merino_edge.latency.measurement import (
    Measurement,
    add_checksum,
    relative_half_width_percent,
    spread_percent,
)
from merino_edge.latency.table_file import load_table


@pytest.mark.parametrize(
    "line",
    [
        {},
        {"what": "layer"},
        {"what": []},
        {**next(measurements()).to_line(), "width": -1},
        {**next(measurements()).to_line(), "samples": []},
        {**next(measurements()).to_line(), "unit": "s"},
        {**next(measurements()).to_line(), "ffn": 3},
        {**next(measurements()).to_line(), "energy_mj": -1},
        {**next(measurements()).to_line(), "energy_mj": "much"},
        {**next(measurements()).to_line(), "cache": "tepid"},
        {**next(measurements()).to_line(), "failed": 3},
    ],
)
def test_a_sealed_line_that_is_no_measurement_is_refused(tmp_path: Path, line: dict[str, object]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(table_text(finished=False) + add_checksum(line) + "\n")
    with pytest.raises(ArtefactError, match="is not a measurement"):
        load_table(path, unfinished=True)


def test_one_outlier_is_ignored_and_many_are_flagged() -> None:
    assert spread_percent((1.0, 1.0, 1.0, 9.0, 1.0)) == 0
    assert spread_percent((1.0, 1.1, 0.9, 1.2, 0.8)) == pytest.approx(14.826)
    shape = {"before": 1, "after": 2}
    assert not Measurement("width_change", "decode", 1, shape, (*[1.0] * 9, 5.0)).unstable
    assert Measurement("width_change", "decode", 1, shape, (1.0, 1.1, 0.9)).unstable
    assert not Measurement("width_change", "decode", 1, shape, (1.0, 1.1, 0.9) * 40).unstable  # many know the median
    below_zero = Measurement("width_change", "decode", 1, shape, (-0.1, -0.2, 0.1))
    assert below_zero.unstable and below_zero.median_ms == 0 and below_zero.to_line()["spread_percent"] is None


@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=20))
@settings(max_examples=40, deadline=None)
def test_the_half_width_is_that_of_the_written_interval(samples: list[float]) -> None:
    m = Measurement("width_change", "decode", 1, {"before": 1, "after": 2}, tuple(samples))
    line = m.to_line()
    low, high = line["interval"]
    assert low <= line["median"] <= high
    assert relative_half_width_percent(samples) == pytest.approx(50 * (high - low) / line["median"])
    assert line["unstable"] == (relative_half_width_percent(samples) > 2.5)
    assert Measurement.from_line(line, "line 2") == m
