"""A SentencePiece file, `tokenizer.model`: what GGUF says of the same vocabulary, as `gguf_tokenizer` reads it.

The file is a protocol buffer, whose few fields are read here (sentencepiece's sentencepiece_model.proto). BPE and
Unigram are built; what neither the `tokenizers` library nor GGUF can say is refused by name.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merino_edge import limits
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.gguf_tokenizer import BYTE, CONTROL, NORMAL, SPACE, UNKNOWN, USER_DEFINED
from merino_edge.errors import ArtefactError, UnsupportedError

UNIGRAM, BPE = 1, 2  # TrainerSpec.ModelType
KINDS = {3: "words", 4: "characters"}
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5  # wire types
# Fields of ModelProto, SentencePiece, TrainerSpec and NormalizerSpec.
PIECES, TRAINER, NORMALIZER, DENORMALIZER = 1, 2, 3, 5
TEXT, SCORE, TYPE = 1, 2, 3
MODEL_TYPE, SUFFIXES, BYTE_FALLBACK, UNKNOWN_ID, BEGIN_ID, END_ID = 3, 24, 35, 40, 41, 42
CHARSMAP, PREFIX, JOINS, ESCAPES = 2, 3, 4, 5
DAMAGED = "it is damaged; download it again"
CONVERT = "save it as tokenizer.json: transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)"


@dataclass(frozen=True)
class SentencePiece:
    """A vocabulary as GGUF's metadata, the normalisation of a text before BPE, and the pieces of begin and end."""

    metadata: Metadata
    prefixes: bool  # BPE with a space before the text
    charsmap: bytes
    joins_spaces: bool
    begin: str
    end: str


def read(path: Path) -> SentencePiece:
    """The vocabulary in `path`. Raises ArtefactError (damaged), UnsupportedError (a kind that cannot be built)."""
    where = str(path)
    try:
        size_bytes = path.stat().st_size
        if size_bytes > limits.MAX_ARTEFACT_BYTES:
            raise ArtefactError(f"{where} has {size_bytes} bytes", "see merino_edge/limits.py")
        data = memoryview(path.read_bytes())
        model = list(_fields(data))
        pieces = [_piece(value) for number, value in model if number == PIECES]
        trainer, normalizer, other = (dict(_of(model, part)) for part in (TRAINER, NORMALIZER, DENORMALIZER))
    except (OSError, ValueError, TypeError, IndexError, struct.error):
        raise ArtefactError(f"{where} is no SentencePiece file", DAMAGED) from None
    if not 0 < len(pieces) <= limits.MAX_VOCAB_SIZE:
        raise ArtefactError(f"{where} has {len(pieces)} pieces, the limit is {limits.MAX_VOCAB_SIZE}", DAMAGED)
    kind, charsmap = trainer.get(MODEL_TYPE, UNIGRAM), bytes(normalizer.get(CHARSMAP, b""))
    joins = bool(normalizer.get(JOINS, 1))
    of_users = any(of == USER_DEFINED for _, _, of in pieces)
    for refused, what in (
        (kind not in (UNIGRAM, BPE), f"SentencePiece of {KINDS.get(kind, 'an unknown kind')}"),
        (trainer.get(SUFFIXES), "treat_whitespace_as_suffix"),
        (not normalizer.get(ESCAPES, 1), "escape_whitespaces false"),
        (kind == UNIGRAM and trainer.get(BYTE_FALLBACK), "Unigram with byte_fallback"),
        (other.get(CHARSMAP), "a denormalizer"),
        # SentencePiece finds them in the middle of normalising, the library before.
        (of_users and (kind == UNIGRAM or charsmap or joins), "a user-defined piece in a text that is normalised"),
    ):
        if refused:
            raise UnsupportedError(f"{where}: {what} is not supported", CONVERT)
    # As GGUF has them: a token that is found in a text has the spaces of the text.
    tokens = [text.replace(SPACE, " ") if of == USER_DEFINED else text for text, _, of in pieces]
    if len(set(tokens)) != len(tokens):
        raise ArtefactError(f"{where} has a piece twice", DAMAGED)
    values: dict[str, Any] = {
        "model": b"llama" if kind == BPE else b"t5",
        "tokens": [token.encode() for token in tokens],
        "scores": np.array([score for _, score, _ in pieces], np.float32),
        "token_type": np.array([of for _, _, of in pieces], np.int32),
        "add_space_prefix": bool(normalizer.get(PREFIX, 1)),
        "unknown_token_id": next((i for i, (_, _, of) in enumerate(pieces) if of == UNKNOWN), 0),
    }
    if kind == UNIGRAM:
        values |= {"remove_extra_whitespaces": joins, "precompiled_charsmap": np.frombuffer(charsmap, np.uint8)}
        charsmap, joins = b"", False
    metadata = Metadata({f"tokenizer.ggml.{name}": value for name, value in values.items()}, where)
    begin, end = (_named(tokens, pieces, trainer.get(number, usual)) for number, usual in ((BEGIN_ID, 1), (END_ID, 2)))
    prefixes = kind == BPE and bool(values["add_space_prefix"])
    return SentencePiece(metadata, prefixes, charsmap, joins, begin, end)


def _named(tokens: list[str], pieces: list[tuple[str, float, int]], token_id: int) -> str:
    """The control piece of an id; "" where the vocabulary has none."""
    return tokens[token_id] if 0 <= token_id < len(tokens) and pieces[token_id][2] == CONTROL else ""


def _piece(value: Any) -> tuple[str, float, int]:
    """The text, the score and the type of a piece. Raises ValueError."""
    fields = dict(_fields(value))
    kind = fields.get(TYPE, NORMAL)
    if not NORMAL <= kind <= BYTE:
        raise ValueError
    return str(fields[TEXT], "utf-8") if TEXT in fields else "", float(fields.get(SCORE, 0.0)), kind


def _of(model: list[tuple[int, Any]], part: int) -> Iterator[tuple[int, Any]]:
    for number, value in model:
        if number == part:
            yield from _fields(value)


def _fields(data: memoryview) -> Iterator[tuple[int, Any]]:
    """The fields of a message: number, and a whole number, a float32 or bytes. Raises ValueError, IndexError."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        value: Any
        if wire == VARINT:
            value, at = _varint(data, at)
            value -= (value >> 63) << 64  # a negative number has all 64 bits
        elif wire == BYTES:
            size, at = _varint(data, at)
            value, at = data[at : at + size], at + size
        elif wire in (FIXED32, FIXED64):
            size = 4 if wire == FIXED32 else 8
            (value,) = struct.unpack("<f" if wire == FIXED32 else "<d", data[at : at + size])
            at += size
        else:
            raise ValueError
        if at > len(data):
            raise ValueError
        yield number, value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    """A number of seven bits a byte, and where it ends. Raises IndexError, ValueError."""
    value = 0
    for shift in range(0, 70, 7):
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise ValueError
