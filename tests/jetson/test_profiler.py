"""Real profiles of a tiny space: what is written, what an interruption leaves, and what may be continued."""

from __future__ import annotations

import dataclasses
import random
from pathlib import Path

import pytest

from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.jetson import profiler
from merino_edge.latency_table import LatencyTable, Step
from merino_edge.measurement import MODES
from merino_edge.search import space_file
from merino_edge.search.space import Space


def run(
    path: Path,
    space: Space,
    resume: bool = False,
    precision: str = "fp32",
    stop_after: int | None = None,
    lengths: list[int] | None = None,
) -> LatencyTable:
    def note(done: int, total: int) -> None:
        if stop_after is not None and done >= stop_after:
            raise KeyboardInterrupt

    return profiler.profile(path, space, space_file.to_dict(space), precision, 1, True, resume, note, lengths)


@pytest.mark.usefixtures("hasty_clock")
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_profile_prices_every_architecture_of_its_space(tmp_path: Path, tiny_space: Space, precision: str) -> None:
    path = tmp_path / "t.jsonl"
    table = run(path, tiny_space, precision=precision)
    assert table == LatencyTable.load(path) and table.precision == precision and not table.estimated
    for genome in tiny_space.genomes():
        assert all(table.model_ms(tiny_space.architecture(genome), mode) >= 0 for mode in MODES)
    assert all(table.validation[mode]["models"] == 10 for mode in MODES)
    samples = {m.what: m.samples for m in table.measurements if m.mode == "prefill"}
    assert set(samples) == {"layer", "repeat", "width_change", "end", "model"}
    assert all(len(rounds) == 2 for rounds in samples.values()) and min(samples["model"]) > 0


@pytest.mark.usefixtures("hasty_clock")
def test_an_interrupted_profile_goes_on_where_it_stopped(
    tmp_path: Path, tiny_space: Space, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiler, "BATCH_PROBES", 5)
    path = tmp_path / "t.jsonl"
    with pytest.raises(KeyboardInterrupt):
        run(path, tiny_space, stop_after=10)
    begun = path.read_text()
    assert begun.count("\n") == 1 + 10 * len(MODES)
    with pytest.raises(ArtefactError, match=r"unfinished.*--continue"):
        LatencyTable.load(path)

    path.write_text(begun[:-20])  # as when power fails in the middle of a line
    table = run(path, tiny_space, resume=True)
    lost = begun.rstrip("\n").rfind("\n") + 1
    assert path.read_text().startswith(begun[:lost])
    finished = path.read_text()
    assert table.validation and len(table.measurements) == len({m.key for m in table.measurements})
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
def test_a_finished_table_can_be_extended(tmp_path: Path, tiny_space: Space) -> None:
    """By another FFN kind, a wider embedding and a length: what a search's refusal asks for."""
    path = tmp_path / "t.jsonl"
    first = run(path, tiny_space)
    wider = dataclasses.replace(tiny_space, name="wider", ffn=("relu", "swiglu"), embedding_widths=(32, 64))
    a = wider.architecture(wider.sample(random.Random(1)))
    assert first.gaps("layer", "swiglu", Step("decode", 10), []) != []
    table = run(path, wider, resume=True, lengths=[10])
    assert table.measurements[: len(first.measurements)] == first.measurements
    assert table.header["lengths"] == [4, 10, 16] and table.header["space"]["name"] == "wider"
    assert table.default_length == first.default_length
    for mode in MODES:
        assert table.model_ms(a, mode, 10) >= 0
        assert table.validation[mode]["models"] > first.validation[mode]["models"]
    assert run(path, wider, resume=True).measurements == table.measurements  # nothing left to measure


def test_a_profile_that_measured_nothing_leaves_nothing(tmp_path: Path, tiny_space: Space) -> None:
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "t.jsonl", tiny_space, stop_after=0)
    assert not (tmp_path / "t.jsonl").exists()


def test_an_unwritable_place_is_refused_before_measuring(tmp_path: Path, tiny_space: Space) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match="cannot write"):  # nobody, root included, can write below a file
        run(tmp_path / "file" / "t.jsonl", tiny_space, stop_after=0)


def test_batches_fit_in_memory_and_lose_nothing(monkeypatch: pytest.MonkeyPatch, tiny_space: Space) -> None:
    probes = profiler.make_plan(tiny_space, "fp32", quick=True).probes
    monkeypatch.setattr(profiler, "BATCH_BYTES", 700_000)
    found = list(profiler.batches(probes))
    assert [p for batch in found for p in batch] == list(probes) and len(found) > 2
    for batch in found:
        assert len(batch) == 1 or 4 * sum(a.parameters for p in batch for a in p.models) <= 700_000
