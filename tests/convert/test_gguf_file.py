"""GGUF files written by hand: every size is held against the file, so no file takes more than its own length."""

from __future__ import annotations

import random
import struct
import time
import tracemalloc
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest

from helpers.wrong_values import refusal
from merino_edge import limits
from merino_edge.convert.gguf_file import GgufFile
from merino_edge.errors import ArtefactError, UnsupportedError

UINT8, UINT32, FLOAT32, BOOL, STRING, ARRAY, UINT64 = 0, 4, 6, 7, 8, 9, 10
F32, Q8_0 = 0, 8
Tensor = tuple[str, list[int], int, int]  # name, dimensions, type, offset


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def scalar(kind: int, form: str, value: Any) -> bytes:
    return struct.pack("<I" + form, kind, value)


def array(kind: int, count: int, content: bytes) -> bytes:
    return struct.pack("<IIQ", ARRAY, kind, count) + content


def file_of(fields: dict[str, bytes], tensors: list[Tensor], data: bytes = b"", version: int = 3) -> bytes:
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(fields))
    head += b"".join(text(key) + value for key, value in fields.items())
    for name, shape, kind, offset in tensors:
        head += text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)
    return head + bytes(-len(head) % 32) + data


FIELDS = {
    "general.architecture": struct.pack("<I", STRING) + text("llama"),
    "llama.block_count": scalar(UINT32, "I", 2),
    "epsilon": scalar(FLOAT32, "f", 0.5),
    "flag": scalar(BOOL, "?", True),
    "large": scalar(UINT64, "Q", 2**63),
    "tokens": array(STRING, 3, text("a") + text("") + text("ü")),
    "numbers": array(UINT32, 2, struct.pack("<II", 7, 8)),
}
WEIGHTS = np.arange(64, dtype=np.float32)
WHOLE = file_of(FIELDS, [("w", [32, 2], F32, 0), ("q", [32], Q8_0, 256)], WEIGHTS.tobytes() + bytes(34))


def read(folder: Path, content: bytes) -> GgufFile:
    (folder / "m.gguf").write_bytes(content)
    return GgufFile(folder / "m.gguf")


def test_what_is_written_is_read(tmp_path: Path) -> None:
    file = read(tmp_path, WHOLE)
    numbers = file.values.pop("numbers")
    assert numbers.tolist() == [7, 8]
    assert file.values == {
        "general.architecture": b"llama",
        "llama.block_count": 2,
        "epsilon": 0.5,
        "flag": True,
        "large": 2**63,
        "tokens": [b"a", b"", "ü".encode()],
    }
    assert np.array_equal(file.tensors["w"].data, WEIGHTS.reshape(2, 32))
    assert file.tensors["q"].kind == gguf.GGMLQuantizationType.Q8_0 and file.tensors["q"].data.shape == (34,)


def test_the_library_reads_the_same(tmp_path: Path) -> None:
    file, theirs = read(tmp_path, WHOLE), gguf.GGUFReader(tmp_path / "m.gguf")
    assert theirs.fields["tokens"].contents() == [item.decode() for item in file.values["tokens"]]
    for tensor in theirs.tensors:
        assert np.array_equal(tensor.data, file.tensors[tensor.name].data)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "empty|too early"),
        (b"GGUF", "too early"),
        (file_of({}, [], version=1000), "version 1000"),
        (file_of({"a": struct.pack("<I", 13)}, []), "a value of type 13"),
        (file_of({"a": array(ARRAY, 1, array(UINT8, 0, b""))}, []), "a value of type 9"),
        (file_of({"a": array(STRING, 2**62, b"")}, []), "more than .* strings"),
        (file_of({"a": array(STRING, 100, text("a"))}, []), "too early"),
        (file_of({"a": array(UINT64, 2**61, bytes(8))}, []), "too early"),
        (file_of({"a": struct.pack("<IQ", STRING, 2**63)}, []), "too early"),
        (file_of({"general.alignment": scalar(UINT32, "I", 0)}, []), "alignment 0"),
        (file_of({"general.alignment": scalar(UINT32, "I", 24)}, []), "alignment 24"),
        (file_of({}, [("w", [0], F32, 0)]), "has the shape"),
        (file_of({}, [("w", [32, 0], Q8_0, 0)], bytes(64)), "has the shape"),
        (file_of({}, [("w", [33], Q8_0, 0)], bytes(64)), "has the shape"),
        (file_of({}, [("w", [2**32, 2**32], F32, 0)], bytes(64)), "beyond the file"),
        (file_of({}, [("w", [4], F32, 2**64 - 16)], bytes(64)), "beyond the file"),
        (file_of({}, [("w", [1] * 5, F32, 0)], bytes(64)), "5 dimensions"),
        (file_of({}, [("w", [], F32, 0)], bytes(64)), "0 dimensions"),
        (file_of({}, [("w", [4], F32, 0), ("v", [4], F32, 8)], bytes(64)), "overlap"),
        (file_of({}, [("w", [4], F32, 0), ("w", [4], F32, 16)], bytes(64)), "appears twice"),
        (b"GGUF" + struct.pack("<IQQ", 3, 2**40, 0), "more than"),
        (file_of({"a": FIELDS["flag"]}, [])[:24] + text("\xff")[:8] + b"\xff\xff", "utf-8|too early"),
    ],
)
def test_what_does_not_fit_is_refused(tmp_path: Path, content: bytes, says: str) -> None:
    with pytest.raises(ArtefactError, match=says):
        read(tmp_path, content)


def test_what_is_not_known_is_not_supported(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="type 99"):
        read(tmp_path, file_of({}, [("w", [4], 99, 0)], bytes(64)))
    for version, says in ((1, "version 1 of GGUF; download a newer file"), (4, "version 4 .* knows 2 to 3; run: pip")):
        with pytest.raises(UnsupportedError, match=says):
            read(tmp_path, file_of({}, [], version=version))
    with pytest.raises(UnsupportedError, match="big-endian"):
        read(tmp_path, b"GGUF" + struct.pack(">IQQ", 3, 0, 0))


def test_a_large_array_takes_no_time(tmp_path: Path) -> None:
    """Fifteen million numbers were once read one by one, for minutes and gigabytes."""
    content = file_of({"a": array(UINT8, 15_000_000, bytes(15_000_000))}, [])
    began = time.process_time()
    tracemalloc.start()
    file = read(tmp_path, content)
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(file.values["a"]) == 15_000_000
    assert time.process_time() - began < 2 and peak_bytes < 2**20
    strings = file_of({"a": array(STRING, limits.MAX_GGUF_STRINGS + 1, bytes(8 * limits.MAX_GGUF_STRINGS + 8))}, [])
    with pytest.raises(ArtefactError, match="strings in arrays"):
        read(tmp_path, strings)


def test_any_damage_is_typed(tmp_path: Path) -> None:
    rng, head = random.Random(0), len(WHOLE) - 290
    for _ in range(400):
        content = bytearray(WHOLE)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(head)
            content[at : at + rng.choice((1, 4, 8))] = rng.choice((b"\0", b"\xff" * 8, b"\x01", bytes(8), b"\x7f"))
        length = rng.choice((len(content), rng.randrange(len(content))))
        assert "\n" not in refusal(lambda content=bytes(content[:length]): read(tmp_path, content))
