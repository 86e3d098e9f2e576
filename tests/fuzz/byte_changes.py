"""Changes of bytes and of plain text: cut, doubled, overwritten, extreme numbers at the borders of values."""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from random import Random

EXTREMES = (0, 1, 2, 255, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**63, 2**64 - 1)
FLOATS = (float("nan"), float("inf"), float("-inf"), 3e38, 1e-45, -0.0)


def step(data: bytes, rng: Random) -> bytes:
    """The bytes with one change."""
    if not data:
        return rng.choice((b"\0", b"{}", b"\xff" * 9))
    at, change = rng.randrange(len(data)), rng.randrange(9)
    length = rng.choice((1, 1, 2, 4, 8, 16, 64))
    if change == 0:
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if change == 1:
        return data[: rng.choice((at, 0, 1, len(data) - 1, len(data) // 2))]
    if change == 2:
        return data[:at] + data[at + length :]
    if change == 3:
        return data[:at] + data[at : at + length] * rng.choice((2, 3, 50)) + data[at + length :]
    if change == 4:
        return data[:at] + rng.randbytes(length) + data[at + length :]
    if change == 5:
        return data + rng.choice((b"\0", b"\n", data[-8:], rng.randbytes(8), b"\xff" * 100, data[:1000]))
    if change == 6:
        return data[:at] + rng.choice((b"\0", b"\xff")) * length + data[at + length :]
    if change == 7:
        packed = struct.pack(*rng.choice((("<f", rng.choice(FLOATS)), ("<e", rng.choice(FLOATS[:3])))))
    else:
        packed = struct.pack("<Q", rng.choice(EXTREMES))[: rng.choice((2, 4, 8))]
    at -= at % len(packed)
    return data[:at] + packed + data[at + len(packed) :]


PIECES = ("\0", "\ufeff", "\udcff", "\n", "\r\n", "\n\n\n", "\t", " " * 50, "é", "\U0001f98a", "\u202e", "\x1b[2J", '"')
NUMBERS = ("-1", "0", "1e999", "nan", "inf", "99999999999999999999", "1.5", "9" * 5000, "0x10", "\u0661", "1_0", "")


def text_step(*words: str) -> Callable[[str, Random], str]:
    """A change of texts of a language; `words` are pieces of it."""
    pieces = (*PIECES, *words, *words, *words) if len(words) < 20 else (*PIECES, *words)

    def change(text: str, rng: Random) -> str:
        at, kind = rng.randrange(len(text) + 1), rng.random()
        end = min(len(text), at + rng.choice((1, 2, 5, 20, 100)))
        if kind < 0.4:
            return text[:at] + rng.choice(pieces) + text[rng.choice((at, at, end)) :]
        if kind < 0.55:
            return text[:at] + text[end:]
        if kind < 0.65:
            return text[:at] + text[at:end] * rng.choice((2, 3, 20, 300)) + text[end:]
        if kind < 0.8:
            found = list(re.finditer(r"\d+(?:\.\d+)?", text)) or [re.match("", text)]
            number = rng.choice(found)
            assert number is not None
            return text[: number.start()] + rng.choice(NUMBERS) + text[number.end() :]
        if kind < 0.9:
            lines = text.split("\n")
            one, other = rng.randrange(len(lines)), rng.randrange(len(lines))
            lines[one], lines[other] = lines[other], rng.choice((lines[one], ""))
            return "\n".join(lines)
        if kind < 0.95:
            return text[:at]
        return text[:at] + rng.choice(("a", "(", " ", "[", "{{", "\\")) * rng.choice((100, 3000, 60_000)) + text[at:]

    return change


def encode_text(text: str) -> bytes:
    """The text as bytes; a surrogate stands for a byte that is not UTF-8."""
    return text.encode("utf-8", "surrogateescape" if not re.search("[\ud800-\udc7f\udd00-\udfff]", text) else "replace")
