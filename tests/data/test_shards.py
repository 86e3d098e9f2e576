"""Shards: many equal one; an altered shard is refused by name; only files that may have changed are hashed again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge import artefact
from merino_edge.data import bpe, corpus_writer, encoding, shards
from merino_edge.data.bpe import chat_format, train_tokenizer
from merino_edge.data.corpus import Corpus, fingerprint, load, prepare
from merino_edge.data.shards import Shards, ShardWriter, shard_name
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.errors import ArtefactError, InputError, Interrupted
from merino_edge.tokenizer import ChatFormat, Tokenizer

TEXT = tiny_stories(seed=2, stories=60)
TALKS = [
    {"messages": [{"role": role, "content": f"{role} {i} {'so ' * (i % 7)}"} for role in ("user", "assistant")]}
    for i in range(60)
]
TOKENIZER = Tokenizer(train_tokenizer(iter([TEXT]), 400), chat_format())


@pytest.fixture(scope="module", params=["plain", "talks", "mixed"])
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Path], Corpus]:
    folder = tmp_path_factory.mktemp(request.param)
    text, talks = folder / "a.txt", folder / "b.jsonl"
    text.write_text(TEXT)
    talks.write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    sources = {"plain": [text], "talks": [talks], "mixed": [text, talks, text]}[request.param]
    return sources, prepare(sources, 400, folder / "whole", TOKENIZER)


def aged(folder: Path) -> None:
    """Make the files look old, as if the corpus had been made long ago."""
    for path in folder.iterdir():
        os.utime(path, ns=(1, path.stat().st_mtime_ns - 10**11))


@settings(max_examples=12, deadline=None)
@given(length=st.integers(300, 6000), step=st.integers(0, 10**6), sequence=st.integers(1, 90))
def test_shards_of_any_size_give_the_same_batches(
    made: tuple[list[Path], Corpus],
    tmp_path_factory: pytest.TempPathFactory,
    length: int,
    step: int,
    sequence: int,
) -> None:
    sources, whole = made
    folder = tmp_path_factory.mktemp("shards") / "c"
    parted = prepare(sources, 400, folder, TOKENIZER, shard_tokens=length)
    files = sorted(folder.glob("tokens-*.bin"))
    assert len(files) == len(parted.header["shards"]) == -(-len(whole.tokens) // length)
    assert {file.stat().st_size for file in files[:-1]} <= {2 * length}
    for one, other in zip(whole.batch(step, 8, sequence), parted.batch(step, 8, sequence), strict=True):
        assert np.array_equal(one, other)
    for one, other in zip(whole.validation(9, sequence), parted.validation(9, sequence), strict=True):
        assert np.array_equal(one, other)
    assert whole.sha256 == parted.sha256


@given(st.data())
def test_a_window_may_lie_anywhere(draw: st.DataObject) -> None:
    parts = draw.draw(st.lists(st.lists(st.integers(0, 99), min_size=1, max_size=9), min_size=1, max_size=9))
    flat = [value for part in parts for value in part]
    start = draw.draw(st.integers(0, len(flat) - 1))
    stop = draw.draw(st.integers(start + 1, len(flat)))
    found = Shards([np.array(part) for part in parts])
    assert found.window(start, stop).tolist() == flat[start:stop] and len(found) == len(flat)


@settings(max_examples=30, deadline=None)
@given(lengths=st.lists(st.integers(0, 20), max_size=8), length=st.integers(1, 7))
def test_a_writer_divides_evenly(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], length: int) -> None:
    folder = tmp_path_factory.mktemp("w")
    values = np.arange(sum(lengths))
    writer = ShardWriter(folder, "x", np.dtype("<u4"), length)
    for part in np.split(values, np.cumsum(lengths)[:-1]) if lengths else []:
        writer.append(part)
    writer.close()
    read = [np.fromfile(folder / shard_name("x", i), dtype="<u4") for i in range(len(writer.hashes))]
    assert [len(part) for part in read] == writer.lengths
    assert np.array_equal(np.concatenate([values[:0], *read]), values)
    assert all(len(part) == length for part in read[:-1])
    assert writer.hashes == [artefact.sha256_file(folder / shard_name("x", i)) for i in range(len(read))]


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_slices_of_all_ranks_in_any_order_are_the_batch(made: tuple[list[Path], Corpus], draw: st.DataObject) -> None:
    _, corpus = made
    ranks, share, step = draw.draw(st.integers(1, 8)), draw.draw(st.integers(1, 4)), draw.draw(st.integers(0, 10**6))
    inputs, targets = corpus.batch(step, ranks * share, 24, seed=3)
    seen = np.zeros((2, *inputs.shape), dtype=np.int64)
    for rank in draw.draw(st.permutations(range(ranks))):  # each reads the corpus by itself
        part = slice(rank * share, (rank + 1) * share)
        own = load(corpus.folder).batch(step, ranks * share, 24, seed=3)
        seen[0, part], seen[1, part] = own[0][part], own[1][part]
    assert np.array_equal(seen[0], inputs) and np.array_equal(seen[1], targets)


@pytest.mark.parametrize(
    "name", ["tokens-00001.bin", "learned-00002.bin", "conversations.bin", "tokenizer.json", "chat.json"]
)
@pytest.mark.parametrize("harm", ["flip", "cut", "grow", "remove", "swap"])
@pytest.mark.parametrize("known", [False, True])
def test_an_altered_file_is_refused_by_name(tmp_path: Path, name: str, harm: str, known: bool) -> None:
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in TALKS))
    folder = prepare([tmp_path / "b.jsonl"], 400, tmp_path / "c", TOKENIZER, shard_tokens=500).folder
    if known:
        aged(folder)
        load(folder)
        assert (folder / shards.VERIFIED).is_file()
    content = bytearray((folder / name).read_bytes())
    if harm == "flip":
        content[len(content) // 2] ^= 1
    elif harm == "cut":
        content = content[:-8]
    elif harm == "grow":
        content += bytes(8)
    elif harm == "swap":  # a file with the same form
        stem, _, number = name.partition("-")
        content[:] = (folder / f"{stem}-00000.bin").read_bytes() if number else content[::-1]
    if harm == "remove":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes(content)
    with pytest.raises(ArtefactError, match=name.replace(".", r"\.")) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and "make it again" in caught.value.hint


def test_only_what_has_changed_is_hashed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    folder = prepare([tmp_path / "a.txt"], 400, tmp_path / "c", shard_tokens=1000).folder
    hashed: list[str] = []
    hash_of = artefact.sha256_file
    monkeypatch.setattr(artefact, "sha256_file", lambda path: hashed.append(path.name) or hash_of(path))  # type: ignore[func-returns-value]
    everything = sorted(path.name for path in folder.iterdir() if path.name not in ("corpus.json", shards.VERIFIED))
    load(folder)
    assert sorted(hashed) == everything  # too young to be remembered
    for expected in (everything, [], []):
        if expected:
            aged(folder)
        hashed.clear()
        load(folder)
        assert sorted(hashed) == expected
    os.utime(folder / "tokens-00001.bin", ns=(1, 5))
    load(folder)
    assert hashed == ["tokens-00001.bin"]
    (folder / shards.VERIFIED).write_text("{}")  # knows nothing, and is no reason to refuse
    hashed.clear()
    load(folder)
    assert sorted(hashed) == everything


def test_what_is_interrupted_leaves_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "z.jsonl").write_text('{"text": "more"}\n{"text": 3}\n')

    def interrupt(_: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare([tmp_path / "a.txt"], 400, tmp_path / "c", shard_tokens=100, on_tokens=interrupt)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "z.jsonl"]
    before = prepare([tmp_path / "a.txt"], 400, tmp_path / "c").header
    with pytest.raises(InputError, match=r"z\.jsonl line 2: text is number"):
        prepare([tmp_path / "a.txt", tmp_path / "z.jsonl"], 400, tmp_path / "c", TOKENIZER)
    assert load(tmp_path / "c").header == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "c", "z.jsonl"]


def test_a_header_of_another_time_or_hand_is_refused(tmp_path: Path) -> None:
    artefact.write_json(tmp_path / "corpus.json", "corpus", {"vocab_size": 400, "tokens": 3})
    with pytest.raises(ArtefactError, match=r"has schema version 1, this tool reads 2; .* make it again"):
        load(tmp_path)
    artefact.write_json(tmp_path / "corpus.json", "corpus", {"vocab_size": 400, "tokens": 3}, 2)
    with pytest.raises(ArtefactError, match="missing required field tokenizer_tokens"):
        load(tmp_path)


def test_a_prepared_corpus_is_a_source_by_itself(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    made = prepare([tmp_path / "a.txt"], 400, tmp_path / "c")
    found = prepare([str(made.folder)], 500, tmp_path / "elsewhere")
    assert found.folder == made.folder and not (tmp_path / "elsewhere").exists()
    assert found.sha256 == fingerprint([made.folder]) == load(made.folder).sha256 != made.sha256
    assert made.sha256 == fingerprint([tmp_path / "a.txt"])
    own = Tokenizer.load(made.folder)
    assert prepare([made.folder], 400, "", own).folder == made.folder
    other = Tokenizer(train_tokenizer(iter(["another text"]), 300), chat_format())
    with pytest.raises(InputError, match="made with another tokenizer"):
        prepare([made.folder], 400, "", other)
    with pytest.raises(InputError, match="has 400 tokens, the model's vocabulary 399"):
        prepare([made.folder], 399, "")
    with pytest.raises(InputError, match="not the only source"):
        prepare([made.folder, tmp_path / "a.txt"], 400, "")


def test_a_given_tokenizer_encodes(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    made = prepare([tmp_path / "a.txt"], 1000, tmp_path / "c", TOKENIZER)
    assert made.tokenizer_json == TOKENIZER.backend.to_str() and made.chat == TOKENIZER.chat
    assert made.header["tokenizer_tokens"] == 400 and made.header["learned_tokens"] == made.header["tokens"]
    assert made.sha256 == fingerprint([tmp_path / "a.txt"], TOKENIZER) != fingerprint([tmp_path / "a.txt"])
    with pytest.raises(InputError, match="the tokenizer has 400 tokens, more than a vocabulary of 399"):
        prepare([tmp_path / "a.txt"], 399, tmp_path / "d", TOKENIZER)
    nameless = TOKENIZER.backend.from_str(TOKENIZER.backend.to_str().replace("<|endoftext|>", "<|other|>"))
    with pytest.raises(InputError, match="no token that ends a document"):
        prepare([tmp_path / "a.txt"], 400, tmp_path / "d", Tokenizer(nameless, ChatFormat()))


def test_documents_begin_with_a_bos_where_there_is_one(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one<|endoftext|>two")
    tokenizer = Tokenizer(TOKENIZER.backend, ChatFormat((0,), 1, None))
    ids = np.asarray(prepare([tmp_path / "a.txt"], 400, tmp_path / "c", tokenizer).tokens).tolist()
    one, two = (TOKENIZER.backend.encode(word).ids for word in ("one", "two"))
    assert ids == [1, *one, 0, 1, *two, 0]


@pytest.mark.parametrize("with_roles", [False, True])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_an_interrupted_corpus_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stop: int, *, with_roles: bool
) -> None:
    """Batches of a few records, a note after each, and shards that end in the middle of one."""
    monkeypatch.setattr(encoding, "BATCH_RECORDS", 3)
    monkeypatch.setattr(corpus_writer, "SAVE_SECONDS", 0.0)
    lines = [json.dumps({"text": f"Story {n}. {TEXT[n : 40 + n]}"}) for n in range(15)]
    turns = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": "A fox."}]
    lines[7:8] = [json.dumps({"messages": turns})] * 3 if with_roles else []
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    trained, train = [], bpe.train_tokenizer
    monkeypatch.setattr(bpe, "train_tokenizer", lambda *words: trained.append(1) or train(*words))
    batches: list[int] = []

    def make(folder: str, most: int, *, resume: bool | None) -> dict[str, bytes]:
        def on_tokens(count: int) -> None:
            batches.append(count)
            if len(batches) == most:
                raise KeyboardInterrupt

        batches.clear()
        prepare([tmp_path / "a.jsonl"], 300, tmp_path / folder, shard_tokens=100, on_tokens=on_tokens, resume=resume)
        return {p.name: p.read_bytes() for p in (tmp_path / folder).iterdir() if p.name != shards.VERIFIED}

    whole, all_batches = make("whole", 99, resume=None), list(batches)
    trained.clear()
    with pytest.raises(Interrupted, match="add --continue"):
        make("parts", stop, resume=False)
    assert (tmp_path / ".parts.unfinished").is_dir() and not (tmp_path / "parts").exists()
    assert make("parts", 99, resume=True) == whole and len(trained) == 1
    assert batches == all_batches[stop - 1 :]  # the batch in which it was interrupted is read again
    assert not (tmp_path / ".parts.unfinished").exists()
