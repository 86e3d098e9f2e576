"""A SentencePiece file of any pieces, as the library writes it: a protocol buffer."""

from __future__ import annotations

import struct
from collections.abc import Sequence

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = 1, 2, 3, 4, 5, 6
Piece = tuple[str, float, int]


def number(field: int, value: int) -> bytes:
    """A field that holds a whole number."""
    return _varint(field << 3) + _varint(value & (2**64 - 1))


def content(field: int, value: bytes) -> bytes:
    """A field that holds bytes, a text or a message."""
    return _varint(field << 3 | 2) + _varint(len(value)) + value


def model(pieces: Sequence[Piece], trainer: bytes = b"", normalizer: bytes = b"", more: bytes = b"") -> bytes:
    """The file. Without a `trainer` it is BPE with bytes, without a `normalizer` a text stays as it is."""
    listed = b"".join(
        content(1, content(1, text.encode()) + _varint(2 << 3 | 5) + struct.pack("<f", score) + number(3, kind))
        for text, score, kind in pieces
    )
    trainer = trainer or number(3, 2) + number(35, 1) + number(40, 0) + number(41, 1) + number(42, 2)
    return listed + content(2, trainer) + content(3, normalizer or number(3, 1) + number(4, 0) + number(5, 1)) + more


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    return bytes([*out, value])
