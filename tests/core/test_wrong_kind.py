"""The kind of any path is told from its first bytes, and the wrong one is refused with the command for it."""

from __future__ import annotations

import os
import shlex
from pathlib import Path

import pytest

from helpers.looks_like import looks_like
from merino_edge import bundle, checkpoint, wrong_kind
from merino_edge.errors import ArtefactError
from merino_edge.latency.table_file import load_table


@pytest.mark.parametrize("kind", wrong_kind.NOUNS)
def test_each_kind_is_known(kind: str, tmp_path: Path) -> None:
    path = looks_like(kind, tmp_path)
    assert wrong_kind.kind_of(path) == kind
    wrong_kind.require(path, kind)
    with pytest.raises(ArtefactError) as refused:
        wrong_kind.require(path, "bundle" if kind != "bundle" else "checkpoint")
    assert str(refused.value).startswith(f"{path} is {wrong_kind.NOUNS[kind]}, not a")
    named = path.parent if kind == "demo" else path  # its summary is in the folder
    if kind == "written_corpus":
        named = path.with_suffix(".jsonl")
    words = shlex.split(refused.value.hint)
    assert "merino-edge" in words and str(named) in words


def test_what_says_no_kind_has_none(tmp_path: Path) -> None:
    for number, text in enumerate(('{"kind": "bundle"}', '["kind"]', "GGU", "", "a text", '{"kind": "poem"')):
        (tmp_path / str(number)).write_text(text)
        assert wrong_kind.kind_of(tmp_path / str(number)) is None
    for name in wrong_kind.FOLDERS:  # such names are common
        (tmp_path / f"{name} of something else").mkdir()
        (tmp_path / f"{name} of something else" / name).write_text('{"name": "a data set"}')
        assert wrong_kind.kind_of(tmp_path / f"{name} of something else") is None
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    (tmp_path / "zero").symlink_to("/dev/zero")
    for name in ("pipe", "zero", "nothing", "\0", "a" * 999, "."):
        assert wrong_kind.kind_of(tmp_path / name) is None


def test_the_commands_are_those_of_the_paths(tmp_path: Path) -> None:
    path = looks_like("checkpoint", tmp_path).rename(tmp_path / "my model")
    with pytest.raises(ArtefactError) as refused:
        bundle.load(path)
    assert refused.value.hint == f"run: merino-edge export '{path}' --out BUNDLE"
    with pytest.raises(ArtefactError, match="is a checkpoint, not a latency table; make one: merino-edge profile"):
        load_table(path)
    with pytest.raises(ArtefactError, match="is a bundle, not a checkpoint; run: merino-edge generate"):
        checkpoint.load(looks_like("bundle", tmp_path))


def test_a_file_of_a_folder_is_not_the_folder(tmp_path: Path) -> None:
    path = looks_like("bundle", tmp_path)
    (path / "model.onnx").touch()
    for name in ("manifest.json", "model.onnx"):
        with pytest.raises(ArtefactError, match=f"{name} is a file of a bundle; give the whole folder: {path}"):
            bundle.load(path / name)
    model = looks_like("huggingface", tmp_path) / "model.gguf"  # one that is whole by itself
    model.write_bytes(b"GGUF\3")
    wrong_kind.require(model, "huggingface", "gguf")
