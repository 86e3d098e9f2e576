"""Checkpoints: saved equals loaded, and altered, foreign or unfit files are refused in one line."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest

from merino_edge import artefact, checkpoint
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError, MerinoError, OutputError
from merino_edge.tokenizer import ChatFormat
from merino_edge.weights import random_weights

A = Architecture(300, 16, 16, 8, (Block(16, 2, 2, 1, 32, shared=True), Block(24, 1, 3, 3, 32)))
CHAT = ChatFormat((0,), None, "{{ messages }}")


def save(path: Path, weights: checkpoint.Weights | None = None) -> Path:
    checkpoint.save(
        path,
        A,
        random_weights(A) if weights is None else weights,
        tokenizer_json="{}\n",
        chat=CHAT,
        training={"source": "test"},
    )
    return path


def test_round_trip(tmp_path: Path) -> None:
    loaded = checkpoint.load(save(tmp_path / "c"))
    assert loaded.architecture == A and loaded.chat == CHAT and loaded.training["source"] == "test"
    expected = random_weights(A)
    assert set(loaded.weights) == set(expected)
    assert all(np.array_equal(loaded.weights[name], expected[name]) for name in expected)
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


@pytest.mark.parametrize("name", [*checkpoint.FILES, "training.json"])
@pytest.mark.parametrize("damage", ["missing", "truncated", "flipped"])
def test_a_damaged_file_is_refused(tmp_path: Path, name: str, damage: str) -> None:
    path = save(tmp_path / "c") / name
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[:-5] if damage == "truncated" else content)
    with pytest.raises(ArtefactError) as caught:
        checkpoint.load(tmp_path / "c")
    assert name in str(caught.value) and "\n" not in str(caught.value) and caught.value.hint


@pytest.mark.parametrize("chat", [ChatFormat((0, 300), 1), ChatFormat((), 300)], ids=["eos", "bos"])
def test_a_special_token_beyond_the_vocabulary_is_refused(tmp_path: Path, chat: ChatFormat) -> None:
    records = {"tokenizer_json": "{}\n", "training": {"source": "test"}}
    checkpoint.save(tmp_path / "c", A, random_weights(A), chat=ChatFormat((299,), 299), **records)
    assert checkpoint.load(tmp_path / "c").chat.largest_token_id == 299
    checkpoint.save(tmp_path / "c", A, random_weights(A), chat=chat, **records)
    with pytest.raises(ArtefactError, match="token 300 is outside the vocabulary of 300"):
        checkpoint.load(tmp_path / "c")


def test_a_newer_schema_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path / "c") / "training.json"
    document = json.loads(path.read_text())
    kept = {key: value for key, value in document.items() if key not in ("kind", "schema_version", "sha256")}
    artefact.write_json(path, checkpoint.KIND, kept, schema_version=99)
    with pytest.raises(ArtefactError, match="schema version 99"):
        checkpoint.load(tmp_path / "c")


def test_unfit_weights_leave_nothing_behind(tmp_path: Path) -> None:
    good = random_weights(A)
    name = "blocks.1.layers.0.ffn.up.weight"
    unfit = [
        {key: value for key, value in good.items() if key != name},
        {**good, "blocks.0.layers.1.ffn.up.weight": good[name]},
        {**good, name: good[name].T},
        {**good, name: np.full_like(good[name], np.nan)},
    ]
    for weights in unfit:
        with pytest.raises(ArtefactError, match="layers"):
            save(tmp_path / "c", weights)
    assert not list(tmp_path.iterdir())


def test_a_swapped_architecture_is_refused(tmp_path: Path) -> None:
    """Weights that do not fit are refused even where the hashes agree."""
    folder = save(tmp_path / "c")
    other = dataclasses.replace(A, norm="rmsnorm")
    with pytest.raises(MerinoError, match="unexpected weight"):
        checkpoint.write_files(folder, other, random_weights(A), tokenizer_json="{}\n", chat=CHAT, training={})


def test_only_an_artefact_is_replaced(tmp_path: Path) -> None:
    save(save(tmp_path / "c"))  # a checkpoint may be
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("keep me")
    for occupied in (home, home / "letter.txt"):
        with pytest.raises(OutputError, match="not an artefact"):
            save(occupied)
    assert (home / "letter.txt").read_text() == "keep me"
    with pytest.raises(ArtefactError, match="merino-edge train"):
        checkpoint.load(tmp_path / "nothing")
