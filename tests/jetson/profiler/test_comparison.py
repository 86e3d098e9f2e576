"""Two tables side by side: what is faster, what is noise, and what is the machine's own slowness."""

from __future__ import annotations

from pathlib import Path

import pytest

from merino_edge.errors import InputError
from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.profiler.comparison import compare
from merino_edge.latency.measurement import Measurement
from merino_edge.latency.table import LatencyTable


def table(slowdown: float = 1.0, machine: float = 1.0, noise: float = 0.01, **header: object) -> LatencyTable:
    """Of three projections; `slowdown` times slower, on a machine that is `machine` times slower in all it does."""
    measured = [
        Measurement(
            "width_change", "decode", 64, {"before": 64, "after": after},
            tuple(after * slowdown * machine * (1 + noise * share) for share in (-1, -0.5, 0, 0.5, 1)),
            reference_ms={"decode warm": 0.5 * machine},
        )
        for after in (128, 256, 384)
    ]  # fmt: skip
    fields = {"device": device_card(), "backend": "onnxruntime-cpu", "precision": "fp32", **header}
    return LatencyTable(Path("t.jsonl"), fields, measured, {}, "")


def test_a_table_is_no_way_apart_from_itself() -> None:
    found = compare(table(), table())
    assert found["entries"] == 3 and found["median_apart_percent"] == 0 == found["apart"]
    assert found["different"] == [] and found["yardsticks"] == {"decode warm": 1.0}


def test_slower_parts_show_and_a_slower_machine_is_told_apart() -> None:
    slower = compare(table(), table(slowdown=1.1))
    assert slower["kinds"]["width_change decode"]["ratio"]["median"] == pytest.approx(1.1)
    assert slower["apart"] == 3 and slower["median_apart_percent"] == pytest.approx(200 * 0.1 / 2.1)
    assert slower["median_apart_from_yardsticks_percent"] == pytest.approx(slower["median_apart_percent"])
    busy = compare(table(), table(machine=1.5))
    assert busy["yardsticks"] == {"decode warm": pytest.approx(1.5)} and busy["median_apart_percent"] == pytest.approx(
        40
    )
    assert busy["median_apart_from_yardsticks_percent"] == pytest.approx(0)


def test_what_lies_within_the_intervals_is_no_difference() -> None:
    assert compare(table(noise=0.2), table(slowdown=1.05, noise=0.2))["apart"] == 0


def test_other_conditions_are_named_and_other_tables_refused() -> None:
    found = compare(table(), table(precision="int4"))
    assert found["different"] == ["precision: fp32, int4"] and found["median_apart_from_yardsticks_percent"] is None
    other = LatencyTable(Path("o.jsonl"), table().header, [], {}, "")
    with pytest.raises(InputError, match="share no entry"):
        compare(table(), other)
