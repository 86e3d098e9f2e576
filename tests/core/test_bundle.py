"""A bundle's engines: the complete file is written first and named afterwards."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.smallest_graph import SMALLEST_GRAPH
from merino_edge import artefact, atomic, bundle
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError

A = Architecture(32, 16, 32, 16, (Block(32, 1, 2, 2, 32),))


@pytest.fixture
def made(tmp_path: Path) -> bundle.Bundle:
    folder = tmp_path / "b"
    folder.mkdir()
    for name in bundle.REQUIRED_FILES:
        (folder / name).write_bytes(SMALLEST_GRAPH)
    bundle.write_manifest(folder, A, "fp16", "rtx", 16)
    return bundle.load(folder)


def same(entry: dict[str, str]) -> bool:
    return entry["capability"] == "SM86"


def test_an_engine_replaces_the_one_for_the_same_gpu_only(made: bundle.Bundle) -> None:
    first = bundle.add_engine(made, b"one", {"capability": "SM86"}, same)
    other = bundle.add_engine(first, b"two", {"capability": "SM89"}, lambda entry: False)
    last = bundle.add_engine(other, b"three", {"capability": "SM86"}, same)
    assert bundle.load(made.path).manifest == last.manifest
    assert [(made.path / e["file"]).read_bytes() for e in last.engines] == [b"two", b"three"]
    assert len(list(made.path.glob("*.plan"))) == 2
    again = bundle.add_engine(last, b"three", {"capability": "SM86"}, same)  # the very same file
    assert bundle.load(made.path).engines == again.engines and len(again.engines) == 2


def test_what_a_killed_build_left_is_removed_by_the_next(made: bundle.Bundle) -> None:
    loaded = bundle.add_engine(made, b"one", {"capability": "SM89"}, same)
    for name in ("engine-0123456789ab.plan", "engine-mine.plan", "engine-0123456789ab.txt"):
        (made.path / name).write_bytes(b"left")
    loaded = bundle.add_engine(loaded, b"two", {"capability": "SM86"}, same)
    files = {path.name for path in made.path.iterdir()} - {*bundle.REQUIRED_FILES, "manifest.json"}
    assert files == {*(entry["file"] for entry in loaded.engines), "engine-mine.plan", "engine-0123456789ab.txt"}


def test_a_build_that_was_killed_while_it_wrote_leaves_nothing(made: bundle.Bundle) -> None:
    dead = atomic.hidden_name(made.path / "engine-0123456789ab.plan").name.replace(f".{os.getpid()}-", ".4194304-")
    (made.path / dead).write_bytes(b"half")
    bundle.add_engine(made, b"another", {"capability": "SM89"}, same)
    assert not (made.path / dead).exists()


@pytest.mark.parametrize("when", ["writing the engine", "writing the manifest"])
def test_a_full_disk_leaves_the_bundle_as_it_was(
    made: bundle.Bundle, when: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = bundle.add_engine(made, b"one", {"capability": "SM86"}, same)
    real, calls = os.replace, []

    def replace(source: str, target: Path) -> None:
        calls.append(target)
        if (len(calls) == 1) == (when == "writing the engine"):
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr(artefact.os, "replace", replace)
    with pytest.raises(Exception, match="No space left"):
        bundle.add_engine(first, b"two", {"capability": "SM86"}, same)
    assert bundle.load(made.path).manifest == first.manifest


def test_a_manifest_whose_engine_is_no_file_of_it_is_refused(made: bundle.Bundle) -> None:
    stored = bundle.add_engine(made, b"one", {"capability": "SM86"}, same)
    payload = {
        k: v for k, v in stored.manifest.items() if k not in ("kind", "schema_version", "tool_version", "sha256")
    }
    payload["engines"] = [{"file": "../outside.plan"}]
    artefact.write_json(made.path / "manifest.json", bundle.KIND, payload, bundle.SCHEMA_VERSION)
    with pytest.raises(ArtefactError, match="not those of its files"):
        bundle.load(made.path)
