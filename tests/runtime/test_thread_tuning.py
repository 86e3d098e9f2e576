"""Thread tuning is measured once on a machine, stored in the bundle, and used on such a machine only."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merino_edge import artefact, bundle
from merino_edge.errors import ArtefactError
from merino_edge.runtime import thread_tuning
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.thread_tuning import Tuning


@given(st.integers(1, 300))
def test_candidates_reach_from_one_thread_to_all_cores(cores: int) -> None:
    tunings = thread_tuning.candidate_tunings(cores)
    assert tunings[0] == Tuning(1) and tunings[-1] == Tuning(cores, spinning=cores > 1)
    assert len(set(tunings)) == len(tunings) <= 2 * cores.bit_length() + 1
    assert [t.threads for t in tunings] == sorted(t.threads for t in tunings)


@pytest.mark.parametrize(
    ("times_ms", "best"),
    [
        ((10.2, 10.1, 10.0), Tuning(1)),
        ((11.0, 10.1, 10.0), Tuning(2)),
        ((11.0, 12.0, 10.0), Tuning(2, spinning=True)),
    ],
)
def test_of_equally_fast_tunings_the_one_with_the_fewest_threads_is_taken(
    times_ms: tuple[float, ...], best: Tuning
) -> None:
    tunings = (Tuning(1), Tuning(2), Tuning(2, spinning=True))
    measured = dict(zip(tunings, times_ms, strict=True))
    assert thread_tuning.fewest_threads_within_tolerance(measured) == best


@pytest.fixture
def copied(bundle_path: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path, tmp_path / "bundle"))


def threads_of(path: Path, threads: int | None = None) -> int:
    engine, _, _ = open_engine(path, threads)
    engine.close()
    assert isinstance(engine, OnnxEngine)
    return engine.threads


def test_a_tuning_is_used_on_the_same_machine_only(copied: Path) -> None:
    machine, cores = thread_tuning.this_machine(), thread_tuning.this_machine()["cores"]
    for entry in ({**machine, "cores": cores + 1}, {**machine, "cpu": "another"}):
        bundle.add_tuning(bundle.load(copied), {**entry, "threads": cores + 5, "spinning": True})
    assert thread_tuning.tuning_for_this_machine(bundle.load(copied)) is None and threads_of(copied) == cores
    bundle.add_tuning(bundle.load(copied), {**machine, "threads": cores + 5, "spinning": False})
    assert len(bundle.load(copied).tunings) == 3
    assert (
        thread_tuning.tuning_for_this_machine(bundle.load(copied)) == Tuning(cores + 5)
        and threads_of(copied) == cores + 5
    )


@pytest.mark.parametrize("damaged", [{"threads": 0}, {"threads": True}, {"threads": "2"}, {"spinning": None}])
def test_a_damaged_entry_is_one_line(copied: Path, damaged: dict[str, Any]) -> None:
    entry = {**thread_tuning.this_machine(), "threads": 1, "spinning": False, **damaged}
    bundle.add_tuning(bundle.load(copied), entry)
    with pytest.raises(ArtefactError, match="merino-edge build") as refusal:
        threads_of(copied)
    assert "\n" not in str(refusal.value)


def test_tunings_that_are_not_a_list_are_refused(copied: Path) -> None:
    manifest = json.loads((copied / "manifest.json").read_text())
    payload = {key: value for key, value in manifest.items() if key not in ("kind", "schema_version", "sha256")}
    artefact.write_json(copied / "manifest.json", "bundle", payload | {"tunings": 3}, 1)
    with pytest.raises(ArtefactError, match="tunings: expected array, got int"):
        bundle.load(copied)
