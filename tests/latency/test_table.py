"""A latency table as a sum of parts, on a table from a formula (no clock)."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.linear_table import MODEL, cost_ms, measurements, table_text
from merino_edge.architecture import Block
from merino_edge.errors import InputError
from merino_edge.latency.measurement import (
    MODES,
    Mode,
    layer_point,
)
from merino_edge.latency.step import Step
from merino_edge.latency.step_time import COLD, RESOLUTION, WARM, Piece, StepTimeModel, single
from merino_edge.latency.table import LatencyTable, family
from merino_edge.latency.table_file import from_compact, load_table, to_compact


@pytest.fixture(scope="module")
def table() -> LatencyTable:
    header = {"family": family(MODEL), "precision": "fp32", "default_length": 64, "estimated": True}
    return LatencyTable(Path("t"), header, list(measurements()), {}, "")


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
        parts = [folded.block_cost(MODEL, b, piece) for b in MODEL.blocks] + [
            folded.embedding_and_head_cost(MODEL, piece)
        ]
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
    assert alone.model_ms(MODEL, "decode") == dataclasses.replace(table, step_time=single(COLD)).model_ms(
        MODEL, "decode"
    )


def test_a_step_reads_the_bucket_that_holds_the_sequence(table: LatencyTable) -> None:
    def cache_positions(length: int, context: int, **header: int) -> int:
        return dataclasses.replace(table, header={**table.header, **header}).cache_positions(
            Step("decode", length), context
        )

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
        ({"blocks": (Block(32, 1, 1, 1, 32, convolution=3), *MODEL.blocks)}, "no layer with short convolutions"),
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
