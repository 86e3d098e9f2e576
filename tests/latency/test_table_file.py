"""The file of a latency table: it reads back as written, and what is damaged or foreign is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.linear_table import MODEL, measurements, table_text
from merino_edge import artefact
from merino_edge.errors import ArtefactError
from merino_edge.latency.measurement import (
    add_checksum,
)
from merino_edge.latency.step import Step
from merino_edge.latency.table import LatencyTable, family
from merino_edge.latency.table_file import KIND, from_compact, load_table, to_compact


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "t.jsonl"
    path.write_text(table_text())
    return path


@pytest.fixture(scope="module")
def table(path: Path) -> LatencyTable:
    return load_table(path)


def test_a_table_reads_back_as_it_was_written(table: LatencyTable, path: Path) -> None:
    assert table.measurements == list(measurements())
    assert table.estimated and table.precision == "fp32" and not table.unstable
    assert table.validation == {"decode": {"mape_percent": 1.5}, "prefill": {"mape_percent": 2.5}}
    assert table.sha256 == artefact.sha256_file(path)


def test_a_table_of_the_first_schema_is_still_read(tmp_path: Path, table: LatencyTable) -> None:
    """There the header said which FFN kind it was of, and key-value heads were as many as query heads."""
    lines = []
    for m in measurements():
        if m.shape.get("kv_heads") == m.shape.get("heads"):
            line = m.to_line()
            line.pop("ffn", None)
            lines.append(add_checksum(line))
    fields = {"family": {**family(MODEL), "ffn": "relu", "kv_group": 1}, "precision": "fp32", "default_length": 64}
    header = json.dumps(artefact.add_envelope(KIND, {**fields, "estimated": True}, 1))
    path = tmp_path / "first.jsonl"
    path.write_text("\n".join([header, *lines, add_checksum({"what": "validation", "decode": {"models": 1}})]) + "\n")
    assert load_table(path).model_ms(MODEL, "decode") == table.model_ms(MODEL, "decode")


def test_a_search_result_can_carry_the_table(table: LatencyTable) -> None:
    compact = json.loads(json.dumps(to_compact(table)))
    again = from_compact(compact, "result.json")
    for step in (Step("decode", 40), Step("prefill", 16), Step("decode", 64, "mj")):
        assert again.model_cost(MODEL, step) == table.model_cost(MODEL, step)
    assert (again.sha256, again.precision, again.estimated) == (table.sha256, table.precision, table.estimated)
    for harm in ({}, None, {**compact, "header": {}}, {**compact, "entries": [["layer"]]}, {**compact, "entries": 3}):
        with pytest.raises(ArtefactError, match=r"^result.json"):
            from_compact(harm, "result.json")


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_is_found(data: st.DataObject) -> None:
    content = bytearray(table_text(list(measurements())[:6]).encode())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file = Path(data.draw(st.just("flipped.jsonl")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefact, "read_text", lambda path, limit: _decoded(bytes(content)))
        try:
            loaded = load_table(file)
        except ArtefactError:
            return
    assert loaded.measurements == list(measurements())[:6]  # the same number spelled otherwise, as 1E-05


def _decoded(content: bytes) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise ArtefactError(str(error)) from None


@pytest.mark.parametrize("keep", [0, 1, 40, 300, -1, -2, -60])
def test_a_truncated_table_is_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(table_text()[:keep])
    with pytest.raises(ArtefactError):
        load_table(path)


def test_a_cut_last_line_is_left_out_only_of_an_unfinished_table(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(table_text(finished=False)[:-30])
    with pytest.raises(ArtefactError, match=r"cut short.*profile --continue"):
        load_table(path)
    assert load_table(path, unfinished=True).measurements == list(measurements())[:-1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (table_text(finished=False), "unfinished.*--continue"),
        (table_text(list(measurements())[4:]), "unfinished"),  # a hole in the grid
        (table_text([*measurements(), next(measurements())]), "same as a line before"),
        (table_text(default_length="64"), "default_length: expected int, got str"),
        (table_text(family={}), "family: object missing required field head_dim"),
        (table_text(cache_buckets="many"), "cache_buckets: expected int, got str"),
        (table_text(reference={"ffn": "relu"}), "reference: object missing required field ratio"),
        (
            table_text() + add_checksum({"what": "faces", "decode": {"faces": [], "alternatives": []}}) + "\n",
            "decode.faces: expected array of length >= 1",
        ),
        (table_text().replace('"what": "layer"', '"what": "lawyer"', 1), "sha256"),
        (table_text().replace("\n", "\n\n", 1), "JSON"),
        (json.dumps(artefact.add_envelope(KIND, {}, 99)) + "\n", "schema version 99"),
        (json.dumps(artefact.add_envelope("architecture", {})) + "\n", "is an architecture, not a latency table"),
        ("[]\n", "not a latency_table"),
        ("\n", "JSON"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ArtefactError, match=says) as refusal:
        load_table(path)
    assert "\n" not in str(refusal.value) and refusal.value.hint
