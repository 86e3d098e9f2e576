"""The latency table as a file and as a sum of parts, on a table written from a formula (no clock)."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge import artefact
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError, InputError
from merino_edge.latency_table import KIND, MODES, LatencyTable, Measurement, What, family, seal, spread_percent

WIDTHS, RATIOS, LENGTHS = (32, 64, 128), (1, 4), (16, 64)
MODEL = Architecture(
    vocab_size=100,
    max_positions=64,
    embedding_width=64,
    head_dim=32,
    blocks=(Block(32, 2, 1, 1, 64), Block(128, 3, 4, 4, 512)),
)


def cost_ms(what: str, mode: str, length: int, shape: dict[str, int]) -> float:
    """Linear in every axis between grid points, so that interpolation must hit it everywhere."""
    size = {
        "layer": lambda s: s["width"] ** 2 * (1 + s["ffn_width"] / s["width"]),
        "repeat": lambda s: 0.5 * s["width"] ** 2 * (1 + s["ffn_width"] / s["width"]),
        "width_change": lambda s: s["before"] * s["after"],
        "end": lambda s: 7 * s["vocab_size"] * s["embedding_width"],
    }[what](shape)
    return 1e-4 * size * (1 + length / 100) * (1 if mode == "decode" else 10)


def measurements() -> Iterator[Measurement]:
    def entries(what: What, **shape: int) -> Iterator[Measurement]:
        for length in LENGTHS:
            for mode in MODES:
                yield Measurement(what, mode, length, shape, (cost_ms(what, mode, length, shape),))

    for width in WIDTHS:
        for ratio in RATIOS:
            shape = {"width": width, "heads": width // 32, "kv_heads": width // 32, "ffn_width": width * ratio}
            yield from entries("layer", **shape)
            yield from entries("repeat", **shape)
    yield from entries("width_change", before=32, after=64)
    yield from entries("width_change", before=96, after=128)
    yield from entries("end", vocab_size=100, embedding_width=64)


def table_text(lines: list[Measurement] | None = None, finished: bool = True, **header: object) -> str:
    fields = {"family": family(MODEL), "precision": "fp32", "default_length": 64, "estimated": True, **header}
    written = [json.dumps(artefact.stamp(KIND, fields))]
    written += [seal(m.to_line()) for m in (list(measurements()) if lines is None else lines)]
    if finished:
        written.append(seal({"what": "validation", "decode": {"mape_percent": 1.5}, "prefill": {"mape_percent": 2.5}}))
    return "\n".join(written) + "\n"


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("table") / "t.jsonl"
    path.write_text(table_text())
    return path


@pytest.fixture(scope="module")
def table(path: Path) -> LatencyTable:
    return LatencyTable.load(path)


def test_a_table_reads_back_as_it_was_written(table: LatencyTable, path: Path) -> None:
    assert table.measurements == list(measurements())
    assert table.estimated and table.precision == "fp32" and not table.unstable
    assert table.validation == {"decode": {"mape_percent": 1.5}, "prefill": {"mape_percent": 2.5}}
    assert table.sha256 == artefact.sha256_file(path)


@given(st.sampled_from(MODES), st.integers(16, 64), st.integers(1, 4), st.floats(1, 4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_a_model_costs_the_sum_of_its_parts(
    table: LatencyTable, mode: str, length: int, layers: int, ratio: float, shared: bool
) -> None:
    blocks = (Block(32, layers, 1, 1, round(32 * ratio), shared), Block(96, 1, 3, 3, 192), Block(128, 2, 4, 4, 512))
    a = dataclasses.replace(MODEL, blocks=blocks)
    first = {"width": 32, "ffn_width": round(32 * ratio)}
    further = cost_ms("repeat" if shared else "layer", mode, length, first)
    changes = [(64, 32, mode), (32, 96, mode), (96, 128, mode), (128, 64, "decode")]  # the last token alone leaves
    expected = cost_ms("end", mode, length, {"vocab_size": 100, "embedding_width": 64})
    expected += sum(cost_ms("width_change", m, length, {"before": x, "after": y}) for x, y, m in changes)
    expected += cost_ms("layer", mode, length, first) + (layers - 1) * further
    expected += cost_ms("layer", mode, length, {"width": 96, "ffn_width": 192})
    expected += 2 * cost_ms("layer", mode, length, {"width": 128, "ffn_width": 512})
    assert table.model_ms(a, mode, length) == pytest.approx(expected, rel=1e-9)
    parts = sum(table.block_ms(a, b, mode, length) for b in blocks) + table.end_ms(a, mode, length)
    parts += table.width_change_ms(32, 96, mode, length) + table.width_change_ms(96, 128, mode, length)
    assert table.model_ms(a, mode, length) == pytest.approx(parts, rel=1e-12)
    assert table.width_change_ms(96, 96, mode) == 0


@given(st.lists(st.floats(0, 5), min_size=12, max_size=12), st.integers(32, 128), st.floats(1, 4))
@settings(max_examples=40, deadline=None)
def test_between_points_a_cost_stays_between_its_corners(values: list[float], width: int, ratio: float) -> None:
    layers = [m for m in measurements() if m.what == "layer" and m.mode == "decode"]
    lines = [dataclasses.replace(m, samples=(value,)) for m, value in zip(layers, values, strict=True)]
    table = LatencyTable(Path("t"), {"family": family(MODEL), "default_length": 64}, lines, {}, "")
    low, high = max(w for w in WIDTHS if w <= width), min(w for w in WIDTHS if w >= width)
    corners = [m.median_ms for m in lines if m.length == 64 and m.shape["width"] in (low, high)]
    a = dataclasses.replace(MODEL, head_dim=1, blocks=(Block(width, 1, width, width, round(width * ratio)),))
    table.header["family"]["head_dim"] = 1
    assert min(corners) - 1e-9 <= table.block_ms(a, a.blocks[0], "decode") <= max(corners) + 1e-9


@given(st.data())
@settings(max_examples=150, deadline=None)
def test_a_flipped_bit_is_found(data: st.DataObject) -> None:
    content = bytearray(table_text(list(measurements())[:6]).encode())
    content[data.draw(st.integers(0, len(content) - 1))] ^= 1 << data.draw(st.integers(0, 7))
    file = Path(data.draw(st.just("flipped.jsonl")))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(artefact, "read_text", lambda path, limit: _decoded(bytes(content)))
        try:
            loaded = LatencyTable.load(file)
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
        LatencyTable.load(path)


def test_a_cut_last_line_is_left_out_only_of_an_unfinished_table(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(table_text(finished=False)[:-30])
    with pytest.raises(ArtefactError, match=r"cut short.*profile --continue"):
        LatencyTable.load(path)
    assert LatencyTable.load(path, unfinished=True).measurements == list(measurements())[:-1]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (table_text(finished=False), "unfinished.*--continue"),
        (table_text(list(measurements())[4:]), "unfinished"),  # a hole in the grid
        (table_text([*measurements(), next(measurements())]), "same as a line before"),
        (table_text(default_length="64"), "lacks fields"),
        (table_text(family={}), "lacks fields"),
        (table_text().replace('"what": "layer"', '"what": "lawyer"', 1), "sha256"),
        (table_text().replace("\n", "\n\n", 1), "JSON"),
        (json.dumps(artefact.stamp(KIND, {}, 99)) + "\n", "schema version 99"),
        (json.dumps(artefact.stamp("architecture", {})) + "\n", "expected 'latency_table'"),
        ("[]\n", "not a latency_table"),
        ("\n", "JSON"),
    ],
)
def test_bad_tables_are_refused_in_one_line(tmp_path: Path, text: str, says: str) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(text)
    with pytest.raises(ArtefactError, match=says) as refusal:
        LatencyTable.load(path)
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
    ],
)
def test_a_sealed_line_that_is_no_measurement_is_refused(tmp_path: Path, line: dict[str, object]) -> None:
    path = tmp_path / "t.jsonl"
    path.write_text(table_text(finished=False) + seal(line) + "\n")
    with pytest.raises(ArtefactError, match="is not a measurement"):
        LatencyTable.load(path, unfinished=True)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (
            {"blocks": (Block(128, 1, 4, 4, 128), Block(160, 1, 5, 5, 160))},
            "covers before . after 2048 to 12288.*profile",
        ),
        ({"embedding_width": 160, "blocks": (Block(160, 1, 5, 5, 160),)}, "covers embedding_width 64 to 64.*profile"),
        ({"blocks": (Block(64, 1, 2, 2, 512),)}, "covers ffn_width / width 1 to 4"),
        ({"vocab_size": 101}, "covers vocab_size 100 to 100"),
        ({"head_dim": 16, "blocks": (Block(64, 1, 4, 4, 64),)}, "head_dim 32, not 16"),
        ({"ffn": "swiglu"}, "ffn relu, not swiglu"),
        ({"blocks": (Block(64, 1, 2, 1, 64),)}, "1 query heads per key-value head"),
    ],
)
def test_nothing_is_extrapolated(table: LatencyTable, change: dict[str, object], says: str) -> None:
    a = dataclasses.replace(MODEL, **change)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=says):
        table.model_ms(a, "decode")


def test_a_block_outside_names_the_measured_widths(table: LatencyTable) -> None:
    with pytest.raises(InputError, match=r"covers width 32 to 128.*merino-edge profile"):
        table.block_ms(MODEL, Block(160, 1, 5, 5, 160), "decode")


def test_lengths_and_modes_outside_are_refused(table: LatencyTable) -> None:
    for mode, length, says in (
        ("decode", 65, "length 16 to 64"),
        ("prefill", 15, "length 16 to 64"),
        ("sleep", 16, "sleep"),
    ):
        with pytest.raises(InputError, match=says):
            table.model_ms(MODEL, mode, length)


def test_spread_ignores_one_outlier_and_flags_many() -> None:
    assert spread_percent((1.0, 1.0, 1.0, 9.0, 1.0)) == 0
    assert spread_percent((1.0, 1.1, 0.9, 1.2, 0.8)) == pytest.approx(14.826)
    shape = {"before": 1, "after": 2}
    assert not Measurement("width_change", "decode", 1, shape, (1.0, 1.0, 5.0)).unstable
    assert Measurement("width_change", "decode", 1, shape, (1.0, 1.1, 0.9)).unstable
    below_zero = Measurement("width_change", "decode", 1, shape, (-0.1, -0.2, 0.1))
    assert below_zero.unstable and below_zero.median_ms == 0 and below_zero.to_line()["spread_percent"] is None
