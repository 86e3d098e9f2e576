"""The forms of weight files: safetensors and GGUF as structures, so that lengths, types and shapes can be changed.

A file is written again from its structure with every count and offset as the structure says, also where they are wrong.
"""

from __future__ import annotations

import json
import struct
from random import Random
from typing import Any

from fuzz import byte_changes, json_changes
from fuzz.draft import Codec

# --- safetensors -----------------------------------------------------------------------------------

TYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "F4", "C64", "x", "")


def _decode_safetensors(data: bytes) -> list[Any]:
    (size,) = struct.unpack_from("<Q", data)
    return [json.loads(data[8 : 8 + size]), data[8 + size :], 0]


def _step_safetensors(parts: list[Any], rng: Random) -> list[Any]:
    header, data, longer = parts
    kind = rng.random()
    if kind < 0.35:
        return [json_changes.step(header, rng), data, longer]
    if kind < 0.75 and isinstance(header, dict) and header:
        _change_tensor(header, rng, len(data))
        return [header, data, longer]
    if kind < 0.95:
        return [header, byte_changes.step(data, rng), longer]
    return [header, data, rng.choice((1, -1, 8, -8, 10**6, 2**31, 2**40, 2**63 - 10**6))]


def _change_tensor(header: dict[str, Any], rng: Random, size: int) -> None:
    """Change type, shape or place of a tensor so that they still look like what they are."""
    name = rng.choice(list(header))
    entry = header[name]
    if not isinstance(entry, dict) or not {"dtype", "shape", "data_offsets"} <= entry.keys():
        return
    change, shape = rng.randrange(8), entry["shape"]
    if change == 0:
        entry["dtype"] = rng.choice(TYPES)
    elif change == 1 and isinstance(shape, list):
        entry["shape"] = rng.choice(([*shape, 1], shape[::-1], [0], [], [1, *shape], [2**40, 2**40], [size], shape[1:]))
    elif change == 2:
        entry["data_offsets"] = rng.choice(
            ([0, 0], [0, size], [size, size], [size, 0], [0, size + 1], [1, 2], [0, 2**62])
        )
    elif change == 3:  # half of the bytes, as another type of half the width
        entry["dtype"] = "F16"
        if isinstance(shape, list):
            entry["shape"] = [2, *shape]
    elif change == 4:
        header[f"{name}.more"] = dict(entry)
    elif change == 5:
        header[rng.choice(("__metadata__", "", "a" * 300, "\ud800", name.upper()))] = header.pop(name)
    elif change == 6:
        other = header[rng.choice(list(header))]
        if isinstance(other, dict) and "data_offsets" in other:
            entry["data_offsets"], other["data_offsets"] = other["data_offsets"], entry["data_offsets"]
    else:
        header["__metadata__"] = rng.choice(({"format": "pt"}, {"a": 1}, None, [], {"a": "b" * 10**5}))


def _encode_safetensors(parts: list[Any]) -> bytes:
    header, data, longer = parts
    text = json_changes.encode(header)
    text += b" " * (-len(text) % 8)
    return bytes(struct.pack("<Q", max(0, len(text) + longer)) + text + data)


SAFETENSORS = Codec(_decode_safetensors, _step_safetensors, _encode_safetensors)

# --- GGUF ------------------------------------------------------------------------------------------

FORMATS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
STRING, ARRAY = 8, 9
COUNTS = (0, 1, 2, 3, 255, 2**16, 2**24, 2**31, 2**32 - 1, 2**40, 2**61, 2**63, 2**64 - 1)
KINDS = (0, 1, 2, 3, 6, 7, 8, 9, 10, 12, 14, 16, 24, 25, 26, 27, 28, 30, 34, 39, 255, 2**31)


class _Reading:
    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def number(self, form: str) -> Any:
        (value,) = struct.unpack_from("<" + form, self.data, self.at)
        self.at += struct.calcsize("<" + form)
        return value

    def text(self) -> list[Any]:
        """[length as stated, bytes]."""
        size = self.number("Q")
        self.at += size
        return [size, self.data[self.at - size : self.at]]

    def value(self, kind: int) -> Any:
        if kind == STRING:
            return self.text()
        if kind == ARRAY:
            inner, count = self.number("I"), self.number("Q")
            return [inner, count, [self.value(inner) for _ in range(count)]]
        return self.number(FORMATS[kind])


def _decode_gguf(data: bytes) -> dict[str, Any]:
    reading = _Reading(data)
    magic, version = reading.number("I"), reading.number("I")
    tensors, fields = reading.number("Q"), reading.number("Q")
    pairs: list[Any] = []
    for _ in range(fields):
        key, kind = reading.text(), reading.number("I")
        pairs.append([key, kind, reading.value(kind)])
    infos: list[Any] = []
    for _ in range(tensors):
        name, dims = reading.text(), reading.number("I")
        shape = [reading.number("Q") for _ in range(dims)]
        infos.append([name, dims, shape, reading.number("I"), reading.number("Q")])
    rest = data[reading.at + -reading.at % 32 :]
    return {
        "magic": magic,
        "version": version,
        "counts": [tensors, fields],
        "pairs": pairs,
        "infos": infos,
        "rest": rest,
    }


def _step_gguf(form: dict[str, Any], rng: Random) -> dict[str, Any]:
    kind, pairs, infos = rng.random(), form["pairs"], form["infos"]
    if kind < 0.45 and pairs:
        _change_pair(rng.choice(pairs), form, rng)
    elif kind < 0.85 and infos:
        _change_info(rng.choice(infos), form, rng)
    elif kind < 0.95:
        form["rest"] = byte_changes.step(form["rest"], rng)
    else:
        name = rng.choice(("magic", "version", "counts"))
        form[name] = [rng.choice(COUNTS), form["counts"][1]] if name == "counts" else rng.choice(COUNTS) % 2**32
    return form


def _change_pair(pair: list[Any], form: dict[str, Any], rng: Random) -> None:
    key, kind, value = pair
    change = rng.randrange(7)
    if change == 0:
        form["pairs"].remove(pair)
        form["counts"][1] -= 1
    elif change == 1:
        form["pairs"].append([list(key), kind, value])
        form["counts"][1] += rng.choice((0, 1))
    elif change == 2:
        pair[1] = rng.choice((*FORMATS, STRING, ARRAY, 13, 2**31))
    elif change == 3:
        pair[0] = rng.choice(([rng.choice(COUNTS), key[1]], [3, b"a.b"], [len(key[1]), key[1].upper()], [1, b"\xff"]))
    elif kind == ARRAY and isinstance(value, list) and len(value) == 3:  # an earlier step may have changed the kind
        inner, _, items = value
        if change == 4 or not items:
            value[1] = rng.choice((*COUNTS, len(items) + 1, len(items) - 1))
        elif change == 5:
            value[2] = rng.choice((items[:-1], items[::-1], items + items[:1], [], items[:1] * len(items)))
            value[1] = len(value[2])
        else:
            items[rng.randrange(len(items))] = _other(inner, rng)
    else:
        pair[2] = _other(kind, rng)


def _other(kind: int, rng: Random) -> Any:
    """An extreme value of a kind."""
    if kind == STRING:
        text = rng.choice(
            (b"", b"a", b"\xff\xfe", b"llama", b"gpt2", b"\0", "é".encode(), b"x" * 70_000, b"a b", b"{{")
        )
        return [rng.choice((len(text),) * 5 + COUNTS[:3]), text]
    if kind == 7:
        return rng.random() < 0.5
    if kind in (6, 12):
        return rng.choice((0.0, -1.0, 1e30, 1e-30, float("nan"), float("inf"), 1.0))
    if kind in FORMATS:
        bits = 8 * struct.calcsize(FORMATS[kind])
        number = rng.choice((*COUNTS, 7, 8, 33, 1000))
        return number % 2 ** (bits - FORMATS[kind].islower())
    return [4, 1, [1]]


def _change_info(info: list[Any], form: dict[str, Any], rng: Random) -> None:
    change = rng.randrange(8)
    if change == 0:
        form["infos"].remove(info)
        form["counts"][0] -= 1
    elif change == 1:
        form["infos"].append([list(info[0]), *info[1:]])
        form["counts"][0] += 1
    elif change == 2:
        info[3] = rng.choice(KINDS)
    elif change == 3:
        info[4] = rng.choice((*COUNTS, info[4] + 32, info[4] + 1, len(form["rest"])))
    elif change == 4 and info[2]:
        info[2] = list(info[2])
        info[2][rng.randrange(len(info[2]))] = rng.choice((*COUNTS, 8, 16, 32, 256))
    elif change == 5:
        info[1] = rng.choice((0, 1, 2, 3, 4, 5, 100, 2**32 - 1))
    elif change == 6:
        info[2] = rng.choice((info[2][::-1], [*info[2], 1], info[2][:1], [], [0], [1] * 6))
        info[1] = len(info[2])
    else:
        info[0] = rng.choice(([rng.choice(COUNTS), info[0][1]], [4, b"head"], [len(info[0][1]), info[0][1].upper()]))


def _encode_gguf(form: dict[str, Any]) -> bytes:
    parts: list[bytes] = [struct.pack("<IIQQ", form["magic"], form["version"], *(n % 2**64 for n in form["counts"]))]

    def text(pair: list[Any]) -> None:
        parts.append(struct.pack("<Q", pair[0] % 2**64) + pair[1])

    def value(kind: int, item: Any) -> None:
        if isinstance(item, list) and len(item) == 2:
            text(item)
        elif isinstance(item, list):
            inner, count, items = item
            parts.append(struct.pack("<IQ", inner % 2**32, count % 2**64))
            for one in items:
                value(inner, one)
        else:
            form_of = FORMATS.get(kind, "Q")
            try:
                parts.append(struct.pack("<" + form_of, item))
            except (struct.error, OverflowError):  # its kind was changed, not the value
                parts.append(struct.pack("<d", item))

    for key, kind, item in form["pairs"]:
        text(key)
        parts.append(struct.pack("<I", kind % 2**32))
        value(kind, item)
    for name, dims, shape, kind, offset in form["infos"]:
        text(name)
        parts.append(struct.pack("<I", dims))
        parts.extend(struct.pack("<Q", size) for size in shape)
        parts.append(struct.pack("<IQ", kind, offset % 2**64))
    head = b"".join(parts)
    return bytes(head + bytes(-len(head) % 32) + form["rest"])


GGUF = Codec(_decode_gguf, _step_gguf, _encode_gguf)
