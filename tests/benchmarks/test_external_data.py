"""No bundle reads weights elsewhere, however its graph spells their place and wherever it names them."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path
from types import ModuleType

import pytest

from merino_edge import bundle
from merino_edge.errors import ArtefactError


@pytest.fixture
def script(repository: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(repository / "benchmarks")
    return importlib.import_module("external_data")


def test_no_way_of_naming_a_file_outside_is_taken(script: ModuleType, tmp_path: Path) -> None:
    ways = set()
    for way, _, folder in script.written(tmp_path, "b"):
        with pytest.raises(ArtefactError, match=r"model\.onnx (reads weights from|is not an ONNX graph)"):
            bundle.load(folder)
        ways.add(way)
    assert len(ways) == len(script.WAYS) > 20


@pytest.mark.parametrize("spelling", ["plain", "value first"])
def test_the_same_ways_of_naming_its_own_file_are_taken_where_all_readers_agree(
    script: ModuleType, tmp_path: Path, spelling: str
) -> None:
    """So it is the place that is refused above, and not the writing of the graph."""
    folder = tmp_path / "b"
    shutil.copytree(bundle.find("lamb"), folder)
    graph = folder / "model.onnx"
    graph.write_bytes(script.WAYS[spelling](bundle.WEIGHTS)(graph.read_bytes()))
    script.vouch(folder)
    assert bundle.load(folder).architecture == bundle.load("lamb").architecture


def test_the_file_must_be_listed_and_long_enough(script: ModuleType, tmp_path: Path) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle.find("lamb"), folder)
    weights = folder / bundle.WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-1])
    script.vouch(folder)
    with pytest.raises(ArtefactError, match="beyond the end of"):
        bundle.load(folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["files"][bundle.WEIGHTS]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    script.vouch(folder)
    with pytest.raises(ArtefactError, match=r"reads weights from 'model\.onnx\.data'"):
        bundle.load(folder)


def test_another_operator_must_be_allowed_by_name(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "b"
    shutil.copytree(bundle.find("lamb"), folder)
    graph = folder / "model.onnx"
    node = script.piece(1, script.piece(2, b"y") + script.piece(4, b"Bar") + script.piece(7, b"com.foo"))
    graph.write_bytes(script.changed(graph.read_bytes(), (7,), lambda content: script.piece(7, content + node)))
    script.vouch(folder)
    with pytest.raises(ArtefactError, match=r"uses the operator 'com\.foo\.Bar'") as refusal:
        bundle.load(folder)
    assert f"{bundle.ALLOWED_OPERATORS}=com.foo.Bar" in refusal.value.hint
    monkeypatch.setenv(bundle.ALLOWED_OPERATORS, "Baz,com.foo.Bar")
    bundle.load(folder)
