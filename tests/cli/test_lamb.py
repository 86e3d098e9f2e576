"""The model in the package: it is found by its name, complete, small, and answers without any download."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from helpers.stranger import run
from merino_edge import bundle
from merino_edge.errors import ArtefactError

LAMB = bundle.PACKAGED / "lamb"
FILES = {"README.md", "chat.json", "manifest.json", "model.onnx", "model.onnx.data", "tokenizer.json"}


def test_it_is_small_and_whole() -> None:
    assert {path.name for path in LAMB.iterdir()} == FILES
    assert sum(path.stat().st_size for path in LAMB.iterdir()) < 25e6
    loaded = bundle.load("lamb")
    assert (loaded.precision, loaded.target) == ("int4", "onnxruntime")
    assert "CDLA-Sharing-1.0" in (LAMB / "README.md").read_text()


@pytest.mark.parametrize(
    ("prompt", "word"), [("Tell me a story about a dog.", "dog"), ("What colour is the sky?", "blue")]
)
def test_it_answers_and_ends(prompt: str, word: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("generate", "--prompt", prompt, "--greedy", "--json", "--threads", 1) == 0
    said = json.loads(capsys.readouterr().out)
    assert word in str(said["text"]).lower() and said["finish_reason"] == "stop"


def test_a_folder_of_that_name_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert bundle.find("lamb") == LAMB
    (tmp_path / "lamb").mkdir()
    assert bundle.find("lamb") == Path("lamb")
    assert bundle.find("../lamb") == Path("../lamb") and bundle.find("..") == Path("..")
    with pytest.raises(ArtefactError, match="does not exist; did you mean lamb"):
        bundle.load("../lamb")


def test_an_installer_may_link_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some installers link files between environments. A bundle from elsewhere may not have links."""
    shutil.copytree(LAMB, tmp_path / "cache")
    (tmp_path / "packaged" / "lamb").mkdir(parents=True)
    for path in (tmp_path / "cache").iterdir():
        os.link(path, tmp_path / "packaged" / "lamb" / path.name)
    with pytest.raises(ArtefactError, match="is linked to a file elsewhere"):
        bundle.load(tmp_path / "packaged" / "lamb")
    monkeypatch.setattr(bundle, "PACKAGED", tmp_path / "packaged")
    assert bundle.load("lamb").architecture == bundle.load(LAMB.parent / "lamb").architecture
