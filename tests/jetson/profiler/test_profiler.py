"""Real profiles of a tiny space: what is written, what an interruption leaves, and what may be continued."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path
from typing import Any

import pytest

from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, InputError, OutputError, UnsupportedError
from merino_edge.jetson.profiler import batching, profiler
from merino_edge.jetson.profiler.backends import backend_named
from merino_edge.jetson.profiler.found import found_probes
from merino_edge.jetson.profiler.plan import QUICK_HELD_OUT
from merino_edge.jetson.profiler.profiler import Progress, Request
from merino_edge.latency.measurement import MODES
from merino_edge.latency.step import Step
from merino_edge.latency.table import LatencyTable, family
from merino_edge.latency.table_file import from_compact, load_table, to_compact
from merino_edge.latency.transfer import chosen_entries, entries
from merino_edge.latency.verdict import judge
from merino_edge.presets import shrunk
from merino_edge.runtime.engine import Engine
from merino_edge.search import space_file
from merino_edge.search.found_models import found_models
from merino_edge.search.space import Space

CPU = backend_named("onnxruntime-cpu")


def run(
    path: Path,
    space: Space,
    *,
    resume: bool = False,
    precision: str = "fp32",
    stop_after: int | None = None,
    **options: Any,
) -> LatencyTable:
    def stop(progress: Progress) -> None:
        if stop_after is not None and progress.done >= stop_after:
            raise KeyboardInterrupt

    request = Request(space, space_file.to_dict(space), precision, 1, options.pop("backend", CPU), 1.0, **options)
    return profiler.profile(path, request, resume=resume, on_progress=stop)


@pytest.mark.usefixtures("hasty_clock")
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_profile_prices_every_architecture_of_its_space(tmp_path: Path, tiny_space: Space, precision: str) -> None:
    path = tmp_path / "t.jsonl"
    table = run(path, tiny_space, precision=precision)
    assert table == load_table(path) and table.precision == precision and not table.estimated
    for genome in tiny_space.candidates():
        assert all(table.model_ms(tiny_space.architecture(genome), mode) >= 0 for mode in MODES)
    assert all(table.validation[mode]["models"] == QUICK_HELD_OUT for mode in MODES)
    assert all(m.reference_ms for m in table.measurements)
    samples = {m.what: m.samples for m in table.measurements if m.mode == "prefill"}
    assert set(samples) == {"layer", "width_change", "end", "model"}
    assert all(len(rounds) == 2 for rounds in samples.values()) and min(samples["model"]) > 0
    assert {m.what for m in table.measurements if m.mode == "decode"} == {*samples, "repeat", "calibration"}
    moments = [reading["moment"] for reading in table.conditions]
    assert moments[0] == "before" and moments[-1] == "after" and "clock_mhz" in table.conditions[0]
    assert table.verdict is not None and table.verdict == judge(table.validation, table.conditions)
    assert 0 <= table.conditions[-1]["other_load"]["of_measured"] <= 1


@pytest.mark.usefixtures("hasty_clock")
def test_models_that_may_not_fit_the_caches_are_timed_cold_too(
    tmp_path: Path, tiny_space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler.device, "last_level_cache_bytes", lambda card: 2**16)
    table = run(tmp_path / "t.jsonl", tiny_space)
    assert {m.cache for m in table.measurements if m.what == "end" and m.mode == "decode"} == {"warm", "cold"}
    assert any(m.what == "calibration" for m in table.measurements) and table.step_time is not None
    step = Step("decode", 8)
    for genome in tiny_space.candidates():
        a = tiny_space.architecture(genome)
        sums = [[table.sum_cost(a, piece) for piece in pieces] for pieces in table.alternatives(step)]
        assert table.model_cost(a, step) == min(map(max, sums))
        interval = table.model_interval(a, step)
        bounded = table.validation["decode"]["low_percent"] is not None  # not where a busy machine predicted 0
        assert interval.low <= interval.high if interval is not None else not bounded


@pytest.mark.usefixtures("hasty_clock")
def test_an_interrupted_profile_goes_on_where_it_stopped(
    tmp_path: Path, tiny_space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batching, "BATCH_PROBES", 5)
    path = tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, tiny_space, stop_after=10)
    begun = path.read_text()
    assert begun.count('"samples"') >= 10
    with pytest.raises(ArtefactError, match=r"unfinished.*--continue"):
        load_table(path)

    path.write_text(begun[:-20])  # as when power fails in the middle of a line
    table = run(path, tiny_space, resume=True)
    kept = [line for line in begun[:-20].split("\n")[:-1] if '"samples"' in line]
    finished = path.read_text()
    assert kept and all(line in finished for line in kept)
    assert table.finished and len(table.measurements) == len({m.key for m in table.measurements})
    assert run(path, tiny_space, resume=True).measurements == table.measurements  # nothing left to measure
    assert path.read_text() == finished


@pytest.mark.usefixtures("hasty_clock")
def test_only_the_same_profile_may_be_continued(tmp_path: Path, tiny_space: Space) -> None:
    path = tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, tiny_space, stop_after=5)
    begun = path.read_bytes()
    with pytest.raises(InputError, match="another precision"):
        run(path, tiny_space, resume=True, precision="int8")
    with pytest.raises(OutputError, match="exists; finish it with --continue"):
        run(path, tiny_space)
    assert path.read_bytes() == begun


@pytest.mark.usefixtures("hasty_clock")
def test_a_table_of_another_machine_is_not_continued(
    tmp_path: Path, tiny_space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, tiny_space, stop_after=5)
    card = profiler.device.device_card()
    monkeypatch.setattr(profiler.device, "device_card", lambda: {**card, "cores": 128})
    with pytest.raises(InputError, match="begun on another device: cores"):
        run(path, tiny_space, resume=True)


@pytest.mark.usefixtures("hasty_clock")
def test_a_finished_table_can_be_extended(tmp_path: Path, tiny_space: Space) -> None:
    """By another FFN kind, a wider embedding and a length: what a search's refusal asks for."""
    path = tmp_path / "t.jsonl"
    first = run(path, tiny_space)
    wider = dataclasses.replace(tiny_space, name="wider", ffn=("relu", "swiglu"), embedding_widths=(32, 64))
    a = wider.architecture(wider.sample(random.Random(1)))
    assert first.gaps("layer", "swiglu", Step("decode", 10), []) != []
    table = run(path, wider, resume=True, lengths=[10])
    assert {m.key for m in first.measurements} < {m.key for m in table.measurements}
    assert table.header["lengths"] == [4, 10, 16] and table.header["space"]["name"] == "wider"
    assert table.default_length == first.default_length
    for mode in MODES:
        assert table.model_ms(a, mode, 10) >= 0
        assert table.validation[mode]["models"] > first.validation[mode]["models"]
    assert run(path, wider, resume=True).measurements == table.measurements  # nothing left to measure


@pytest.mark.usefixtures("hasty_clock")
def test_only_some_entries_may_be_asked_for(tmp_path: Path, tiny_space: Space) -> None:
    path = tmp_path / "t.jsonl"
    some = run(path, tiny_space, only="^(layer|end) decode")
    assert {(m.what, m.mode) for m in some.measurements} == {("layer", "decode"), ("end", "decode")}
    assert not some.finished and not some.validation
    table = run(path, tiny_space, resume=True)
    assert table.finished and table.measurements[: len(some.measurements)] == some.measurements


@pytest.mark.usefixtures("hasty_clock")
@pytest.mark.parametrize("refused", [128, 64])  # 64 is the reference model's
def test_a_shape_that_the_backend_cannot_run_is_recorded_and_the_rest_goes_on(
    tmp_path: Path, tiny_space: Space, refused: int
) -> None:
    def open_engine(a: Architecture, precision: str, threads: int) -> Engine:
        if any(block.ffn_width == refused for block in a.blocks):
            raise UnsupportedError(f"no kernel for {refused}", "choose another width")
        return CPU.open(a, precision, threads)

    table = run(tmp_path / "t.jsonl", tiny_space, backend=dataclasses.replace(CPU, open=open_engine))
    assert table == load_table(tmp_path / "t.jsonl") and table.finished
    assert table.failed and all(f"no kernel for {refused}" in m.failed for m in table.failed)
    assert all(m.samples or m.failed for m in table.measurements)
    narrow = next(a for g in tiny_space.candidates() if _widest_ffn(a := tiny_space.architecture(g)) == 32)
    assert table.model_ms(narrow, "decode") > 0
    wide = next(a for g in tiny_space.candidates() if _widest_ffn(a := tiny_space.architecture(g)) == refused)
    with pytest.raises(InputError, match=f"could not be measured: no kernel for {refused}"):
        table.model_ms(wide, "decode")


def _widest_ffn(a: Architecture) -> int:
    return max(block.ffn_width for block in a.blocks)


def find(*asked: Any) -> list[Architecture]:
    table, mode, count, seconds, without = asked
    space = space_file.from_dict(table.header["space"], "")
    return found_models(space, table, mode, count=min(count, 4), seconds=seconds, without=without)


def interrupted(*asked: Any) -> list[Architecture]:
    raise KeyboardInterrupt


@pytest.mark.usefixtures("hasty_clock")
def test_models_that_a_search_finds_are_measured_and_compared_apart(tmp_path: Path, tiny_space: Space) -> None:
    path = tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):  # after all other models were measured
        run(path, tiny_space, find=interrupted)
    table = run(path, tiny_space, resume=True, find=find)
    found = [m for m in table.measurements if m.what == "found"]
    drawn = {m.key.replace('"model"', '"found"') for m in table.measurements if m.what == "model"}
    assert found and drawn.isdisjoint({m.key for m in found})
    assert table == load_table(path) and '"what": "found"' not in path.read_text()  # which older versions refuse
    step = Step("decode", table.default_length)
    if (figures := table.validation["decode"].get("found")) and figures["low_percent"] is not None:
        assert figures["models"] >= 4
        _, low, high = table.interval(100.0, step, found=True) or (0, 0, 0)
        assert low <= 100 + figures["low_percent"] + 1e-9 and high >= 100 + figures["high_percent"] - 1e-9
    assert run(path, tiny_space, resume=True, find=find).measurements == table.measurements


@pytest.mark.usefixtures("hasty_clock")
def test_a_public_model_is_measured_as_a_whole(
    tmp_path: Path, tiny_space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    public = shrunk("opt-125m")  # its heads of 64 are not of the space
    monkeypatch.setattr(profiler, "preset", lambda name: {"opt": public}[name])
    table = run(tmp_path / "t.jsonl", tiny_space, also=["opt"])
    assert table.header["also"] == ["opt"] and table.validation["decode"]["models"] == QUICK_HELD_OUT
    for mode in MODES:
        lengths = sorted(m.length for m in table.measurements if (m.what, m.mode) == ("public", mode))
        low, high = (table.measured_cost(public, Step(mode, length)) or 0.0 for length in (lengths[0], lengths[-1]))
        between = table.measured_cost(public, Step(mode, (lengths[0] + lengths[-1]) // 2))
        assert between is not None and min(low, high) <= between <= max(low, high) and low > 0
        assert table.measured_cost(public, Step(mode, lengths[-1] + 1)) is None
    assert table.measured_cost(tiny_space.architecture(next(iter(tiny_space.candidates()))), Step("decode", 8)) is None


@pytest.mark.usefixtures("hasty_clock")
def test_a_share_of_a_full_table_s_entries_makes_a_table_of_another_precision(
    tmp_path: Path, tiny_space: Space
) -> None:
    full = run(tmp_path / "full.jsonl", tiny_space, precision="int8")
    path = tmp_path / "short.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, tiny_space, like=full, stop_after=4)
    with pytest.raises(InputError, match=r"is transferred from full.jsonl; continue it with the same --like"):
        run(path, tiny_space, resume=True)
    table = run(path, tiny_space, like=full, resume=True)
    assert table.finished and table.precision == "fp32" and table == load_table(path)
    chosen = {m.key for m in chosen_entries(full)}
    assert {m.key for m in entries(table)} == {m.key for m in entries(full)}
    assert {m.key for m in entries(table) if not m.transferred} == chosen
    assert table.validation["decode"]["models"] == QUICK_HELD_OUT  # measured here, as in any table
    source = table.header["transferred"]
    assert source["sha256"] == full.sha256 and (source["measured"], source["entries"]) == (
        len(chosen),
        len(entries(full)),
    )
    says = (
        f"{len(chosen)} of its {len(entries(full))} entries were measured here, the others follow from full.jsonl (int8"
    )
    assert says in table.warnings[-1] and says in from_compact(to_compact(table), "r.json").warnings[-1]
    for genome in tiny_space.candidates():
        assert all(table.model_ms(tiny_space.architecture(genome), mode) >= 0 for mode in MODES)
    assert run(path, tiny_space, like=full, resume=True).measurements == table.measurements


def test_a_profile_that_measured_nothing_leaves_nothing(tmp_path: Path, tiny_space: Space) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "t.jsonl", tiny_space, stop_after=0)
    assert not (tmp_path / "t.jsonl").exists()


def test_an_unwritable_place_is_refused_before_measuring(tmp_path: Path, tiny_space: Space) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):  # nobody, root included, can write below a file
        run(tmp_path / "file" / "t.jsonl", tiny_space, stop_after=0)


def test_where_engines_are_compiled_few_found_models_serve_both_modes(tiny_space: Space) -> None:
    models = [tiny_space.architecture(g) for g in list(tiny_space.candidates())[:30]]
    asked: list[tuple[object, ...]] = []

    def few(*words: Any) -> list[Architecture]:
        asked.append(words)
        return models[: words[2]]

    header = {"family": family(models[0]), "precision": "fp32", "default_length": 8, "estimated": False}
    table = LatencyTable(Path("t"), header, [], {}, "")
    probes = list(found_probes(table, [], few, quick=True, seconds=60.0, compiled=True))
    assert {p.mode for p in probes} == set(MODES) and len({p.models for p in probes}) == 8 == len(probes) / 2
    assert [words[1] for words in asked] == ["decode"]
    apart = list(found_probes(table, [], few, quick=True, seconds=60.0, compiled=False))
    assert [sum(p.mode == mode for p in apart) for mode in MODES] == [10, 6]
