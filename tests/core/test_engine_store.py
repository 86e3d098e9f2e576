"""The engine store: engines are found by graph, weights, GPU and library, and kept outside the bundle."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.smallest_graph import SMALLEST_GRAPH
from merino_edge import artefact, bundle, engine_store
from merino_edge.architecture import Architecture, Block
from merino_edge.engine_store import add_stored, check_room, engines_of, store_folder, store_folders
from merino_edge.errors import ArtefactError, OutputError

A = Architecture(32, 16, 32, 16, (Block(32, 1, 2, 2, 32),))
ORIN = {"capability": "SM87", "library": "tensorrt", "version": "10.3.0"}


def made(folder: Path, weights: bytes) -> bundle.Bundle:
    folder.mkdir()
    for name in bundle.REQUIRED_FILES:
        (folder / name).write_bytes(SMALLEST_GRAPH)
    (folder / bundle.WEIGHTS).write_bytes(weights)
    bundle.write_manifest(folder, A, "fp16", "jetpack-6.2", 16)
    return bundle.load(folder)


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(engine_store.VARIABLE, str(tmp_path / "store"))
    return store_folder()


def test_an_engine_belongs_to_the_graph_and_its_weights(tmp_path: Path, store: Path) -> None:
    one, other = made(tmp_path / "one", b"1"), made(tmp_path / "other", b"2")
    copy = bundle.load(shutil.copytree(one.path, tmp_path / "copy"))
    add_stored(store, one.graph_sha256(16), b"a plan", {**ORIN, "context": 16})
    assert engines_of(other) == []  # of the same shape, so with the same graph file
    for loaded in (one, copy):
        (engine,) = engines_of(loaded)
        engine.check()
        assert engine.path.read_bytes() == b"a plan" and engine.entry["context"] == 16
        assert {path.name for path in loaded.path.iterdir()} == {*loaded.manifest["files"], "manifest.json"}


def test_a_build_replaces_the_engine_of_the_same_gpu_and_release(tmp_path: Path, store: Path) -> None:
    graph = made(tmp_path / "b", b"1").graph_sha256(16)
    for plan, change in ((b"1", {}), (b"2", {"capability": "SM110"}), (b"3", {"version": "10.16.2"}), (b"4", {})):
        add_stored(store, graph, plan, {**ORIN, **change})
    found = engines_of(bundle.load(tmp_path / "b"))
    assert sorted(engine.path.read_bytes() for engine in found) == [b"2", b"3", b"4"]
    assert len(list(store.glob("*.plan"))) == 3


def test_what_is_damaged_is_refused(tmp_path: Path, store: Path) -> None:
    loaded = made(tmp_path / "b", b"1")
    engine = add_stored(store, loaded.graph_sha256(16), b"a plan", ORIN)
    engine.path.write_bytes(b"b plan")
    with pytest.raises(ArtefactError, match=r"altered; build it again: merino-edge build"):
        engines_of(loaded)[0].check()
    engine.path.unlink()
    with pytest.raises(ArtefactError, match="missing"):
        engines_of(loaded)[0].check()
    (entry,) = store.glob("*.json")
    entry.write_text(entry.read_text().replace("SM87", "SM86"))
    assert engines_of(loaded) == []


def test_an_entry_that_cannot_be_read_or_is_deleted_meanwhile_hides_no_other(
    tmp_path: Path, store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = made(tmp_path / "b", b"1")
    for capability in ("SM110", "SM86", "SM53", "SM87"):
        add_stored(store, loaded.graph_sha256(16), b"a plan", {**ORIN, "capability": capability})
    (truncated,), (deleted,), (newer,) = (list(store.glob(f"*-{name}-*.json")) for name in ("SM110", "SM86", "SM53"))
    truncated.write_text(truncated.read_text()[:99])
    newer.write_text(newer.read_text().replace('"schema_version": 1', '"schema_version": 2'))
    read = artefact.read_json

    def read_then_delete(path: Path, *options: int, **more: Any) -> dict[str, object]:
        content = read(path, *options, **more)
        if path == deleted:
            path.unlink()
        return content

    monkeypatch.setattr(artefact, "read_json", read_then_delete)
    assert [engine.entry["capability"] for engine in engines_of(loaded)] == ["SM87"]


def test_the_store_is_the_variable_s_then_the_container_s_then_the_user_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(engine_store.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    mine, volume = tmp_path / "cache/merino-edge/engines", tmp_path / "engines"
    assert store_folders(tmp_path) == [mine]
    volume.mkdir()
    assert store_folder(tmp_path) == volume
    monkeypatch.setattr(os, "access", lambda path, mode: path != volume)  # as a volume of another user answers
    assert store_folder(tmp_path) == mine
    assert store_folders(tmp_path) == [volume, mine]  # it is still read
    monkeypatch.setenv(engine_store.VARIABLE, str(tmp_path / "named"))
    assert store_folders(tmp_path) == [tmp_path / "named"]


def test_a_folder_without_room_or_rights_is_refused(tmp_path: Path) -> None:
    check_room(tmp_path / "new", 1)
    with pytest.raises(OutputError, match=r"engines need about .* MB are free; free the disk, or set MERINO_ENGINES"):
        check_room(tmp_path, 2**60)
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", Path("/proc/engines")):  # which not even root can write
        with pytest.raises(OutputError, match=r"engines cannot be kept in .*; set MERINO_ENGINES"):
            check_room(folder, 1)


@pytest.mark.parametrize("when", ["writing the engine", "writing the entry"])
def test_a_disk_that_fills_up_leaves_the_engine_before(
    tmp_path: Path, store: Path, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = made(tmp_path / "b", b"1")
    add_stored(store, loaded.graph_sha256(16), b"one", ORIN)
    real, calls = os.replace, []

    def replace(source: Path, target: Path) -> None:
        calls.append(target)
        if (len(calls) == 1) == (when == "writing the engine"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with pytest.raises(OutputError, match=r"engines cannot be kept.*No space left.*MERINO_ENGINES"):
        add_stored(store, loaded.graph_sha256(16), b"two", ORIN)
    (engine,) = engines_of(loaded)
    engine.check()
    assert engine.path.read_bytes() == b"one"


def test_a_named_folder_is_taken_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the container's own, where it is missing: the check of its room then says what is wrong."""
    monkeypatch.setenv(engine_store.VARIABLE, str(tmp_path / engine_store.OF_CONTAINER))
    assert store_folder(tmp_path) == tmp_path / engine_store.OF_CONTAINER
