"""The verdict on a table: its limits, and that no bad figure of any mode is called good."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.linear_table import table_text
from merino_edge.errors import ArtefactError
from merino_edge.latency.measurement import add_checksum
from merino_edge.latency.step import Step
from merino_edge.latency.table_file import from_compact, load_table, to_compact
from merino_edge.latency.verdict import USABLE_MAPE_PERCENT, Verdict, judge

FINE: dict[str, Any] = {"mape_percent": 3.0, "max_percent": 9.0, "low_percent": -4.0, "high_percent": 5.0}


def figures(**changed: Any) -> dict[str, Any]:
    return {**FINE, **changed}


@pytest.mark.parametrize(
    ("decode", "word", "says"),
    [
        (FINE, "good", ""),
        (figures(mape_percent=9.0), "usable", "decode is 9.0 % off on average, beyond 8 %"),
        (figures(max_percent=40.0), "usable", "decode is up to 40 % off"),
        (figures(mape_percent=15.1), "do not use", "decode is 15.1 % off on average, beyond 15 %"),
        (figures(low_percent=None), "do not use", "no time at all"),
        (figures(found=figures(mape_percent=20.0)), "do not use", "decode of found models is 20.0 % off"),
        ({}, "usable", "decode was compared with no whole model"),
    ],
)
def test_each_limit(decode: dict[str, Any], word: str, says: str) -> None:
    verdict = judge({"decode": decode, "prefill": FINE})
    assert verdict.word == word and says in str(verdict) and verdict.is_good == (word == "good")
    assert Verdict.from_dict(json.loads(json.dumps(verdict.to_dict()))) == verdict


def test_a_table_that_was_compared_with_nothing_is_not_used() -> None:
    assert judge({"decode": {}, "prefill": {}}).word == judge({}).word == "do not use"


def test_other_programs_are_named_and_their_largest_share_counts() -> None:
    quiet = {"of_measured": 0.02, "of_all": 0.03, "busiest": []}
    loud = {"of_measured": 0.4, "of_all": 0.7, "busiest": [["python", 0.91]]}
    body = {"decode": FINE, "prefill": FINE}
    assert judge(body, [{"other_load": quiet}, {}]).is_good
    verdict = judge(body, [{"other_load": loud}, {"other_load": quiet}])
    assert verdict.word == "usable"
    assert "40 % of the cores that were measured on, beyond 10 %: python (0.91 cores)" in str(verdict)
    beside = judge(body, [{"other_load": {**quiet, "of_all": 0.5}}])
    assert beside.word == "usable" and "50 % of all cores" in str(beside)


@given(st.lists(st.floats(0, 1000), min_size=4, max_size=4))
def test_no_mean_error_beyond_the_limit_is_anything_but_refused(means: list[float]) -> None:
    decode, prefill, found, also = (figures(mape_percent=mean) for mean in means)
    verdict = judge({"decode": {**decode, "found": found}, "prefill": {**prefill, "found": also}})
    assert (verdict.word == "do not use") == (max(means) > USABLE_MAPE_PERCENT)


# --- in a file -----------------------------------------------------------------------------------------


def written(path: Path, validation: dict[str, Any]) -> Path:
    text = table_text(finished=False, estimated=False)
    path.write_text(text + add_checksum({"what": "validation", **validation}) + "\n")
    return path


def test_a_file_without_a_verdict_gets_one_by_its_figures(tmp_path: Path) -> None:
    path = written(tmp_path / "t.jsonl", {"decode": figures(mape_percent=12.0), "prefill": FINE})
    table = load_table(path)
    assert table.verdict == judge(table.validation) and table.verdict.word == "usable"
    (line,) = table.warnings
    assert line.startswith("the verdict on table t.jsonl is usable: decode is 12.0 % off")
    assert from_compact(json.loads(json.dumps(to_compact(table))), "r.json").warnings == [line]


def test_the_winner_s_curse_is_said_and_intervals_of_found_models_hold_both_errors(tmp_path: Path) -> None:
    found = figures(models=10, bias_percent=-20.0, low_percent=1.0, high_percent=9.0)
    table = load_table(written(tmp_path / "t.jsonl", {"decode": {**FINE, "found": found}, "prefill": FINE}))
    again = from_compact(to_compact(table), "r.json")
    for one in (table, again):
        told = one.winners_curse("decode")  # predicted is 0.8 times measured
        assert "10 models that searches found with table t.jsonl were 25.0 % slower in decode" in told
        assert one.winners_curse("prefill") == ""
        assert one.expected(100.0, Step("decode", 8)) == pytest.approx(125.0)
        assert one.expected(100.0, Step("decode", 8, "mj")) is one.expected(100.0, Step("prefill", 8)) is None
        assert one.interval(100.0, Step("decode", 8), found=True) == pytest.approx((100.0, 96.0, 109.0))
        assert one.interval(100.0, Step("decode", 8)) == pytest.approx((100.0, 96.0, 105.0))
        assert one.interval(100.0, Step("prefill", 8), found=True) == pytest.approx((100.0, 96.0, 105.0))


def test_the_verdict_of_the_file_counts(tmp_path: Path) -> None:
    told = Verdict("do not use", ("as said",))
    path = written(tmp_path / "t.jsonl", {"decode": FINE, "prefill": FINE, "verdict": told.to_dict()})
    table = load_table(path)
    assert table.verdict == told and table.warnings == ["the verdict on table t.jsonl is do not use: as said"]
    assert from_compact(to_compact(table), "r.json").verdict == told


@pytest.mark.parametrize(
    "verdict", ["good", {"word": "great", "reasons": []}, {"word": "good"}, {"word": "good", "reasons": [1]}]
)
def test_a_verdict_of_another_form_is_refused(tmp_path: Path, verdict: Any) -> None:
    path = written(tmp_path / "t.jsonl", {"decode": FINE, "prefill": FINE, "verdict": verdict})
    with pytest.raises(ArtefactError, match="verdict"):
        load_table(path)


def test_an_estimated_or_unfinished_table_has_none(tmp_path: Path) -> None:
    (tmp_path / "e.jsonl").write_text(table_text())
    (tmp_path / "u.jsonl").write_text(table_text(finished=False, estimated=False))
    assert load_table(tmp_path / "e.jsonl").verdict is None
    assert load_table(tmp_path / "u.jsonl", unfinished=True).warnings == []
