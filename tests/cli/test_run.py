"""One command makes a model ready, keeps it, and chats; other verbs take the same models."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.stranger import run
from helpers.warm_python import warm_merino, warm_python
from merino_edge import bundle
from merino_edge.checkpoint import Checkpoint
from merino_edge.cli import prepared_model

ASK = ("--prompt", "The fox", "--max-tokens", 3, "--greedy", "--threads", 1)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of models in a cache of this test's own. Steps start warm."""
    pytest.importorskip("torch")  # a board has none, and exports nothing
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "executable", warm_python())
    return tmp_path / "cache" / "merino-edge" / "models"


def test_a_model_is_made_ready_once(
    tiny_checkpoint: Checkpoint,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model = tmp_path / "small"
    shutil.copytree(tiny_checkpoint.path, model)
    assert run("run", model, *ASK) == 0
    first = capfd.readouterr()
    assert first.err.count("$ merino-edge ") == 2 and "$ merino-edge export" in first.err and "kept in " in first.err
    (entry,) = cache.iterdir()
    assert sorted(path.name for path in entry.iterdir()) == ["small-int4", "source.json"]
    made = bundle.load(entry / "small-int4")
    assert (made.precision, made.context, made.target, len(made.tunings)) == ("int4", 192, "onnxruntime", 1)
    for words in (("run", model, *ASK), ("generate", model, *ASK), ("run", made.path, *ASK)):
        assert run(*words) == 0
        again = capfd.readouterr()
        assert again.out == first.out and "$ merino-edge" not in again.err
    assert run("run", model, "--only-prepare") == 0 and capfd.readouterr().out == f"{made.path}\n"
    few = ("--prompt-tokens", 2, "--new-tokens", 2, "--repetitions", 1, "--threads", 1, "--json")
    assert run("bench", model, *few) == 0 and '"small-int4"' in capfd.readouterr().out
    monkeypatch.chdir(tmp_path)
    assert prepared_model._is_made(made.path, prepared_model._source(Path("small")))
    os.utime(model / "training.json")  # as if it had been trained again: it would be made anew
    assert not prepared_model._is_made(made.path, prepared_model._source(model))


def test_an_adapter_is_made_again_where_its_base_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    for folder in (base, adapter):
        folder.mkdir()
    (base / "config.json").write_text("{}")
    (adapter / "adapter_config.json").write_text('{"base_model_name_or_path": "base"}')
    monkeypatch.chdir(tmp_path)
    before = prepared_model._source(adapter)
    assert before == prepared_model._source(adapter)
    (base / "config.json").write_text("{ }")
    assert prepared_model._source(adapter) != before
    shutil.rmtree(base)
    assert [name for name, *_ in prepared_model._source(adapter)["files"]] == ["adapter_config.json"]


def test_what_cannot_be_made_leaves_nothing(
    tiny_checkpoint: Checkpoint, cache: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for words, code, reason in (
        ((tiny_checkpoint.path, "--precision", "int5"), 8, "unknown precision 'int5'"),
        ((tiny_checkpoint.path, "--target", "jetpack"), 8, "unknown target 'jetpack'"),
        ((tiny_checkpoint.path, "--context", 0), 2, "--context is 0"),
        ((tmp_path / "nothing",), 3, "does not exist"),
        (("smollm2-135m-instuct",), 3, "did you mean smollm2-135m-instruct?"),
        (("gemma-3-270m",), 3, "did you mean google/gemma-3-270m-it?"),
    ):
        assert run("run", *words) == code
        assert reason in capfd.readouterr().err
    (tmp_path / "model.gguf").write_bytes(b"GGUF\3\0\0\0" + bytes(5))
    assert run("run", tmp_path / "model.gguf") == 3
    said = capfd.readouterr().err
    assert said.count("merino-edge: ") == 1 and "cannot be read as GGUF" in said  # the step has said it
    assert not any(cache.rglob("*")) if cache.exists() else True


def test_an_interrupt_ends_the_step_in_order(cache: Path, tmp_path: Path) -> None:
    from helpers.tiny_huggingface import save

    child = subprocess.Popen([warm_merino(), "run", str(save(tmp_path / "model"))], stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None and any("$ merino-edge export" in line for line in child.stderr)
    child.send_signal(2)
    said = child.stderr.read()
    assert child.wait(60) == 130 and said.count("interrupted") == 1, said
    assert not list(cache.rglob("*"))


@pytest.mark.parametrize(
    ("name", "is_model"),
    [("smollm2-135m-instruct", True), ("Qwen/Qwen3-0.6B", True), ("nowhere/model.gguf", False), ("lamb", False)],
)
def test_names(name: str, is_model: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert prepared_model._is_model(Path(name)) == is_model
    if name == "Qwen/Qwen3-0.6B":
        assert prepared_model._where(Path(f"https://huggingface.co/{name}")) == prepared_model._where(Path(name))
    (tmp_path / "Qwen").mkdir()  # a missing path in a folder that exists
    assert not prepared_model._is_model(Path("Qwen/Qwen3-0.6B"))
