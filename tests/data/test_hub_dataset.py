"""Data sets as sources: `datasets` reads the rows that were written, and the Hub is asked once."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from merino_edge.data import corpus, hub_dataset, sources
from merino_edge.data.bpe import END_OF_TEXT
from merino_edge.data.records import Conversation
from merino_edge.errors import InputError, MissingExtraError

datasets = pytest.importorskip("datasets")

ROWS = [{"id": i, "text": f"Row {i} of it.\n" + "More words. " * (i % 5)} for i in range(40)]
TALKS = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i}!"}] for i in range(40)]


def folder_of(kind: str, folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A folder that `datasets` recognises, with the rows in two files."""
    folder.mkdir()
    for name, part in (("train-0", rows[:25]), ("train-1", rows[25:])):
        if kind == "parquet":
            datasets.Dataset.from_list(part).to_parquet(str(folder / f"{name}.parquet"))
        else:
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    return folder


@pytest.mark.parametrize("kind", ["parquet", "json"])
@pytest.mark.parametrize("spelling", ["hf:{}", "hf:{}:train", "hf:{}:train:text"])
def test_rows_of_a_folder_are_its_lines(tmp_path: Path, kind: str, spelling: str) -> None:
    folder = folder_of(kind, tmp_path / "rows", ROWS)
    (tmp_path / "same.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    named = spelling.format(folder)
    found = corpus.prepare([named], 400, tmp_path / "a")
    same = corpus.prepare([tmp_path / "same.jsonl"], 400, tmp_path / "b")
    assert np.array_equal(np.asarray(found.tokens), np.asarray(same.tokens))
    assert found.header["sources"] == [named]
    assert corpus.prepare([Path(named)], 400, tmp_path / "a").sha256 == found.sha256


@pytest.mark.parametrize("kind", ["parquet", "json"])
@pytest.mark.parametrize("column", ["", ":train:messages", ":train:said"])
def test_messages_of_a_folder_are_conversations(tmp_path: Path, kind: str, column: str) -> None:
    name = column.rpartition(":")[2] or "messages"
    folder = folder_of(kind, tmp_path / "rows", [{name: talk} for talk in TALKS])
    (source,) = sources.resolve([f"hf:{folder}{column}"])
    found = list(source.records())
    assert [list(talk.messages) for talk in found if isinstance(talk, Conversation)] == TALKS
    assert corpus.prepare([f"hf:{folder}{column}"], 400, tmp_path / "c").header["conversations"] == len(TALKS)


def test_lines_of_text_are_documents(tmp_path: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.txt").write_text("one\n\ntwo\n")
    (source,) = sources.resolve([f"hf:{tmp_path / 'rows'}"])
    assert "".join(map(str, source.records())) == f"one{END_OF_TEXT}two{END_OF_TEXT}"


def test_its_fingerprint_is_of_what_is_read(tmp_path: Path) -> None:
    first = folder_of("parquet", tmp_path / "rows", ROWS)
    copied = folder_of("parquet", tmp_path / "copy", ROWS)
    other = folder_of("parquet", tmp_path / "other", [*ROWS[:-1], ROWS[0]])
    prints = [corpus.fingerprint([f"hf:{folder}:train:text"]) for folder in (first, copied, other)]
    assert prints[0] == prints[1] != prints[2]
    assert corpus.fingerprint([f"hf:{first}"]) != prints[0]  # whole rows


def test_rows_are_streamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[dict[str, Any]] = []
    load = datasets.load_dataset
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: asked.append(k) or load(*a, **k))  # type: ignore[func-returns-value]
    (source,) = sources.resolve([f"hf:{folder_of('parquet', tmp_path / 'rows', ROWS)}:train:text"])
    next(source.records())
    assert asked == [{"split": "train", "revision": None, "streaming": True}]


def test_a_name_on_the_hub_is_pinned_to_a_commit(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked: list[tuple[str, str | None]] = []

    class Api:
        def dataset_info(self, name: str, revision: str | None) -> Any:
            asked.append((name, revision))
            return type("Info", (), {"sha": f"commit of {revision}"})

    loaded: list[tuple[Any, ...]] = []

    def load_dataset(name: str, config: str | None, **options: Any) -> Any:
        loaded.append((name, config, options["split"], options["revision"]))
        return datasets.Dataset.from_list(ROWS).to_iterable_dataset()

    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    pile, config, short = map(
        hub_dataset.parse, ("hf:monology/pile-uncopyrighted:train:text", "hf:o/name/config@v1:test", "hf:squad")
    )
    assert asked == [("monology/pile-uncopyrighted", None), ("o/name", "v1"), ("squad", None)]
    assert (pile.split, pile.column, pile.revision) == ("train", "text", "commit of None")
    assert (config.config, config.split, config.column, config.revision) == ("config", "test", None, "commit of v1")
    assert short.name == "squad" and len({pile.fingerprint(), config.fingerprint(), short.fingerprint()}) == 3
    assert list(pile.records()) == [row["text"] for row in ROWS]
    next(config.records())
    assert loaded == [
        ("monology/pile-uncopyrighted", None, "train", "commit of None"),
        ("o/name", "config", "test", "commit of v1"),
    ]


@pytest.mark.parametrize(
    ("spelling", "words"),
    [
        ("hf:", "not the name of a data set"),
        ("hf:{}:train:text:more", "not the name of a data set"),
        ("hf:{}::text", "not the name of a data set"),
        ("hf:{}/missing", "is not a folder"),
        ("hf:{}:test", "test"),
        ("hf:{}:train:words", "no column 'words'; choose of id, text"),
        ("hf:{}:train:id", "row 1: id is number, not a list"),
        ("hf:{}/empty", "cannot be read"),
    ],
)
def test_what_cannot_be_read_is_refused(tmp_path: Path, spelling: str, words: str) -> None:
    folder = folder_of("parquet", tmp_path / "rows", ROWS)
    (folder / "empty").mkdir()
    with pytest.raises(InputError, match=words) as caught:
        corpus.prepare([spelling.format(folder)], 400, tmp_path / "corpus")
    assert "\n" not in str(caught.value) and caught.value.hint
    assert not (tmp_path / "corpus").exists()


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    folder = folder_of("parquet", tmp_path / "rows", ROWS)
    path = folder / "train-1.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read") as caught:
        corpus.prepare([f"hf:{folder}"], 400, tmp_path / "corpus")
    assert "\n" not in str(caught.value)


def test_without_the_package_its_command_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(MissingExtraError, match=r"merino-edge\[datasets\]"):
        corpus.prepare([f"hf:{tmp_path}"], 400, tmp_path / "corpus")
