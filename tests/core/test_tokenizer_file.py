"""Tokenizer files: honest ones work as the library reads them, and no other makes the library abort or loop."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers

from merino_edge import limits, tokenizer_file
from merino_edge.convert.huggingface import prepended_token
from merino_edge.data.bpe import train_tokenizer
from merino_edge.errors import ArtefactError, InputError, MerinoError
from merino_edge.tokenizer import ChatFormat, Tokenizer

TEXT = "The moon, the sun and 1234 moons; žluťoučký kůň 狐 🦊\n\n  end "
TRAINED: dict[str, Any] = json.loads(train_tokenizer(iter([TEXT] * 4), 330).to_str())
GPT4 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)
O200K = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}


def sequence(kind: str, *steps: dict[str, Any]) -> dict[str, Any]:
    inner = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "decoder": "decoders"}[kind]
    return {kind: {"type": "Sequence", inner: list(steps)}}


def split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def replace(pattern: str, content: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": content}


def charsmap(*texts: str) -> str:
    """A precompiled map whose trie matches nothing, with these texts to put in."""
    trie = bytes(4 * 256)
    return base64.b64encode(len(trie).to_bytes(4, "little") + trie + "".join(t + "\0" for t in texts).encode()).decode()


UNIGRAM = {"model": {"type": "Unigram", "unk_id": 0, "vocab": [["<unk>", 0.0], ["▁", -1.0], ["a", -2.0], ["▁a", -3.0]]}}
WORDS = {"model": {"type": "WordPiece", "vocab": {"[UNK]": 0, "the": 1, "##re": 2}, "unk_token": "[UNK]"}}
WORDS["model"] |= {"continuing_subword_prefix": "##", "max_input_chars_per_word": 100}  # type: ignore[operator]
HONEST: list[dict[str, Any]] = [
    {},
    sequence("pre_tokenizer", split(GPT4), BYTE_LEVEL),
    {"normalizer": {"type": "NFC"}, **sequence("pre_tokenizer", split(O200K), BYTE_LEVEL)},
    sequence("pre_tokenizer", {"type": "Digits", "individual_digits": True}, BYTE_LEVEL),
    {
        **sequence("normalizer", {"type": "Prepend", "prepend": "▁"}, REPLACE),
        "pre_tokenizer": None,
        **sequence(
            "decoder",
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ),
    },
    {
        **UNIGRAM,
        **sequence(
            "normalizer",
            {"type": "Precompiled", "precompiled_charsmap": charsmap("a", "ab")},
            replace(" {2,}", " "),
            {"type": "Strip", "strip_left": False, "strip_right": True},
        ),
        "pre_tokenizer": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
        "decoder": {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True},
    },
    {
        **WORDS,
        "normalizer": {
            "type": "BertNormalizer",
            "clean_text": True,
            "handle_chinese_chars": True,
            "strip_accents": None,
            "lowercase": True,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"},
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
    },
]


@pytest.mark.parametrize("change", HONEST)
def test_an_honest_file_works_as_the_library_reads_it(change: dict[str, Any]) -> None:
    text = json.dumps(TRAINED | change)
    plain, (backend, growth) = tokenizers.Tokenizer.from_str(text), tokenizer_file.load(text, "t")
    assert backend.to_str() == plain.to_str()
    ids = plain.encode(TEXT, add_special_tokens=False).ids
    ours = Tokenizer(backend, ChatFormat(), growth)
    assert ours.encode(TEXT) == ids and ours.decode(ids) == plain.decode(ids)
    assert ours.encode("") == []
    long = TEXT * (limits.MAX_PROMPT_BYTES // 8 // len(TEXT.encode()))
    assert ours.encode(long) == plain.encode(long, add_special_tokens=False).ids
    batch = ours.encode_batch([TEXT, "x"], offsets=True)
    assert [entry.offsets for entry in batch] == [
        entry.offsets for entry in plain.encode_batch([TEXT, "x"], add_special_tokens=False)
    ]


def test_padding_and_truncation_are_left_out() -> None:
    padded = tokenizers.Tokenizer.from_str(json.dumps(TRAINED))
    padded.enable_padding(length=128)
    padded.enable_truncation(3)
    backend, _ = tokenizer_file.load(padded.to_str(), "t")
    assert backend.to_str() == tokenizers.Tokenizer.from_str(json.dumps(TRAINED)).to_str()


def padding(**change: Any) -> dict[str, Any]:
    whole = {"strategy": "BatchLongest", "direction": "Right", "pad_to_multiple_of": None}
    return {"padding": {**whole, "pad_id": 0, "pad_type_id": 0, "pad_token": "x", **change}}


def model(**change: Any) -> dict[str, Any]:
    return {"model": {**TRAINED["model"], **change}}


def added(**change: Any) -> dict[str, Any]:
    return {"added_tokens": [{**TRAINED["added_tokens"][0], **change}]}


DOUBLING = replace("a", "aa")
REFUSED: list[tuple[dict[str, Any], str]] = [
    (padding(strategy={"Fixed": 10**10}), "padding is no number up to"),
    (padding(pad_to_multiple_of=10**18), "padding is no number up to"),
    (sequence("normalizer", *[DOUBLING] * 40), "times longer"),
    (sequence("normalizer", *[{**DOUBLING, "type": []}] * 40), "times longer"),  # which the library takes for Replace
    (sequence("normalizer", *[{**DOUBLING, "type": "Wings"}] * 40), "times longer"),
    (sequence("normalizer", *[sequence("normalizer", *[DOUBLING] * 8)["normalizer"]] * 8), "times longer"),
    ({"normalizer": {"type": "Prepend", "prepend": "x" * 100_000}}, "characters, the limit"),
    (sequence("normalizer", *[{"type": "NFKD"}] * 64), "times longer"),
    (sequence("normalizer", *[{"type": "Lowercase"}] * 65), "65 steps"),
    (sequence("pre_tokenizer", *[BYTE_LEVEL] * 40), "times longer"),
    (sequence("decoder", *[DOUBLING] * 40), "times longer"),
    (sequence("normalizer", replace("", "a")), "empty pattern"),
    ({"pre_tokenizer": {"type": "FixedLength", "length": 0}}, "length 0"),
    ({"decoder": {"type": "Strip", "content": ".", "start": 0, "stop": 100}}, "cuts more"),
    ({"decoder": {"type": "Strip", "content": ".", "start": 2**63, "stop": 0}}, "no number up to"),
    ({"pre_tokenizer": split("(a+)+b")}, "repeats a repetition"),
    ({"pre_tokenizer": split("((?:x|a*)y)*b")}, "repeats a repetition"),
    ({"pre_tokenizer": split("(a*){2,}b")}, "repeats a repetition"),
    ({"decoder": replace("a*a*a*b", "")}, "more than one repetition"),
    ({"pre_tokenizer": split("a" * 10_000)}, "characters, the limit"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "AAAA"}}, "cut off"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "/////w=="}}, "cut off"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": "?"}}, "not base64"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("x" * 10_000)}}, "puts in 10000 bytes"),
    (model(vocab={**TRAINED["model"]["vocab"], "moon": 2**31}), "has no id of"),
    (model(vocab={**TRAINED["model"]["vocab"], "moon": 1.5}), "has no id of"),
    (model(vocab={**TRAINED["model"]["vocab"], "x" * 20_000: 300}), "no text of at most"),
    (model(vocab=[["a", 0.0], 3]), "no text of at most"),
    (model(vocab=None), "no vocabulary"),
    (model(merges=7), "merges are no list"),
    (model(continuing_subword_prefix="x" * 10**6), "characters, the limit"),
    (model(max_input_chars_per_word=10**6), "max_input_chars_per_word"),
    (added(id=2**32 - 1), "has no id of"),
    (added(content=5), "no text of at most"),
    ({"added_tokens": {}}, ""),
    ({"added_tokens": [7]}, "no list of tokens"),
    ({"model": 7}, "no model"),
    (model(merges=[["a", "not there"]]), "is not a tokenizer"),
    (model(type="Wings"), "is not a tokenizer"),
    ({"decoder": [1]}, "a step is no object"),
    ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": ""}}, ""),
]


@pytest.mark.parametrize(("change", "said"), REFUSED)
def test_a_file_beyond_the_limits_is_refused_before_the_library_reads_it(
    change: dict[str, Any], said: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TRAINED | change))
    (tmp_path / "chat.json").write_text(ChatFormat().to_json())
    if not said:  # as the library takes it, or one line
        with contextlib.suppress(MerinoError):
            Tokenizer.load(tmp_path).encode(TEXT)
    else:
        with pytest.raises(ArtefactError, match=said) as refusal:
            Tokenizer.load(tmp_path)
        assert "\n" not in str(refusal.value)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "q"}}, "b"),  # it has no token for the unknown
        ({"normalizer": {"type": "Precompiled", "precompiled_charsmap": charsmap("x" * 60)}}, None),
    ],
)
def test_what_fails_at_a_text_is_an_error_about_it(
    change: dict[str, Any], text: str | None, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tokenizer.json").write_text(json.dumps(TRAINED | change))
    (tmp_path / "chat.json").write_text(ChatFormat().to_json())
    tokenizer = Tokenizer.load(tmp_path)
    if text is not None:
        with pytest.raises(ArtefactError, match="the tokenizer fails on this text"):
            tokenizer.encode(text)
    assert capfd.readouterr().err == ""


def test_a_text_that_grows_too_long_is_refused_and_others_are_not(tmp_path: Path) -> None:
    """Eight doublings of the letter a: 256 times, where a text has that letter."""
    growing = TRAINED | sequence("normalizer", *[DOUBLING] * 8)
    backend, growth = tokenizer_file.load(json.dumps(growing), "t")
    tokenizer = Tokenizer(backend, ChatFormat(), growth)
    assert len(tokenizer.decode(tokenizer.encode("a"))) == 256
    plain = "moon " * 100_000
    assert tokenizer.decode(tokenizer.encode(plain)) == plain
    with pytest.raises(InputError, match="too long"):
        tokenizer.encode("a" * 100_000)


def test_a_post_processor_that_panics_is_one_error(capfd: pytest.CaptureFixture[str]) -> None:
    single = [{"SpecialToken": {"id": "zz", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    document = {"post_processor": {"type": "TemplateProcessing", "single": single, "pair": [], "special_tokens": {}}}
    try:
        backend, _ = tokenizer_file.load(json.dumps(TRAINED | document), "t")
    except ArtefactError:
        return
    with pytest.raises(ArtefactError, match="the tokenizer fails"):
        prepended_token(backend)
    assert capfd.readouterr().err == ""
