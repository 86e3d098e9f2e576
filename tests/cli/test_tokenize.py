"""The verb `tokenize`: it writes the corpus that the library writes, and refuses bad calls."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from merino_edge.cli.tokenize import tokenize
from merino_edge.data.corpus import load, prepare
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.errors import ArtefactError, InputError, OutputError


def call(*sources: Path, **options: Any) -> None:
    tokenize([str(source) for source in sources], **{"vocab": None, "tokenizer": None, "as_json": False, **options})


@pytest.fixture
def text(tmp_path: Path) -> Path:
    (tmp_path / "a.txt").write_text(tiny_stories(seed=4, stories=40))
    return tmp_path / "a.txt"


def test_it_makes_what_train_takes(tmp_path: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
    call(text, out=tmp_path / "c", vocab=400)
    assert "next, merino-edge train A.json --corpus" in capsys.readouterr().out
    made = (tmp_path / "c" / "corpus.json").stat().st_mtime_ns
    call(text, out=tmp_path / "c", vocab=400, as_json=True)
    assert (tmp_path / "c" / "corpus.json").stat().st_mtime_ns == made  # kept
    said = json.loads(capsys.readouterr().out)
    corpus = prepare([tmp_path / "c"], 400, "")
    assert said["sha256"] == corpus.sha256 and said["tokens"] == len(corpus.tokens) == said["learned_tokens"]
    call(text, out=tmp_path / "d", tokenizer=tmp_path / "c")
    again = load(tmp_path / "d")
    assert again.tokenizer_json == corpus.tokenizer_json and again.chat == corpus.chat
    assert again.header["shards"] == corpus.header["shards"]


def test_bad_calls_are_refused(tmp_path: Path, text: Path) -> None:
    for options in ({}, {"vocab": 400, "tokenizer": tmp_path}):
        with pytest.raises((InputError, ArtefactError)):
            call(text, out=tmp_path / "c", **options)
    for vocab in (0, 258, 10**9):
        with pytest.raises(InputError, match="vocab"):
            call(text, out=tmp_path / "c", vocab=vocab)
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    with pytest.raises(OutputError, match="is not an artefact"):
        call(text, out=tmp_path / "home", vocab=400)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "home"]
