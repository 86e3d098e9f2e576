"""The latency table as a file and as a sum of parts, on a table written from a formula (no clock)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge import artefact
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError, InputError
from merino_edge.latency.measurement import MODES, Measurement, Mode, What, layer_point, add_checksum, spread_percent
from merino_edge.latency.step import Step
from merino_edge.latency.step_time import COLD, RESOLUTION, WARM, Piece, StepTimeModel, single
from merino_edge.latency.table import LatencyTable, family
from merino_edge.latency.table_file import KIND, SCHEMA_VERSION, from_compact, load_table, to_compact

WIDTHS, RATIOS, LENGTHS = (32, 64, 128), (1, 4), (16, 64)
MODEL = Architecture(
    vocab_size=100,
    max_positions=64,
    embedding_width=64,
    head_dim=32,
    blocks=(Block(32, 2, 1, 1, 64), Block(128, 3, 4, 4, 512)),
)


def share(shape: dict[str, int]) -> float:
    """How far the key-value heads go from one to all."""
    return (shape["kv_heads"] - 1) / (shape["heads"] - 1) if shape["heads"] > 1 else 1.0


def cost_ms(what: str, mode: str, length: int, shape: dict[str, int]) -> float:
    """Linear in every axis between grid points, so that interpolation must hit it everywhere."""
    size = {
        "layer": lambda s: s["width"] ** 2 * (1 + s["ffn_width"] / s["width"]) * (1 + share(s) / 4),
        "repeat": lambda s: 0.5 * s["width"] ** 2 * (1 + s["ffn_width"] / s["width"]) * (1 + share(s) / 4),
        "width_change": lambda s: s["before"] * s["after"],
        "end": lambda s: 7 * s["vocab_size"] * s["embedding_width"],
    }[what](shape)
    if mode == "decode" and what in ("width_change", "end"):
        return 1e-4 * size  # no length matters there
    return 1e-4 * size * (1 + length / 100) * (1 if mode == "decode" else 10)


def measurements() -> Iterator[Measurement]:
    def entries(what: What, **shape: Any) -> Iterator[Measurement]:
        for length in LENGTHS:
            for mode in MODES:
                cost = cost_ms(what, mode, length, shape)
                yield Measurement(what, mode, length, shape, (cost,), 3 * cost)

    for width in WIDTHS:
        for ratio in RATIOS:
            for kv_heads in sorted({1, width // 32}):
                heads = {"heads": width // 32, "kv_heads": kv_heads}
                yield from entries("layer", ffn="relu", width=width, ffn_width=width * ratio, **heads)
                yield from entries("repeat", ffn="relu", width=width, ffn_width=width * ratio, **heads)
    yield from entries("width_change", before=32, after=64)
    yield from entries("width_change", before=96, after=128)
    yield from entries("end", vocab_size=100, embedding_width=64)


def table_text(lines: list[Measurement] | None = None, finished: bool = True, **header: object) -> str:
    fields = {"family": family(MODEL), "precision": "fp32", "default_length": 64, "estimated": True, **header}
    written = [json.dumps(artefact.add_envelope(KIND, fields, SCHEMA_VERSION))]
    written += [add_checksum(m.to_line()) for m in (list(measurements()) if lines is None else lines)]
    if finished:
        written.append(add_checksum({"what": "validation", "decode": {"mape_percent": 1.5}, "prefill": {"mape_percent": 2.5}}))
    return "\n".join(written) + "\n"


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


@given(
    st.sampled_from(MODES), st.integers(16, 64), st.integers(1, 4), st.floats(1, 4), st.booleans(), st.integers(1, 2)
)
@settings(max_examples=60, deadline=None)
def test_a_model_costs_the_sum_of_its_parts(
    table: LatencyTable, mode: Mode, length: int, layers: int, ratio: float, shared: bool, kv_heads: int
) -> None:
    blocks = (
        Block(32, layers, 1, 1, round(32 * ratio), shared),
        Block(96, 1, 3, 1, 192),
        Block(128, 2, 4, 2 * kv_heads, 512),
    )
    a, step = dataclasses.replace(MODEL, blocks=blocks), Step(mode, length)
    shapes = [{n: getattr(b, n) for n in ("width", "heads", "kv_heads", "ffn_width")} for b in blocks]
    further = cost_ms("repeat" if shared else "layer", mode, length, shapes[0])
    changes: list[tuple[int, int, Mode]] = [(64, 32, mode), (32, 96, mode), (96, 128, mode)]
    changes.append((128, 64, "decode"))  # the last token alone leaves
    expected = cost_ms("end", mode, length, {"vocab_size": 100, "embedding_width": 64})
    expected += sum(cost_ms("width_change", m, length, {"before": x, "after": y}) for x, y, m in changes)
    expected += cost_ms("layer", mode, length, shapes[0]) + (layers - 1) * further
    expected += cost_ms("layer", mode, length, shapes[1]) + 2 * cost_ms("layer", mode, length, shapes[2])
    assert table.model_cost(a, step) == pytest.approx(expected, rel=1e-7)
    parts = [table.block_cost(a, b, step) for b in blocks] + [table.embedding_and_head_cost(a, step)]
    parts += [table.width_change_cost(x, y, step) for x, y in ((32, 96), (96, 128))]
    for order in (parts, parts[::-1], sorted(parts)):
        assert sum(order) == table.model_cost(a, step)  # exactly: parts are multiples of 2^-30
    assert all(part / RESOLUTION == round(part / RESOLUTION) for part in parts)
    assert table.width_change_cost(96, 96, step) == 0
    energy = table.model_cost(a, Step(mode, length, "mj"))
    assert energy == pytest.approx(3 * expected, rel=1e-7)


def test_without_every_entrys_energy_there_is_none() -> None:
    lines = list(measurements())
    lines[0] = dataclasses.replace(lines[0], energy_mj=None)
    table = LatencyTable(Path("t"), {"family": family(MODEL), "default_length": 64}, lines, {}, "")
    assert table.model_ms(MODEL, lines[0].mode) > 0
    with pytest.raises(InputError, match=r"does not cover energy of decode of layer \(relu\) \(no measurement\)"):
        table.model_cost(MODEL, Step("decode", 64, "mj"))


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


def test_every_gap_of_a_table_is_named(table: LatencyTable) -> None:
    step = Step("decode", 128)
    points = [layer_point(128, 256, 8, 8, 1024), layer_point(128, 32, 1, 1, 64)]
    assert table.gaps("layer", "relu", step, points) == [
        "decode of layer (relu): length 128 (measured 16 to 64)",
        "decode of layer (relu): width 32 to 256 (measured 32 to 128)",
    ]
    assert table.gaps("layer", "swiglu", step, points) == ["decode of layer (swiglu) (no measurement)"]
    few = LatencyTable(
        Path("t"),
        table.header,
        [m for m in measurements() if m.shape.get("kv_heads") == m.shape.get("heads") != 1],
        {},
        "",
    )
    assert few.gaps("layer", "relu", Step("decode", 64), [layer_point(64, 128, 4, 2, 256)]) == [
        "decode of layer (relu): fewer key-value heads than query heads"
    ]


def with_cold(slower: float) -> LatencyTable:
    """Every decode entry also with cold caches, `slower` times as slow."""
    lines = list(measurements())
    cold = [
        dataclasses.replace(m, samples=(slower * m.median_ms,), cache="cold", energy_mj=None)
        for m in lines
        if m.mode == "decode"
    ]
    header = {"family": family(MODEL), "precision": "fp32", "default_length": 64, "estimated": False}
    return LatencyTable(Path("t"), header, [*lines, *cold], {}, "")


@given(st.floats(1, 4), st.floats(0, 3), st.floats(-2, 2), st.floats(-2, 2))
@settings(max_examples=40, deadline=None)
def test_a_decode_step_costs_the_least_over_alternatives_of_the_greatest_face(
    slower: float, share: float, steep_ms: float, cold_ms: float
) -> None:
    table = with_cold(slower)
    steep_ms, cold_ms = (round(x / RESOLUTION) * RESOLUTION for x in (steep_ms, cold_ms))
    step_time = StepTimeModel((WARM, Piece(share, 0.01, steep_ms), Piece(1.0, 0.0, cold_ms)), ((0, 1), (0, 2)))
    folded, step = dataclasses.replace(table, step_time=step_time), Step("decode", 40)
    sums_of_parts = table.sums(MODEL, 40)
    assert sums_of_parts.cold_ms == pytest.approx(slower * sums_of_parts.warm_ms, rel=1e-7)
    assert folded.model_cost(MODEL, step) == pytest.approx(step_time.value(sums_of_parts), abs=1e-6)
    steps = folded.alternatives(step)
    sums = [[folded.sum_cost(MODEL, piece) for piece in alternative] for alternative in steps]
    assert folded.model_cost(MODEL, step) == min(map(max, sums))
    for piece in steps[0]:  # each is exactly the sum of its parts
        parts = [folded.block_cost(MODEL, b, piece) for b in MODEL.blocks] + [folded.embedding_and_head_cost(MODEL, piece)]
        assert sum(parts) + folded.width_change_cost(32, 128, piece) == folded.sum_cost(MODEL, piece)
    for other in (Step("prefill", 40), Step("decode", 40, "mj")):  # have one sum, of warm entries
        assert folded.alternatives(other) == ((other,),)
        assert folded.model_cost(MODEL, other) == table.model_cost(MODEL, other)
    again = from_compact(json.loads(json.dumps(to_compact(folded))), "result.json")
    assert again.model_cost(MODEL, step) == folded.model_cost(MODEL, step)


def test_where_noise_says_that_cold_is_faster_it_is_not() -> None:
    table = dataclasses.replace(with_cold(0.5), step_time=single(COLD))
    assert table.model_ms(MODEL, "decode") == with_cold(1.0).model_ms(MODEL, "decode")


def test_cold_entries_alone_are_taken_as_they_are() -> None:
    table = with_cold(3.0)
    lines = [m for m in table.measurements if m.cache == "cold" or m.mode == "prefill"]
    alone = LatencyTable(Path("t"), table.header, lines, {}, "")
    assert alone.model_ms(MODEL, "decode") == dataclasses.replace(table, step_time=single(COLD)).model_ms(MODEL, "decode")


def test_a_step_reads_the_bucket_that_holds_the_sequence(table: LatencyTable) -> None:
    def cache_positions(length: int, context: int, **header: int) -> int:
        return dataclasses.replace(table, header={**table.header, **header}).cache_positions(Step("decode", length), context)

    assert [cache_positions(n, 1000, cache_buckets=256) for n in (1, 256, 257, 512, 900)] == [256, 256, 512, 512, 1000]
    assert cache_positions(10, 64, cache_buckets=256) == 64  # a shorter context has no more
    assert cache_positions(10, 64, cache_buckets=0) == 64  # the whole context
    assert cache_positions(10, 64) == 10 == table.cache_positions(Step("prefill", 10), 64)


def test_the_interval_is_that_of_the_held_out_models(table: LatencyTable) -> None:
    figures = {"decode": {"low_percent": -10.0, "high_percent": 20.0}, "prefill": {}}
    known, step = dataclasses.replace(table, validation=figures), Step("decode", 64)
    value, low, high = known.model_interval(MODEL, step) or (0, 0, 0)
    assert value == table.model_cost(MODEL, step) and (low, high) == (value * 0.9, value * 1.2)
    assert known.model_interval(MODEL, Step("prefill", 64)) is None
    assert known.model_interval(MODEL, Step("decode", 64, "mj")) is None


def test_what_failed_is_a_hole_with_a_reason(tmp_path: Path) -> None:
    lines = list(measurements())
    bad = next(i for i, m in enumerate(lines) if m.what == "layer" and m.mode == "decode" and m.shape["width"] == 128)
    lines[bad] = dataclasses.replace(lines[bad], samples=(), energy_mj=None, failed="no kernel")
    path = tmp_path / "t.jsonl"
    path.write_text(table_text(lines))
    table = load_table(path)
    assert table.measurements == lines and table.finished and len(table.failed) == 1
    assert table.model_ms(dataclasses.replace(MODEL, blocks=MODEL.blocks[:1]), "decode") > 0
    with pytest.raises(InputError, match=r"could not be measured: no kernel"):
        table.block_cost(MODEL, Block(96, 1, 3, 1, 96), Step("decode", 40))


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
        (table_text(default_length="64"), "lacks fields"),
        (table_text(family={}), "lacks fields"),
        (table_text(cache_buckets="many"), "lacks fields"),
        (table_text(reference={"ffn": "relu"}), "lacks fields"),
        (table_text() + add_checksum({"what": "faces", "decode": {"faces": [], "alternatives": []}}) + "\n", "no prediction"),
        (table_text().replace('"what": "layer"', '"what": "lawyer"', 1), "sha256"),
        (table_text().replace("\n", "\n\n", 1), "JSON"),
        (json.dumps(artefact.add_envelope(KIND, {}, 99)) + "\n", "schema version 99"),
        (json.dumps(artefact.add_envelope("architecture", {})) + "\n", "expected 'latency_table'"),
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


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"blocks": (Block(128, 1, 4, 4, 128), Block(160, 1, 5, 5, 160))},
            r"does not cover decode of width_change: before \* after 20480 \(measured 2048 to 12288\).*profile",
        ),
        (
            {"embedding_width": 160, "blocks": (Block(160, 1, 5, 5, 160),)},
            r"end: embedding_width 160 \(measured 64\).*profile",
        ),
        ({"blocks": (Block(64, 1, 2, 2, 512),)}, r"layer \(relu\): ffn_width / width 8 \(measured 1 to 4\)"),
        ({"vocab_size": 101}, r"vocab_size 101 \(measured 100\)"),
        ({"head_dim": 16, "blocks": (Block(64, 1, 4, 4, 64),)}, "head_dim 32, not 16"),
        ({"ffn": "swiglu"}, r"layer \(swiglu\) \(no measurement\)"),
    ],
)
def test_nothing_is_extrapolated(table: LatencyTable, change: dict[str, object], says: str) -> None:
    a = dataclasses.replace(MODEL, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=says):
        table.model_ms(a, "decode")


def test_a_block_outside_names_the_measured_widths(table: LatencyTable) -> None:
    with pytest.raises(InputError, match=r"width 160 \(measured 32 to 128\).*merino-edge profile"):
        table.block_cost(MODEL, Block(160, 1, 5, 5, 160), Step("decode", 64))


def test_lengths_and_modes_outside_are_refused(table: LatencyTable) -> None:
    for mode, length, says in (
        ("decode", 65, r"length 65 \(measured 16 to 64\)"),
        ("prefill", 15, r"length 15 \(measured 16 to 64\)"),
        ("sleep", 16, "sleep"),
    ):
        with pytest.raises(InputError, match=says):
            table.model_ms(MODEL, mode, length)  # type: ignore[arg-type]


def test_one_outlier_is_ignored_and_many_are_flagged() -> None:
    assert spread_percent((1.0, 1.0, 1.0, 9.0, 1.0)) == 0
    assert spread_percent((1.0, 1.1, 0.9, 1.2, 0.8)) == pytest.approx(14.826)
    shape = {"before": 1, "after": 2}
    assert not Measurement("width_change", "decode", 1, shape, (*[1.0] * 9, 5.0)).unstable
    assert Measurement("width_change", "decode", 1, shape, (1.0, 1.1, 0.9)).unstable
    assert not Measurement("width_change", "decode", 1, shape, (1.0, 1.1, 0.9) * 40).unstable  # many know the median
    below_zero = Measurement("width_change", "decode", 1, shape, (-0.1, -0.2, 0.1))
    assert below_zero.unstable and below_zero.median_ms == 0 and below_zero.to_line()["spread_percent"] is None
