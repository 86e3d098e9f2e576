"""An ONNX graph's file, read without any ONNX library: its operators, and the tensors that it keeps in other files.

Whoever opens a graph reads the files that it names. So a bundle's graphs are read here first, from the first byte to
the last: graph, subgraphs, functions, sparse tensors, tensors of attributes, training. `MESSAGES` is onnx.proto. Only
one spelling of a message is accepted: shortest numbers, no field twice, no unknown field, nothing after its end. Other
readers might take another spelling for something else. Their order is free, as every reader takes it alike.
"""

from __future__ import annotations

import mmap
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from merino_edge.errors import ArtefactError

# The fields of each message: number, then kind, then "*" where it is repeated. Kinds: v number, f float, d double,
# s text, bytes, or a message in which no tensor and no operator can be; else a message.
MESSAGES_TEXT = """
Model 1v 2s 3s 4s 5v 6s 7Graph 8s* 14s* 20Training* 25Function* 26s*
Graph 1Node* 2s 5Tensor* 10s 11s* 12s* 13s* 14s* 15Sparse* 16s*
Node 1s* 2s* 3s 4s 5Attribute* 6s 7s 8s 9s* 10s*
Attribute 1s 2f 3v 4s 5Tensor 6Graph 7f* 8v* 9s* 10Tensor* 11Graph* 13s 14s 15s* 20v 21s 22Sparse 23Sparse*
Tensor 1v* 2v 3s 4f* 5v* 6s* 7v* 8s 9s 10d* 11v* 12s 13Entry* 14v 16s*
Sparse 1Tensor 2Tensor 3v*
Entry 1s 2s
Training 1Graph 2Graph 3s* 4s*
Function 1s 4s* 5s* 6s* 7Node* 8s 9s* 10s 11Attribute* 12s* 13s 14s*
"""
MESSAGES: dict[str, dict[int, tuple[str, bool]]] = {
    name: {int(n): (kind, bool(star)) for n, kind, star in re.findall(r"(\d+)([A-Za-z]+)(\*?)", fields)}
    for name, fields in (line.split(" ", 1) for line in MESSAGES_TEXT.split("\n") if line)
}
NUMBER, EIGHT_BYTES, PIECE, FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types; 3 and 4 are groups, which ONNX never had
WIRE_TYPES = {"v": NUMBER, "f": FOUR_BYTES, "d": EIGHT_BYTES}
PACKED_SIZES = {"f": 4, "d": 8}
MOST_BYTES_IN_MEMORY = 16 * 2**20  # of a graph; a larger one has its weights inside and is mapped
MAX_DEPTH = 100  # of messages in messages, as in protobuf's own readers
OPERATOR, DOMAIN, EXTERNAL_DATA, DATA_LOCATION = 4, 7, 13, 14  # fields of Node and of Tensor
EXTERNAL = 1
DECIMAL = re.compile(rb"0|[1-9][0-9]{0,17}")
MOST_TEXT_BYTES = 4096  # of a text that is looked at; a longer one is no name of ours

MICROSOFT = "com.microsoft."  # the domain of ONNX Runtime's own operators
_ONNX = """
Add And Attention Cast Concat ConstantOfShape DequantizeLinear Div Equal Erf Expand Gather Gelu Gemm Greater Identity
If LayerNormalization Less LessOrEqual MatMul Mul Neg Pad Pow QuantizeLinear RMSNormalization Reciprocal ReduceMean
ReduceSum Relu Reshape RotaryEmbedding ScatterElements ScatterND Shape Sigmoid SimplifiedLayerNormalization Slice
Softmax Split Sqrt Squeeze Sub Swish Tanh TensorScatter Tile Transpose Trilu Unsqueeze Where
"""
_MICROSOFT = """
FastGelu GatherBlockQuantized Gelu GroupQueryAttention MatMulNBits QuickGelu SkipLayerNormalization
SkipSimplifiedLayerNormalization
"""
# What export writes. Anything else in a bundle is somebody else's, and only the user can allow it.
OPERATORS = frozenset(_ONNX.split()) | {MICROSOFT + name for name in _MICROSOFT.split()}


@dataclass(frozen=True)
class ExternalTensor:
    """Where a tensor's bytes lie: in the file `location` from `offset` on. `length` None: what its shape says."""

    location: str
    offset: int
    length: int | None


@dataclass
class OnnxGraph:
    """What a graph's file holds, subgraphs and functions included. Operators outside ONNX's domain have it in front."""

    operators: set[str] = field(default_factory=set)
    external: set[ExternalTensor] = field(default_factory=set)


def read(path: Path) -> OnnxGraph:
    """Read a graph's file, but not the tensors. Raises ArtefactError for what another reader might read otherwise."""
    try:
        with open(path, "rb") as file:
            if os.fstat(file.fileno()).st_size <= MOST_BYTES_IN_MEMORY:
                return _Reader(file.read()).model()
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data).model()
    except _Unreadable as reason:
        raise ArtefactError(f"{path} is not an ONNX graph ({reason})", "export the bundle again") from None
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None


class _Unreadable(Exception):
    """The file is no message of ONNX in its one accepted spelling. The text says why."""


class _Reader:
    """Walks over the messages in `data`."""

    def __init__(self, data: bytes | mmap.mmap) -> None:
        self.data = data
        self.found = OnnxGraph()

    def model(self) -> OnnxGraph:
        fields = {number for number, _, _ in self._fields("Model", 0, len(self.data))}
        if not {1, 7, 8} <= fields:
            raise _Unreadable("it has no version, graph or operator set")
        self._walk("Model", 0, len(self.data), 0)
        return self.found

    def _walk(self, message: str, at: int, end: int, depth: int) -> dict[int, bytes]:
        """Walk over a message and those inside it. Returns the bytes of its texts, where a caller needs them."""
        if depth > MAX_DEPTH:
            raise _Unreadable(f"messages lie more than {MAX_DEPTH} deep")
        texts: dict[int, bytes] = {}
        entries, is_external = [], False
        for number, kind, (first, last) in self._fields(message, at, end):
            if kind in MESSAGES:
                inner = self._walk(kind, first, last, depth + 1)
                if message == "Tensor" and number == EXTERNAL_DATA:
                    entries.append((inner.get(1), inner.get(2)))
            elif message == "Entry" or (message == "Node" and number in (OPERATOR, DOMAIN)):
                texts[number] = self.data[first : min(last, first + MOST_TEXT_BYTES)]
            elif message == "Tensor" and number == DATA_LOCATION:
                location, _ = self._number(first, last)
                if location > EXTERNAL:
                    raise _Unreadable(f"a tensor lies at the unknown place {location}")
                is_external = location == EXTERNAL
        if message == "Node":
            self.found.operators.add(_operator(texts))
        if entries or is_external:
            self.found.external.add(_external_tensor(entries))
        return texts

    def _fields(self, message: str, at: int, end: int) -> Iterator[tuple[int, str, tuple[int, int]]]:
        """Number, kind, and first and last + 1 byte of the content of each field."""
        known, seen, data = MESSAGES[message], set[int](), self.data
        while at < end:
            tag = data[at]
            if tag < 128:  # the usual case, without a call: a graph has tens of thousands of fields
                at += 1
            else:
                tag, at = self._number(at, end)
            number, wire = tag >> 3, tag & 7
            if number not in known:
                raise _Unreadable(f"{message} has an unknown field {number}")
            kind, repeated = known[number]
            if not repeated and number in seen:
                raise _Unreadable(f"{message} has its field {number} twice")
            seen.add(number)
            own_wire = WIRE_TYPES.get(kind, PIECE)
            if wire != own_wire and not (repeated and wire == PIECE):
                raise _Unreadable(f"{message} has another type in its field {number}")
            first = at
            if wire == PIECE:
                size, first = self._number(at, end)
                last = first + size
                if kind in PACKED_SIZES and size % PACKED_SIZES[kind]:
                    raise _Unreadable(f"{message} has half a number in its field {number}")
            elif wire == NUMBER:
                _, last = self._number(at, end)
            else:
                last = at + PACKED_SIZES[kind]
            if last > end:
                raise _Unreadable(f"{message} ends within its field {number}")
            yield number, kind, (first, last)
            at = last

    def _number(self, at: int, end: int) -> tuple[int, int]:
        """A varint of at most 64 bits in its shortest spelling, and the place after it."""
        if at < end and self.data[at] < 128:
            return self.data[at], at + 1
        value = 0
        for shift in range(0, 70, 7):
            if at >= end:
                break
            byte = self.data[at]
            at += 1
            value |= (byte & 127) << shift
            if byte < 128:
                if (byte == 0 and shift) or value >= 1 << 64:
                    break
                return value, at
        raise _Unreadable("a number is cut off, too large, or longer than it need be")


def _operator(texts: dict[int, bytes]) -> str:
    name, domain = (texts.get(number, b"").decode(errors="backslashreplace") for number in (OPERATOR, DOMAIN))
    return name if domain in ("", "ai.onnx") else f"{domain}.{name}"


def _external_tensor(entries: list[tuple[bytes | None, bytes | None]]) -> ExternalTensor:
    """The place that the entries of an external tensor name. A checksum is allowed, as others write it."""
    values = {key: value for key, value in entries if key is not None and value is not None}
    if len(values) != len(entries) or not values.keys() <= {b"location", b"offset", b"length", b"checksum"}:
        raise _Unreadable("a tensor's place has a key twice, without a value, or one that is not known")
    if b"location" not in values:
        raise _Unreadable("a tensor lies in another file without a name")
    numbers = {key: value for key, value in values.items() if key in (b"offset", b"length")}
    if not all(DECIMAL.fullmatch(value) for value in numbers.values()):
        raise _Unreadable("a tensor's offset or length is no plain number")
    length = numbers.get(b"length")
    return ExternalTensor(
        values[b"location"].decode(errors="backslashreplace"),
        int(numbers.get(b"offset", b"0")),
        None if length is None else int(length),
    )
