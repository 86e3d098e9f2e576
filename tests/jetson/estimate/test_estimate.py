"""Estimated tables: they rank the power modes as published, are marked wherever they go, and refuse in one line."""

from __future__ import annotations

import dataclasses
import json
import random
from functools import cache
from pathlib import Path

import pytest

from helpers.warm_python import run_merino as merino
from merino_edge.architecture import Architecture, load
from merino_edge.errors import OutputError
from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.estimate import estimate as estimates
from merino_edge.jetson.estimate.boards import BOARDS, Board, board
from merino_edge.jetson.estimate.estimate import card, estimate
from merino_edge.jetson.estimate.published_speeds import (
    SMOLHUB_LENGTH,
    SMOLHUB_MODES,
    SMOLLM2_135M,
    checked_by,
    rows,
    unfitted_errors_percent,
)
from merino_edge.jetson.estimate.roofline import Roofline, runtime
from merino_edge.jetson.profiler.plan import make_plan
from merino_edge.latency.measurement import MODES
from merino_edge.latency.step import Step
from merino_edge.latency.table_file import load_table
from merino_edge.presets import preset
from merino_edge.search import space_file
from merino_edge.search.builtin_spaces import DEMO, EDGE

NANO = board("orin-nano-8gb")


_plan_made_once = cache(make_plan)


@pytest.fixture
def each_plan_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plan depends on the space and the lengths, and on no board: each is made once for all boards and modes."""
    monkeypatch.setattr(estimates, "make_plan", _plan_made_once)


def nano(mode: str, name: str = "merino-edge") -> Roofline:
    return Roofline(NANO, NANO.mode(mode), runtime(name))


def test_an_estimate_says_who_checked_it(tmp_path: Path) -> None:
    table = estimate(tmp_path / "t.jsonl", DEMO, space_file.to_dict(DEMO), "int4", nano("25W"), quick=True)
    decode, prefill, own = table.header["checked_by"]
    here = [r for r in rows() if (r.runtime, r.mode, r.board, r.fitted) == ("edge-llm", "decode", NANO.name, False)]
    assert f"{len(here)} on this board (8 of mlc by NVIDIA" in decode and "by NVIDIA, TensorRT Edge-LLM" in prefill
    assert own == "no speed of merino-edge on this board was measured by anybody"
    lines = checked_by("llama.cpp", NANO.name)
    assert "of llama.cpp by smolhub.com" in lines[0] and "0 on this board, 0 on others" in lines[1] and len(lines) == 2
    found = tmp_path / "found.json"
    said = merino("search", "--space", "demo", "--table", table.path, "--decode-ms", 5, "--out", found)
    assert f"the table is estimated: {own}" in " ".join((said.stdout + said.stderr).split())


def test_the_documented_figure_to_beat_is_the_roofline_s(repository: Path) -> None:
    """As benchmarks/roofline_against_published.py prints it."""
    step_ms = nano("25W").model_ms(SMOLLM2_135M, "decode", SMOLHUB_LENGTH, "int4")
    errors = unfitted_errors_percent("merino-edge", "decode")
    low, high = (1000 / (step_ms * (1 + error / 100)) for error in (errors[-1], errors[0]))
    page = (repository / "docs/benchmarks.md").read_text()
    assert f"| {1000 / step_ms:.0f} (estimated; {low:.0f} to {high:.0f}) |" in page and "| 165.2 |" in page


@pytest.mark.usefixtures("each_plan_once")
@pytest.mark.parametrize("framework", ["llama.cpp", "ollama"])
def test_tables_rank_the_four_power_modes_as_published_for_smollm2_135m(tmp_path: Path, framework: str) -> None:
    """By their sums over parts, at the longest context of the space (the published one is 128 positions longer)."""
    a = dataclasses.replace(preset("smollm2-135m"), max_positions=2048)
    published = {r.power_mode: r.tokens_per_s for r in rows() if (r.framework, r.model) == (framework, "SmolLM2-135M")}
    predicted = {}
    for mode in SMOLHUB_MODES:
        path = tmp_path / f"{mode}.jsonl"
        table = estimate(path, EDGE, space_file.to_dict(EDGE), "int4", nano(mode, framework), lengths=(1024, 2048))
        predicted[mode] = 1000 / table.model_ms(a, "decode", 2048)
    assert sorted(published, key=lambda mode: predicted[mode]) == sorted(published, key=lambda mode: published[mode])
    assert all(abs(predicted[mode] / published[mode] - 1) < 0.2 for mode in published)


def test_a_table_holds_the_rooflines_own_times(tmp_path: Path) -> None:
    """The sums come close to the whole: what L2 changes, and the star of layers, is all that is not additive."""
    roofline, path = nano("15W"), tmp_path / "t.jsonl"
    table = estimate(path, DEMO, space_file.to_dict(DEMO), "int8", roofline)
    assert table == load_table(path) and table.estimated and table.header["backend"] == "roofline"
    for m in table.measurements:
        if m.what == "model":
            a = Architecture.from_dict(m.shape["architecture"])
            assert m.samples == (roofline.model_ms(a, m.mode, m.length, "int8"),)
    assert all(table.validation[mode]["mape_percent"] < 5 for mode in MODES)
    a = DEMO.architecture(DEMO.sample(random.Random(0)))
    errors = unfitted_errors_percent("merino-edge", "decode")  # the error bar is that of speeds on boards
    value, low, high = table.model_interval(a, Step("decode", 64)) or (0, 0, 0)
    assert low == value * (1 + errors[0] / 100) < value * 0.9 and high == value * (1 + errors[-1] / 100) > value * 1.1
    again = estimate(tmp_path / "again.jsonl", DEMO, space_file.to_dict(DEMO), "int8", roofline)
    assert again.path.read_bytes() == path.read_bytes()
    with pytest.raises(OutputError, match=r"exists; choose another --out"):
        estimate(path, DEMO, space_file.to_dict(DEMO), "int8", roofline)


@pytest.mark.usefixtures("each_plan_once")
@pytest.mark.parametrize("board", BOARDS, ids=lambda b: b.name)
def test_every_board_has_a_table_and_a_card_that_says_estimated(tmp_path: Path, board: Board) -> None:
    for mode in board.modes:
        roofline = Roofline(board, mode, runtime("merino-edge"))
        found = card(roofline)
        assert set(device_card()) <= set(found)  # whatever reads a measured card reads this one
        assert found["name"].endswith("(estimated)") and found["l4t"] == "unknown" and found["power_mode"] == mode.name
        path = tmp_path / f"{mode.name}.jsonl"
        table = estimate(path, DEMO, space_file.to_dict(DEMO), "fp16", roofline, quick=True)
        assert table.header["device"] == found
        assert "constants of runtime merino-edge" in table.header["unverified"]


def test_estimated_follows_the_table_into_what_is_made_from_it(tmp_path: Path) -> None:
    table, result = tmp_path / "t.jsonl", tmp_path / "found.json"
    asked = ("--board", "orin-nano-8gb", "--mode", "25W", "--space", "demo", "--precision", "int4", "--out", table)
    done = merino("estimate", *asked, "--json")
    printed = json.loads(done.stdout)
    assert printed["estimated"] and printed["device"] == "Jetson Orin Nano 8GB (estimated)"
    assert "estimated, not measured" in done.stderr and "additivity of the estimate in decode" in done.stderr
    assert "estimated, not measured" in merino("show", table).stdout
    budget = ("--space", "demo", "--precision", "int4", "--decode-ms", 2)
    found = merino("search", *budget, "--table", table, "--device", "orin nano", "--out", result)
    assert "estimated" in found.stderr
    document = json.loads(result.read_text())
    assert document["table"]["header"]["estimated"]
    assert document["table"]["header"]["device"]["name"] == "Jetson Orin Nano 8GB (estimated)"


def test_a_search_counts_the_target_of_its_estimated_table(tmp_path: Path) -> None:
    table, result, again = tmp_path / "t.jsonl", tmp_path / "found.json", tmp_path / "again.json"
    asked = ("--board", "orin-nano-8gb", "--mode", "25W", "--space", "demo", "--precision", "int4", "--out", table)
    done = merino("estimate", *asked, "--target", "jetpack-7.2", "--quick")
    assert "as stored for jetpack-7.2 of the board's 8,590 MB" in done.stderr
    assert load_table(table).header["target"] == "jetpack-7.2"
    found = merino("search", "--space", "demo", "--table", table, "--decode-ms", 2, "--out", result)
    assert "bytes as int4 is stored for jetpack-7.2" in found.stderr
    a, document = load(result)
    assert document["target"] == "jetpack-7.2"
    assert round(1e6 * document["costs"]["weight_mb@int4"]) == a.weight_bytes("int4", "jetpack-7.2")
    merino("search", "--from", result, "--out", again)  # which has the target from the result
    assert load(again)[1]["costs"] == document["costs"]
    other = merino("search", "--space", "demo", "--table", table, "--target", "onnxruntime", "--out", again)
    assert "stored for onnxruntime" in other.stderr


def test_without_a_board_the_boards_are_listed() -> None:
    listed = json.loads(merino("estimate", "--json").stdout)["boards"]
    assert [(b["name"], [m["name"] for m in b["modes"]]) for b in listed] == [
        (b.name, [m.name for m in b.modes]) for b in BOARDS
    ]
    text = merino("estimate").stdout
    assert all(b.name in text and all(m.name in text for m in b.modes) for b in BOARDS)
    assert "agx-thor: fp16_flops_per_sm_clock, gpu_mhz (max)" in text  # marked unverified


def test_the_check_prints_every_row_with_its_error() -> None:
    found = json.loads(merino("estimate", "--check", "--json").stdout)
    assert len(found["rows"]) == len(rows()) and {"error_percent", "fitted"} <= set(found["rows"][0])
    text = merino("estimate", "--check").stdout
    assert "Kendall tau" in text and "unverified" in text and all(row.model in text for row in rows())


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("--board", "tx2", "--mode", "MAXN", "--out", "t"), 2, "no board 'tx2'; choose one of nano, xavier-nx"),
        (("--board", "orin-nano-8gb", "--mode", "40W", "--out", "t"), 2, "no power mode '40W'; choose one of 7W, 15W"),
        (("--board", "orin-nano-8gb", "--out", "t"), 2, "add: --mode, one of 7W, 15W, 25W, MAXN_SUPER, 15W-nosuper"),
        (("--board", "orin-nano-8gb", "--mode", "15W"), 2, "no file was named for the table; add: --out T.jsonl"),
        (("--mode", "15W"), 2, "no board was named; add: --board"),
        (("--check", "--board", "nano"), 2, "--check takes only --json"),
        (("--board", "nano", "--mode", "5W", "--runtime", "vllm", "--out", "t"), 2, "there is no runtime 'vllm'"),
        (("--board", "nano", "--mode", "5W", "--precision", "fp8", "--out", "t"), 2, "there is no precision 'fp8'"),
        (("--board", "nano", "--mode", "5W", "--space", "papper", "--out", "t"), 2, "there is no space 'papper'"),
        (("--board", "nano", "--mode", "5W", "--lengths", "9999", "--out", "t"), 2, "not within the space's 2048"),
    ],
)
def test_refusals_are_one_line(tmp_path: Path, arguments: tuple[str, ...], code: int, says: str) -> None:
    done = merino("estimate", *arguments, code=code, cwd=tmp_path)
    assert not done.stdout and done.stderr.count("\n") == 1 and says in done.stderr
    assert not list(tmp_path.iterdir())
