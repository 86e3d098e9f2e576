"""A lone tokenizer.model divides texts as SentencePiece does; damaged ones and other kinds are refused in one line."""

from __future__ import annotations

import io
import json
import random
from pathlib import Path
from typing import Any

import pytest

from helpers.sentencepiece_model import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, Piece, content, model, number
from helpers.tiny_huggingface import LLAMA, save
from merino_edge.convert import sentencepiece_file, tokenizer_parts
from merino_edge.convert.import_model import import_model
from merino_edge.errors import ArtefactError, MerinoError, UnsupportedError
from merino_edge.export.parity import TEXT
from merino_edge.tokenizer import Tokenizer

PIECES: list[Piece] = [("<unk>", 0.0, UNKNOWN), ("<s>", 0.0, CONTROL), ("</s>", 0.0, CONTROL)]
PIECES += [(f"<0x{byte:02X}>", 0.0, BYTE) for byte in range(256)]
PIECES += [
    (token, -float(i), NORMAL) for i, token in enumerate(("\u2581t", "he", "\u2581the", "\u2581", "t", "h", "e"))
]
UNIGRAM = number(3, 1)


def _written(folder: Path, data: bytes) -> Path:
    (folder / "tokenizer.model").write_bytes(data)
    return folder / "tokenizer.model"


def _texts(count: int) -> list[str]:
    """Without long runs of one letter: there Unigram's sums tie, and rounding decides."""
    rng = random.Random(0)
    words = [*TEXT.split(), "hello", "12,345", "na\u00efve", "\u65e5\u672c\u8a9e", "\ufb01", "\u00bd", "\U0001f44d"]
    parts = [*words, " ", "  ", "\n", "\t", "\u00a0", "\u3000", "'s"]
    usual = ["", " ", "  ", " a", "a ", "\n\n"]
    return usual + ["".join(rng.choices(parts, k=rng.randint(1, 9))) for _ in range(count)]


def test_a_folder_with_a_lone_file_is_imported(tmp_path: Path) -> None:
    folder = save(tmp_path / "model", LLAMA)
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "LlamaTokenizer"}))
    _written(folder, model(PIECES))
    import_model(folder, tmp_path / "ckpt")
    ours = Tokenizer.load(tmp_path / "ckpt")
    ids = {text: i for i, (text, _, _) in enumerate(PIECES)}
    space = "\u2581"
    assert ours.encode("the\u00e9 the") == [
        *(1, ids[f"{space}the"], ids["<0xC3>"], ids["<0xA9>"], ids[f"{space}the"]),
    ]
    assert ours.encode(" t") == [1, ids[space], ids[f"{space}t"]]
    assert ours.chat.bos_token_id == 1 and 2 in ours.chat.eos_token_ids


TRAINED: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "bpe", "byte_fallback": True, "split_digits": True},
    "gemma": {"model_type": "bpe", "byte_fallback": True, "add_dummy_prefix": False, "user_defined_symbols": ["\n\n"]},
    "normalised": {"model_type": "bpe", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "unigram": {"model_type": "unigram", "normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
    "plain unigram": {"model_type": "unigram", "add_dummy_prefix": False},
}


@pytest.mark.parametrize("name", TRAINED)
def test_every_text_is_divided_as_by_sentencepiece(name: str, tmp_path: Path) -> None:
    library = pytest.importorskip("sentencepiece")
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False, **TRAINED[name]}
    data, texts = io.BytesIO(), _texts(2000)
    library.SentencePieceTrainer.train(
        sentence_iterator=iter([*texts, TEXT]), model_writer=data, vocab_size=320, hard_vocab_limit=False,
        minloglevel=2, num_threads=1, character_coverage=0.99, **options,
    )  # fmt: skip
    path = _written(tmp_path, data.getvalue())
    ours, theirs = tokenizer_parts.build(tmp_path, {}, {}, "llama"), library.SentencePieceProcessor(str(path))
    for text in texts:
        assert ours.encode(text, add_special_tokens=False).ids == theirs.encode(text), text
    assert ours.encode("a").ids[0] == theirs.bos_id()


@pytest.mark.parametrize(
    ("data", "error", "says"),
    [
        (b"", ArtefactError, "has 0 pieces"),
        (b"\n", ArtefactError, "is no SentencePiece file"),
        (b"not a protocol buffer", ArtefactError, "is no SentencePiece file"),
        (model([*PIECES, PIECES[-1]]), ArtefactError, "has a piece twice"),
        (
            model([*PIECES, ("\ud800".encode("utf-8", "surrogatepass").decode("latin-1"), 0.0, 9)]),
            ArtefactError,
            "is no",
        ),
        (model(PIECES, number(3, 3)), UnsupportedError, "SentencePiece of words is not supported; save it as"),
        (model(PIECES, number(3, 4)), UnsupportedError, "SentencePiece of characters is not supported"),
        (model(PIECES, UNIGRAM + number(35, 1)), UnsupportedError, "Unigram with byte_fallback is not supported"),
        (model(PIECES, number(3, 2) + number(24, 1)), UnsupportedError, "treat_whitespace_as_suffix is not supported"),
        (model(PIECES, b"", number(5, 0)), UnsupportedError, "escape_whitespaces false is not supported"),
        (model(PIECES, more=content(5, content(2, b"x"))), UnsupportedError, "a denormalizer is not supported"),
        (
            model([*PIECES, ("a b", 0.0, USER_DEFINED)], b"", number(4, 1)),
            UnsupportedError,
            "a user-defined piece in a text that is normalised is not supported",
        ),
    ],
)
def test_other_files_are_refused_by_the_right_word(
    data: bytes, error: type[MerinoError], says: str, tmp_path: Path
) -> None:
    path = _written(tmp_path, data)
    with pytest.raises(error, match=says) as refused:
        sentencepiece_file.read(path)
    assert "\n" not in str(refused.value)


def test_classes_of_other_models_are_refused(tmp_path: Path) -> None:
    _written(tmp_path, model(PIECES))
    with pytest.raises(
        UnsupportedError, match=r"tokenizer_class 'T5Tokenizer' is not supported without a tokenizer\.json"
    ):
        tokenizer_parts.build(tmp_path, {"tokenizer_class": "T5Tokenizer"}, {}, "llama")


def test_changed_bytes_are_read_or_refused_in_one_line(tmp_path: Path) -> None:
    whole, rng = model(PIECES[:3] + PIECES[-7:]), random.Random(0)
    told = []
    for _ in range(250):
        data = bytearray(whole[: rng.choice((len(whole), rng.randrange(1, len(whole))))])
        for _ in range(rng.randrange(4)):
            data[rng.randrange(len(data))] = rng.randrange(256)
        _written(tmp_path, bytes(data))
        try:
            tokenizer_parts.build(tmp_path, {}, {}, "llama")
        except MerinoError as error:
            told.append(str(error))
    assert 60 < len(told) < 250 and all("\n" not in line and str(tmp_path) in line for line in told)
