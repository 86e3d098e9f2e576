"""The reader of ONNX files: what it takes, every other reader takes alike, and export's graphs are taken."""

from __future__ import annotations

import random
from pathlib import Path

import onnx
import pytest
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError

from helpers.architectures import LATER_PARTS
from merino_edge import bundle, onnx_graph
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError
from merino_edge.export.graph import build_stored, save
from merino_edge.export.quantization.stored_weights import random_stored
from merino_edge.export.targets import PLATFORMS, Target

BLOCKS = (Block(64, 1, 2, 1, 96), Block(128, 2, 4, 2, 160, shared=True))
LLAMA = Architecture(
    300, 48, 64, 32, BLOCKS, norm="rmsnorm", ffn="swiglu", positions="rotary", rotary_dim=16, bias="none"
)
GPT = Architecture(300, 48, 64, 32, BLOCKS, norm="layernorm", ffn="gelu", tied_head=False)
TANH = Architecture(300, 48, 64, 32, BLOCKS, norm="layernorm", ffn="gelu_tanh", norm_placement="post")
RELU = Architecture(300, 48, 64, 32, BLOCKS, norm="rmsnorm", ffn="relu", parallel_residual=True)
TARGETS = [
    (name, precision, lowering)
    for name, platform in PLATFORMS.items()
    for precision in platform.precisions
    for lowering in platform.lowerings_at(precision)
]
LAMB = bundle.PACKAGED / "lamb" / "model.onnx"
KINDS = {FieldDescriptor.TYPE_FLOAT: "f", FieldDescriptor.TYPE_DOUBLE: "d", FieldDescriptor.TYPE_MESSAGE: "s"}
KINDS |= {FieldDescriptor.TYPE_STRING: "s", FieldDescriptor.TYPE_BYTES: "s"}


@pytest.mark.parametrize(
    "message",
    ["Model", "Graph", "Node", "Attribute", "Tensor", "SparseTensor", "TrainingInfo", "Function", "StringStringEntry"],
)
def test_its_table_is_the_one_of_onnx(message: str) -> None:
    ours = {"SparseTensor": "Sparse", "TrainingInfo": "Training", "StringStringEntry": "Entry"}
    descriptor: Descriptor = getattr(onnx, f"{message}Proto").DESCRIPTOR
    table = onnx_graph.MESSAGES[ours.get(message, message)]
    assert set(table) == set(descriptor.fields_by_number)
    for number, field in descriptor.fields_by_number.items():
        kind, repeated = table[number]
        assert repeated == (field.is_repeated if hasattr(field, "is_repeated") else field.label == field.LABEL_REPEATED)
        if kind in onnx_graph.MESSAGES:
            name = field.message_type.name.removesuffix("Proto")
            assert kind == ours.get(name, name)
        else:
            assert kind == KINDS.get(field.type, "v")
            assert field.message_type is None or not holds_tensors(field.message_type)


def holds_tensors(descriptor: Descriptor) -> bool:
    """Whether a tensor or an operator can be in a message, however deep."""
    seen, waiting = set[str](), [descriptor]
    while waiting:
        message = waiting.pop()
        if message.name in ("TensorProto", "NodeProto"):
            return True
        if message.name not in seen:
            seen.add(message.name)
            waiting += [field.message_type for field in message.fields if field.message_type is not None]
    return False


@pytest.mark.parametrize("a", [LLAMA, GPT, TANH, RELU, LATER_PARTS], ids=["llama", "gpt", "tanh", "relu", "later"])
def test_the_graphs_of_every_target_are_taken(a: Architecture, tmp_path: Path) -> None:
    used = set[str]()
    for name, precision, lowering in TARGETS:
        target, graph = Target.named(name, precision, lowering), tmp_path / "model.onnx"
        save(build_stored(a, random_stored(a, target), target, 48), graph)
        found = onnx_graph.read(graph)
        assert {tensor.location for tensor in found.external} == {bundle.WEIGHTS}
        assert found.external == places(onnx.load(graph, load_external_data=False))
        used |= found.operators
        (tmp_path / bundle.WEIGHTS).unlink()
    assert used <= onnx_graph.OPERATORS, used - onnx_graph.OPERATORS


def places(message: object) -> set[onnx_graph.ExternalTensor]:
    """The external tensors anywhere in a message, by protobuf's own reader."""
    if isinstance(message, onnx.TensorProto):
        if not message.external_data and message.data_location != onnx.TensorProto.EXTERNAL:
            return set()
        entries = {entry.key: entry.value for entry in message.external_data}
        length = entries.get("length")
        place = (entries["location"], int(entries.get("offset", 0)), None if length is None else int(length))
        return {onnx_graph.ExternalTensor(*place)}
    found = set[onnx_graph.ExternalTensor]()
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        if field.message_type is not None:
            for inner in value if hasattr(value, "__len__") and not hasattr(value, "ListFields") else [value]:
                found |= places(inner)
    return found


def operators(message: object) -> set[str]:
    """The operators anywhere in a message, by protobuf's own reader."""
    found = set[str]()
    if isinstance(message, onnx.NodeProto):
        plain = message.domain in ("", "ai.onnx")
        found.add(message.op_type if plain else f"{message.domain}.{message.op_type}")
    for field, value in message.ListFields():  # type: ignore[attr-defined]
        if field.message_type is not None:
            for inner in value if hasattr(value, "__len__") and not hasattr(value, "ListFields") else [value]:
                found |= operators(inner)
    return found


def test_what_it_takes_of_a_changed_graph_is_what_another_reader_takes(tmp_path: Path) -> None:
    """Bytes are changed, put in, taken out and repeated at random. Whatever is not refused reads alike."""
    whole, rng, taken = LAMB.read_bytes(), random.Random(5), 0
    first, graph = whole.index(b"location") - 1000, tmp_path / "model.onnx"
    for _ in range(400):
        data = bytearray(whole)
        for _ in range(rng.randint(1, 3)):
            at, size = rng.randrange(first, len(data) - 40), rng.randint(1, 30)
            kind = rng.randrange(4)
            if kind == 0:
                data[at] = rng.randrange(256)
            elif kind == 1:
                del data[at : at + size]
            elif kind == 2:
                data[at:at] = data[at : at + size]
            else:
                data[at] ^= 1 << rng.randrange(8)
        graph.write_bytes(data)
        try:
            found = onnx_graph.read(graph)
        except ArtefactError:
            continue
        taken += 1
        try:
            model = onnx.ModelProto.FromString(bytes(data))
        except DecodeError:
            continue
        assert places(model) == found.external and operators(model) == found.operators
    assert taken > 50


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "no version, graph or operator set"),
        (b"\x08", "cut off"),
        (b"\x08\x0b\x3a\x00", "no version, graph or operator set"),
        (b"\x08\x8b\x00\x3a\x00\x42\x00", "longer than it need be"),
        (b"\x08" + b"\xff" * 10 + b"\x01", "too large"),
        (b"\x08\x0b\x3a\x00\x42\x00\x3a\x00", "field 7 twice"),
        (b"\x08\x0b\x3a\x00\x42\x00\x98\x06\x00", "unknown field 99"),
        (b"\x08\x0b\x3a\x05\x42\x00", "ends within its field 7"),
        (b"\x08\x0b\x38\x05\x42\x00", "another type in its field 7"),
        (b"\x08\x0b\x3a\x00\x42\x00\x00\x00", "unknown field 0"),
        (b"\x08\x0b\x3b\x3c\x42\x00", "another type"),
    ],
)
def test_another_spelling_is_refused_with_its_reason(tmp_path: Path, data: bytes, said: str) -> None:
    graph = tmp_path / "model.onnx"
    graph.write_bytes(data)
    with pytest.raises(ArtefactError, match=said):
        onnx_graph.read(graph)


def test_graphs_in_graphs_have_an_end(tmp_path: Path) -> None:
    inner = b""
    for _ in range(120):  # an attribute with a graph, in a node, in a graph
        attribute = onnx_piece(6, inner)
        inner = onnx_piece(1, onnx_piece(5, attribute))
    graph = tmp_path / "model.onnx"
    graph.write_bytes(b"\x08\x0b" + onnx_piece(7, inner) + b"\x42\x00")
    with pytest.raises(ArtefactError, match="more than 100 deep"):
        onnx_graph.read(graph)


def onnx_piece(number: int, content: bytes) -> bytes:
    size, spelled = len(content), bytearray([number << 3 | 2])
    while size > 127:
        spelled.append(size & 127 | 128)
        size >>= 7
    return bytes(spelled) + bytes([size]) + content
