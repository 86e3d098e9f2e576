"""A GGUF file (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md): its metadata and tensors.

Nothing in the file is trusted. Every size and offset must lie within the file, tensors must neither be empty nor
overlap, and counts have limits. So what is read takes time and memory in proportion to the file. This module knows no
model; the types of weights are those of the package `gguf`.
"""

from __future__ import annotations

import itertools
import math
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from merino_edge import limits
from merino_edge.errors import ArtefactError, UnsupportedError

if TYPE_CHECKING:
    import gguf

MAGIC = b"GGUF"
VERSIONS = (2, 3)
DEFAULT_ALIGNMENT = 32
MAX_DIMENSIONS = 4
# The types of values, by their number in a file, as numpy has them; a string and an array have no fixed size.
SCALARS = dict(enumerate(("u1", "i1", "<u2", "<i2", "<u4", "<i4", "<f4", "?")))
SCALARS |= {10: "<u8", 11: "<i8", 12: "<f8"}
STRING, ARRAY = 8, 9
PLAIN = {"F32": "<f4", "F16": "<f2", "F64": "<f8", "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8"}


class Damaged(ValueError):
    """What is wrong with the file."""


class Tensor(NamedTuple):
    """Weights as stored. `data` has the shape [..., rows, columns]; of a quantised type its columns are bytes."""

    name: str
    kind: gguf.GGMLQuantizationType
    data: np.ndarray


class GgufFile:
    """The content of a file. Strings in `values` are bytes; an array is a list of them, or a numpy array."""

    def __init__(self, path: Path) -> None:
        """Raises ArtefactError (damaged), UnsupportedError (a type that is not known)."""
        try:
            self._content = np.memmap(path, mode="r")
            self._view, self._at = self._content.data, 0
            self.values: dict[str, Any] = {}
            self.tensors: dict[str, Tensor] = {}
            self._strings = 0
            self._read(path)
        except (Damaged, OSError, ValueError) as error:
            raise ArtefactError(
                f"{path} cannot be read as GGUF ({error})", "it is damaged or truncated; download it again"
            ) from None

    def _read(self, path: Path) -> None:
        if bytes(self._take(4)) != MAGIC:
            raise Damaged("it does not begin with GGUF")
        if (version := self._number("<I")) not in VERSIONS:
            if version & 0xFFFF == 0:
                raise UnsupportedError(f"{path} is big-endian", "download the little-endian file")
            if version == 1:  # llama.cpp wrote it for some days of August 2023
                raise UnsupportedError(f"{path} is of version 1 of GGUF", "download a newer file of the model")
            if version < 100:
                newer = f"{path} is of version {version} of GGUF, this tool knows {VERSIONS[0]} to {VERSIONS[-1]}"
                raise UnsupportedError(newer, "run: pip install -U merino-edge")
            raise Damaged(f"version {version}")
        tensors, fields = self._number("<Q"), self._number("<Q")
        if max(tensors, fields) > limits.MAX_GGUF_FIELDS:
            raise Damaged(f"more than {limits.MAX_GGUF_FIELDS} fields or tensors, see merino_edge/limits.py")
        for _ in range(fields):
            key = self._key()
            if key in self.values:
                raise Damaged(f"{key[:100]} appears twice")
            self.values[key] = self._value(self._number("<I"))
        self._read_tensors(tensors, path)

    # --- values --------------------------------------------------------------------------------------

    def _take(self, size: int) -> memoryview:
        if size > len(self._view) - self._at:
            raise Damaged("it ends too early")
        self._at += size
        return self._view[self._at - size : self._at]

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _key(self) -> str:
        return str(self._take(self._number("<Q")), "utf-8")

    def _value(self, kind: int) -> Any:
        if kind == STRING:
            return bytes(self._take(self._number("<Q")))
        if kind == ARRAY:
            inside, count = self._number("<I"), self._number("<Q")
            return self._string_array(count) if inside == STRING else self._scalars(inside, count)
        return self._scalars(kind, 1)[0].item()

    def _scalars(self, kind: int, count: int) -> np.ndarray:
        if kind not in SCALARS:
            raise Damaged(f"a value of type {kind}")
        dtype = np.dtype(SCALARS[kind])
        return np.frombuffer(self._take(count * dtype.itemsize), dtype)

    def _string_array(self, count: int) -> list[bytes]:
        self._strings += count
        if self._strings > limits.MAX_GGUF_STRINGS:
            raise Damaged(f"more than {limits.MAX_GGUF_STRINGS} strings in arrays, see merino_edge/limits.py")
        view, at, end, found = self._view, self._at, len(self._view), []
        for _ in range(count):
            if end - at < 8:
                raise Damaged("it ends too early")
            size = int.from_bytes(view[at : at + 8], "little")
            at += 8 + size
            if at > end:
                raise Damaged("it ends too early")
            found.append(bytes(view[at - size : at]))
        self._at = at
        return found

    # --- tensors -------------------------------------------------------------------------------------

    def _read_tensors(self, count: int, path: Path) -> None:
        found = []
        for _ in range(count):
            name, dimensions = self._key(), self._number("<I")
            if not 1 <= dimensions <= MAX_DIMENSIONS:
                raise Damaged(f"{name[:100]} has {dimensions} dimensions")
            shape = [self._number("<Q") for _ in range(dimensions)]  # the shortest stride first
            found.append((name, shape, self._number("<I"), self._number("<Q")))
        alignment = self.values.get("general.alignment", DEFAULT_ALIGNMENT)
        if type(alignment) is not int or alignment < 1 or alignment & (alignment - 1):
            raise Damaged(f"alignment {alignment!r}")
        first = -(-self._at // alignment) * alignment
        spans = []
        for name, shape, number, offset in found:
            if name in self.tensors:
                raise Damaged(f"tensor {name[:100]} appears twice")
            kind, dtype, stored = self._layout(name, shape, number, path)
            begin, size = first + offset, math.prod(stored) * dtype.itemsize
            if begin + size > len(self._view):
                raise Damaged(f"{name[:100]} ends beyond the file")
            spans.append((begin, begin + size, name))
            self.tensors[name] = Tensor(name, kind, np.ndarray(stored, dtype, self._content, begin))
        spans.sort()
        for (_, end, name), (begin, _, other) in itertools.pairwise(spans):
            if begin < end:
                raise Damaged(f"{name[:100]} and {other[:100]} overlap")

    def _layout(
        self, name: str, shape: list[int], number: int, path: Path
    ) -> tuple[gguf.GGMLQuantizationType, np.dtype[Any], list[int]]:
        """The type of a tensor's weights, and how they are stored: numpy's type and the shape."""
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        try:
            kind = GGMLQuantizationType(number)
            block, block_bytes = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError):
            raise UnsupportedError(
                f"{path}: {name[:100]} is of type {number}, which cannot be read", "choose another quantisation"
            ) from None
        if min(shape) < 1 or shape[0] % block:
            raise Damaged(f"{name[:100]} has the shape {shape}")
        dtype, stored = np.dtype(PLAIN.get(kind.name, "u1")), shape[::-1]
        if kind.name not in PLAIN:
            stored[-1] = stored[-1] // block * block_bytes
        return kind, dtype, stored
