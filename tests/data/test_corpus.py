"""Corpora: no text is lost, batches are pure, held-out tokens stay held out, bad sources are refused."""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from merino_edge.data.bpe import END_OF_TEXT, END_OF_TEXT_ID
from merino_edge.data.corpus import Corpus, fingerprint, load, prepare
from merino_edge.data.shards import Shards
from merino_edge.data.tiny_stories import tiny_stories
from merino_edge.errors import ArtefactError, InputError

TEXT = tiny_stories(seed=1, stories=120)


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Corpus:
    folder = tmp_path_factory.mktemp("data")
    (folder / "stories.txt").write_text(TEXT, encoding="utf-8")
    return prepare([folder / "stories.txt"], 600, folder / "corpus")


def test_the_tokens_are_the_text(corpus: Corpus) -> None:
    tokenizer, tokens = Tokenizer.from_str(corpus.tokenizer_json), np.asarray(corpus.tokens)
    text = tokenizer.decode(tokens.tolist(), skip_special_tokens=False)
    assert text == TEXT + END_OF_TEXT
    assert int((tokens == END_OF_TEXT_ID).sum()) == 121
    assert tokenizer.get_vocab_size() <= 600 and int(tokens.max()) < 600


@settings(max_examples=50, deadline=None)
@given(text=st.text(max_size=60))
def test_the_tokenizer_spells_any_text(corpus: Corpus, text: str) -> None:
    tokenizer = Tokenizer.from_str(corpus.tokenizer_json)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


@settings(max_examples=25, deadline=None)
@given(step=st.integers(0, 10**9), size=st.integers(1, 8), sequence=st.integers(1, 200), seed=st.integers(0, 5))
def test_a_batch_is_a_pure_function(corpus: Corpus, step: int, size: int, sequence: int, seed: int) -> None:
    inputs, targets = corpus.batch(step, size, sequence, seed)
    again, _ = load(corpus.folder).batch(step, size, sequence, seed)
    assert inputs.shape == targets.shape == (size, sequence)
    assert np.array_equal(inputs, again) and np.array_equal(inputs[:, 1:], targets[:, :-1])


def test_held_out_tokens_are_never_trained_on(tmp_path: Path, corpus: Corpus) -> None:
    """The tokens are their own indices, so that rows show where they come from."""
    numbered = Corpus(tmp_path, Shards([np.arange(2000)]), {**corpus.header, "tokenizer_tokens": 2000}, "")
    first = numbered.training_tokens(50)
    assert max(int(numbered.batch(step, 64, 50)[1].max()) for step in range(50)) == first - 1  # all, and no more
    inputs, targets = numbered.validation(8, 20)
    assert int(inputs.min()) == numbered.training_tokens(20) and int(targets.max()) < 2000
    assert len(np.unique(inputs)) == inputs.size


def test_sources_of_every_form_give_the_same_tokens(tmp_path: Path) -> None:
    windows = TEXT.replace("\n", "\r\n")
    (tmp_path / "folder" / "deep").mkdir(parents=True)
    (tmp_path / "folder" / "deep" / "a.txt").write_text(TEXT, encoding="utf-8")
    (tmp_path / "bom.txt").write_bytes(b"\xef\xbb\xbf" + windows.encode())
    (tmp_path / "packed.txt.xz").write_bytes(lzma.compress(TEXT.encode()))
    forms = [prepare([tmp_path / n], 400, tmp_path / f"c-{n}") for n in ("folder", "bom.txt", "packed.txt.xz")]
    assert all(np.array_equal(forms[0].tokens, other.tokens) for other in forms[1:])
    assert all(forms[0].tokenizer_json == other.tokenizer_json for other in forms[1:])


def test_a_corpus_is_reused_until_something_changes(tmp_path: Path) -> None:
    source = tmp_path / "a.txt"
    source.write_text(TEXT)
    prepare([source], 400, tmp_path / "c")
    made = (tmp_path / "c" / "tokens-00000.bin").stat().st_mtime_ns
    prepare([source], 400, tmp_path / "c")
    assert (tmp_path / "c" / "tokens-00000.bin").stat().st_mtime_ns == made
    assert prepare([source], 500, tmp_path / "c").header["vocab_size"] == 500
    source.write_text(TEXT + "More.")
    again = prepare([source], 500, tmp_path / "c")
    assert again.sha256 == fingerprint([source])
    assert (
        Tokenizer.from_str(again.tokenizer_json)
        .decode(again.tokens.window(len(again.tokens) - 20, len(again.tokens)).tolist())
        .endswith("More.")
    )
    content = bytearray((tmp_path / "c" / "tokens-00000.bin").read_bytes())
    content[100] ^= 1
    (tmp_path / "c" / "tokens-00000.bin").write_bytes(content)
    with pytest.raises(ArtefactError, match=r"tokens-00000\.bin is missing or altered"):
        prepare([source], 500, tmp_path / "c")


def test_a_large_vocabulary_gets_wide_tokens(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    narrow, wide = (prepare([tmp_path / "a.txt"], size, tmp_path / str(size)) for size in (2**16, 2**16 + 1))
    assert (narrow.tokens.dtype.itemsize, wide.tokens.dtype.itemsize) == (2, 4)
    assert np.array_equal(narrow.tokens, wide.tokens)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("empty.txt", b"", "zero tokens"),
        ("only_ends.txt", END_OF_TEXT.encode() * 3, "zero tokens"),
        ("latin.txt", "caf\xe9".encode("latin-1"), "not UTF-8"),
        ("binary.txt", b"abc\0def", "zero bytes"),
        ("cut.txt.xz", lzma.compress(TEXT.encode())[:-40], "not a whole .xz"),
        ("false.txt.xz", b"plain text", "not a whole .xz"),
        ("folder", None, "holds no .txt"),
        ("missing.txt", None, "does not exist"),
    ],
)
def test_a_source_without_text_is_refused(tmp_path: Path, name: str, content: bytes | None, words: str) -> None:
    source = tmp_path / "in" / name
    source.parent.mkdir()
    if content is not None:
        source.write_bytes(content)
    elif name == "folder":
        source.mkdir()
    with pytest.raises(InputError, match=words) as caught:
        prepare([source], 400, tmp_path / "corpus")
    assert "\n" not in str(caught.value) and caught.value.hint
    assert "--corpus" not in caught.value.hint  # tokenize and export --keep-vocab have no such option
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_what_is_too_small_is_refused(tmp_path: Path, corpus: Corpus) -> None:
    with pytest.raises(InputError, match="too few for sequences"):
        corpus.batch(0, 1, len(corpus.tokens) // 2)
    with pytest.raises(InputError, match="vocabulary of 258 is too small"):
        prepare([corpus.folder.parent / "stories.txt"], 258, tmp_path / "c")
