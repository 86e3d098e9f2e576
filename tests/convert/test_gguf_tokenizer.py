"""Tokenizers of GGUF files: SentencePiece's rules step by step, and kinds of BPE by all their names."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge.convert import gguf_tokenizer
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED
from merino_edge.errors import ArtefactError, UnsupportedError

BYTES = [f"<0x{i:02X}>" for i in range(256)]
LETTERS = "abc é狐"


def _metadata(model: str, tokens: Sequence[str], types: Sequence[int], **more: Any) -> Metadata:
    values: dict[str, Any] = {f"tokenizer.ggml.{key}": value for key, value in more.items()}
    values["tokenizer.ggml.model"] = model.encode()
    values["tokenizer.ggml.tokens"] = [token.encode() for token in tokens]
    values["tokenizer.ggml.token_type"] = np.array(types, np.int32)
    return Metadata(values, "test.gguf")


def _spm(pieces: Sequence[str], scores: Sequence[float], user: Sequence[str] = (), **more: Any) -> Metadata:
    tokens = ["<unk>", "<s>", "</s>", *BYTES, *pieces, *user]
    types = [UNKNOWN, CONTROL, CONTROL, *[BYTE] * 256, *[NORMAL] * len(pieces), *[USER_DEFINED] * len(user)]
    every = np.array([0.0] * 259 + list(scores) + [0.0] * len(user), np.float32)
    return _metadata("llama", tokens, types, scores=every, **more)


def _joined(text: str, scores: dict[str, float]) -> list[str]:
    """SentencePiece's BPE by its definition: join the leftmost pair of the best score, until none is left."""
    parts = list(text)
    while True:
        pairs = [(-scores[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in scores]
        if not pairs:
            break
        at = min(pairs)[1]
        parts[at : at + 2] = ["".join(parts[at : at + 2])]
    return [
        piece for part in parts for piece in ([part] if part in scores else [f"<0x{b:02X}>" for b in part.encode()])
    ]


def _pieces(strings: Sequence[str]) -> list[str]:
    """A vocabulary that a trainer can make: whatever is in it can be joined from smaller parts of it."""
    pieces = list("abc" + SPACE)
    for text in sorted(set(strings), key=len):
        if any(text[:i] in pieces and text[i:] in pieces for i in range(1, len(text))):
            pieces.append(text)
    return pieces


@settings(max_examples=60, deadline=None)
@given(
    strings=st.lists(st.text("abc" + SPACE, min_size=2, max_size=5), max_size=30),
    order=st.randoms(use_true_random=False),
    texts=st.lists(st.text(LETTERS, max_size=20), max_size=5),
    prefix=st.booleans(),
)
def test_sentencepiece_joins_the_best_pair_first(
    strings: list[str], order: Any, texts: list[str], prefix: bool
) -> None:
    pieces = _pieces(strings)
    scores = [-float(i) for i in range(len(pieces))]
    order.shuffle(scores)
    backend = gguf_tokenizer.build(_spm(pieces, scores, add_space_prefix=prefix))
    for text in texts:
        spaced = (SPACE if prefix and text else "") + text.replace(" ", SPACE)
        want = _joined(spaced, dict(zip(pieces, scores, strict=True)))
        encoded = backend.encode(text, add_special_tokens=False)
        assert encoded.tokens == want
        assert backend.decode(encoded.ids, skip_special_tokens=False) == text


@pytest.mark.parametrize(("scores", "tokens"), [((-1, -2), ["ab", "c"]), ((-2, -1), ["a", "bc"])])
def test_of_two_pairs_the_better_is_joined(scores: tuple[int, int], tokens: list[str]) -> None:
    backend = gguf_tokenizer.build(_spm(["a", "b", "c", "ab", "bc"], [-9, -9, -9, *scores], add_space_prefix=False))
    assert backend.encode("abc", add_special_tokens=False).tokens == tokens


def test_special_and_user_defined_tokens_come_before_everything() -> None:
    backend = gguf_tokenizer.build(_spm([SPACE, "a", f"{SPACE}a"], [-3, -2, -1], user=["  ", "<x>"]))
    assert backend.encode("a<x>a</s>a  a", add_special_tokens=False).tokens == [
        *(f"{SPACE}a", "<x>", f"{SPACE}a", "</s>", f"{SPACE}a", "  ", f"{SPACE}a"),
    ]  # after each of them a text begins anew, as in llama.cpp
    assert backend.decode(backend.encode("</s>").ids) == "" and backend.token_to_id("<x>") == 263


def test_unigram_takes_the_division_with_the_best_sum() -> None:
    tokens = ["<pad>", "</s>", "<unk>", f"{SPACE}a", "b", "ab", SPACE, "a"]
    types = [CONTROL, CONTROL, UNKNOWN, *[NORMAL] * 5]
    scores = np.array([0, 0, 0, -1.0, -1.5, -2.0, -3.0, -4.0], np.float32)
    m = _metadata("t5", tokens, types, scores=scores, add_space_prefix=True, remove_extra_whitespaces=True)
    backend = gguf_tokenizer.build(m)
    assert backend.encode("ab", add_special_tokens=False).tokens == [f"{SPACE}a", "b"]  # -2.5, "ab" would be -5
    assert backend.encode("  ab   b ", add_special_tokens=False).tokens == [f"{SPACE}a", "b", SPACE, "b"]
    assert backend.encode("zz", add_special_tokens=False).ids[1:] == [2]
    assert backend.decode(backend.encode("ab b").ids) == "ab b"
    assert not gguf_tokenizer.adds_bos(m)


def _bpe(pre: str) -> Metadata:
    tokens = [*(chr(c) for c in range(33, 127)), "Ġ", "Ċ", "ab", "abc"]
    merges = [b"a b", b"ab c"]
    return _metadata("gpt2", tokens, [NORMAL] * len(tokens), pre=pre.encode(), merges=merges)


@pytest.mark.parametrize("kind", gguf_tokenizer.ALIASES)
def test_another_name_of_a_kind_is_that_kind(kind: str) -> None:
    first = gguf_tokenizer.build(_bpe(kind)).to_str()
    for name in gguf_tokenizer.ALIASES[kind].split():
        assert gguf_tokenizer.build(_bpe(name)).to_str() == first
        assert gguf_tokenizer.adds_bos(_bpe(name)) == gguf_tokenizer.adds_bos(_bpe(kind))
    others = [gguf_tokenizer.build(_bpe(name)).to_str() for name in gguf_tokenizer.KINDS if name != kind]
    assert first not in others


def test_bos_is_as_the_file_says_or_as_the_kind_has_it() -> None:
    for kind, bos in (("gpt-2", False), ("llama3", True), ("tekken", True), ("qwen2", False)):
        assert gguf_tokenizer.adds_bos(_bpe(kind)) == bos
    spm = _spm(["a"], [0])
    assert gguf_tokenizer.adds_bos(spm)
    assert not gguf_tokenizer.adds_bos(_spm(["a"], [0], add_bos_token=False))


def test_tokens_of_phi_3_swallow_the_space_behind_them() -> None:
    m = _spm([SPACE, "a", f"{SPACE}a"], [-3, -2, -1], user=["<|user|>"])
    m.values["general.name"] = b"Phi-3 mini"  # type: ignore[index]
    backend = gguf_tokenizer.build(m)
    ids = backend.encode("<|user|> \na", add_special_tokens=False).ids
    assert [backend.id_to_token(i) for i in ids] == ["<|user|>", f"{SPACE}a"]


@pytest.mark.parametrize(
    ("m", "error", "says"),
    [
        (_metadata("bert", ["a"], [NORMAL]), UnsupportedError, "tokenizer 'bert' is not supported"),
        (_bpe("bloom"), UnsupportedError, "kind 'bloom' is not supported"),
        (_metadata("llama", ["a"], [NORMAL], scores=np.array([np.nan], np.float32)), ArtefactError, "scores"),
        (_metadata("llama", ["a"], [NORMAL], scores=np.array([], np.float32)), ArtefactError, "scores"),
        (_metadata("llama", ["a", "a"], [NORMAL] * 2, scores=np.zeros(2)), ArtefactError, "do not fit together"),
        (_metadata("gpt2", ["a"], [NORMAL], pre=b"gpt-2", merges=[b"x y"]), ArtefactError, "inconsistent"),
        (
            _metadata("t5", ["a"], [NORMAL], scores=np.zeros(1), treat_whitespace_as_suffix=True),
            UnsupportedError,
            "treat_whitespace_as_suffix",
        ),
    ],
)
def test_what_cannot_be_rebuilt_is_refused(m: Metadata, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        gguf_tokenizer.build(m)
