"""Strict JSON: what passes can be hashed and written again; everything else is one typed line."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merino_edge import artefact, limits
from merino_edge.errors import ArtefactError
from merino_edge.strict_json import parse_bounded, parse_json

LARGEST = "1" + "0" * (limits.MAX_JSON_DIGITS - 1)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"a": 1, "a": 1}', "a key appears twice"),
        ('{"a": {"b": 1, "b": 2}}', "a key appears twice"),
        ("[NaN]", "NaN is not JSON"),
        ("[-Infinity]", "-Infinity is not JSON"),
        ("[1e309]", "beyond the range"),
        ("[-1E+999]", "beyond the range"),
        (f"[{LARGEST}0]", "digits"),
        (f"[{'9' * 10_000}]", "digits"),
        (f"[{'9' * 400}.0]", "beyond the range"),
        ('["\\ud83d"]', "half of a character"),
        ('{"\\uDE00": 1}', "half of a character"),
        ('["\\ude00\\ud83d"]', "half of a character"),
        ("[" * (limits.MAX_JSON_DEPTH + 1) + "]" * (limits.MAX_JSON_DEPTH + 1), "nested deeper"),
        ('{"a":' * 5_000 + "1" + "}" * 5_000, "nested deeper|recursion"),
        ("[" * 1_000_000, "JSON"),
        ("", "JSON"),
    ],
)
def test_what_is_refused(text: str, says: str) -> None:
    with pytest.raises(ArtefactError, match=says) as refused:
        parse_json(text, "f.json")
    assert str(refused.value).startswith("f.json is not valid JSON (") and "\n" not in str(refused.value)


@pytest.mark.parametrize(
    "text", ['["\\ud83d\\ude00"]', '["\\\\ud83d"]', f"[{LARGEST}]", "[1e308, 5e-324, -0.0]", '"text"', "null"]
)
def test_what_is_unusual_and_honest_passes(text: str) -> None:
    assert parse_json(text, "f.json") == json.loads(text)


def test_as_deep_as_allowed() -> None:
    depth = limits.MAX_JSON_DEPTH
    assert parse_json("[" * depth + "]" * depth, "f.json") is not None
    wide = "[" + ",".join(["[]"] * 1_000) + "]"  # many brackets, and not deep
    assert len(parse_json(wide, "f.json")) == 1_000


def test_more_values_than_memory_holds_are_counted_before_they_are_made() -> None:
    began = time.process_time()
    for text in ("[" + "[],[]," * 3_000_000 + "0]", "[" + '"",' * 8_100_000 + "0]"):
        with pytest.raises(ArtefactError, match="more than 8000000 values"):
            parse_json(text, "f.json")
    assert time.process_time() - began < 5


values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**200), 10**200)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inside: st.lists(inside) | st.dictionaries(st.text(), inside),
)


@given(values)
def test_what_can_be_written_is_read(value: object) -> None:
    try:
        text = artefact.canonical_json(value)
        text.encode()
    except UnicodeEncodeError:  # hypothesis draws no half characters, but keep the test's claim plain
        return
    assert parse_json(text, "f.json") == value


@given(st.text(alphabet='[]{}",:\\udDeE0123456789.+-aNtrfl ', max_size=60))
def test_whatever_is_accepted_can_be_hashed(text: str) -> None:
    try:
        value = parse_json(text, "f.json")
    except ArtefactError:
        return
    assert len(artefact.sha256_text(artefact.canonical_json(value))) == 64


def test_data_sets_may_hold_what_nobody_reads() -> None:
    assert parse_bounded('{"text": "a", "score": NaN, "id": 1, "id": 2}')["id"] == 2
    with pytest.raises(ValueError, match="nested deeper"):
        parse_bounded("[" * 200 + "]" * 200)


def test_an_artefact_is_bounded_before_it_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(limits.MAX_ARTEFACT_BYTES + 1)
    with pytest.raises(ArtefactError, match="the limit is"):
        artefact.read_json(path, "space")


def test_a_message_does_not_repeat_a_whole_file() -> None:
    with pytest.raises(ArtefactError) as refused:
        artefact.check_header({"kind": "x" * 10_000_000}, "space", 1, "f.json")
    assert len(str(refused.value)) < 3_000
