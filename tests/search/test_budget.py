from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merino_edge.errors import InputError
from merino_edge.search.budget import KINDS, Budget, Metric, parse_at, parse_quantity, spell_quantity


@pytest.mark.parametrize(
    ("text", "value"), [("5", 5), ("0.5", 0.5), ("60M", 6e7), ("1.5g", 1.5e9), (" 2K ", 2000), ("1e3", 1e3)]
)
def test_quantities_are_read(text: str, value: float) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "M", "-5", "0", "nan", "inf", "1e999", "5 ms", "60MM", "1,5"])
def test_other_quantities_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--params"):
        parse_quantity(text, "--params")


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("5MS", "--decode-ms", 5),
        ("5 ms", "--text-ms", 5),
        ("0.005s", "--decode-ms", 5),
        ("30mb", "--weight-mb", 30),
        ("0.03GB", "--peak-mb", 30),
        ("2J", "--energy-mj", 2000),
        ("60m", "--params", 6e7),
    ],
)
def test_a_unit_may_follow_the_number(text: str, name: str, value: float) -> None:
    assert parse_quantity(text, name) == pytest.approx(value, rel=1e-12)


@pytest.mark.parametrize(("text", "name"), [("5MB", "--decode-ms"), ("5s", "--params"), ("ms", "--decode-ms")])
def test_a_unit_of_something_else_is_refused(text: str, name: str) -> None:
    with pytest.raises(InputError, match=name):
        parse_quantity(text, name)


def test_a_metric_in_capitals() -> None:
    assert Metric.parse("Weight_MB@INT4") == Metric("weight_mb", "int4")


@given(st.floats(1e-6, 1e15))
def test_a_spelled_quantity_is_the_least_of_four_digits(value: float) -> None:
    spelled = parse_quantity(spell_quantity(value))
    assert value * (1 - 1e-12) <= spelled <= value * 1.0011


def test_round_quantities_are_spelled_as_they_are() -> None:
    for text in ("1e-300", "1e-05", "0.1", "0.3", "5", "60M", "1.5G", "4.94066e-324"):
        assert spell_quantity(parse_quantity(text)) == text


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_must_be_positive(limit: float) -> None:
    with pytest.raises(InputError, match="--decode-ms"):
        Budget.of({"decode_ms@256": limit})


@pytest.mark.parametrize("limit", ["5", None, True, [5]])
def test_a_budget_is_a_number(limit: Any) -> None:
    with pytest.raises(InputError, match=r"^budget decode_ms@256 is .*; give --decode-ms a positive number$"):
        Budget.of({"decode_ms@256": limit})


@pytest.mark.parametrize("number", [5, 5.0, np.float32(5), np.int64(5)])
def test_any_kind_of_number_is_a_budget(number: float) -> None:
    assert Budget.of({"decode_ms@256": number}) == Budget.of({"decode_ms@256": 5.0})


@pytest.mark.parametrize(
    ("key", "words"),
    [
        ("decode_ms@", "'' is no cache length; write --decode-ms VALUE@CACHE_LENGTH"),
        ("decode_ms@x", "'x' is no cache length"),
        ("weight_mb@", "no precision ''"),
        ("parameters@", "leave @ out"),
        ("", "no metric ''"),
        (None, "no metric None; choose one of decode_ms"),
        (3, "no metric 3"),
    ],
)
def test_what_is_no_key_of_a_metric(key: Any, words: str) -> None:
    with pytest.raises(InputError) as caught:
        Budget.of({key: 5.0})
    assert words in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("limits", [None, 5, "decode_ms", [("decode_ms", 5.0)]])
def test_budgets_stand_in_a_mapping(limits: Any) -> None:
    with pytest.raises(InputError, match=r'no mapping; write it as {"decode_ms@1024": 5\.0}$'):
        Budget.of(limits)


@pytest.mark.parametrize("name", KINDS)
def test_a_metric_is_its_key(name: str) -> None:
    at = {"precision": "int4", "": None}.get(KINDS[name].at, 1024)
    for metric in (Metric(name), Metric(name, at)):
        assert Metric.parse(metric.key) == metric
    assert Metric(name).key == name and KINDS[name].option.startswith("--")


@pytest.mark.parametrize(
    ("name", "at", "words"),
    [
        ("decode_ms", "", "is no cache length; write --decode-ms VALUE@CACHE_LENGTH"),
        ("decode_ms", "-1", "is no cache length"),
        ("decode_ms", "1.5", "is no cache length"),
        ("decode_ms", "0", "outside 1 to"),
        ("decode_ms", "9" * 4000, "outside 1 to"),
        ("first_token_ms", "many", "is no prompt bytes"),
        ("weight_mb", "int3", "fp32, fp16, int8, int4"),
        ("parameters", "256", "leave @ out"),
    ],
)
def test_what_a_metric_cannot_be_at(name: str, at: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_at(name, at)
    assert words in str(caught.value)


def test_budgets_read_back_and_can_be_changed() -> None:
    budget = Budget.of({"decode_ms@256": 5.0, "decode_ms@1024": 8.0, "parameters": 6e7})
    assert Budget.of(budget.to_dict()) == budget
    decode = Metric("decode_ms", 256)
    assert budget.without(decode).to_dict() == {"decode_ms@1024": 8.0, "parameters": 6e7}
    assert budget.within(decode, 4.0).limits[0] == (decode, 4.0) and len(budget.within(decode, 4.0).limits) == 3
    with pytest.raises(InputError, match="--decode-ms is given twice for decode_ms@256"):
        Budget(((decode, 1.0), (decode, 2.0)))
    with pytest.raises(InputError, match="no metric 'speed'"):
        Budget.of({"speed": 3})
