"""An `ort` graph for a step of several sequences, made from a bundle's graph of one when it is loaded.

The weights stay where they are. The first axis of the inputs becomes free: one row for each sequence, with a length of
its own. Three things in the graph hold for one sequence only. The positions in use, which attention takes beside the
last position of each row, become an input: those of the longest row. The last positions get the shape [-1] for [1].
Other shapes [1, -1, ..] become [0, -1, ..], which keeps the axis.

No ONNX library is needed. `merino_edge.onnx_graph` has the messages, and has read the file before. Whoever uses the
result compares it with the graph of one (merino_edge.runtime.engines.onnx_sequences).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

LONGEST = "longest"  # the new input int32 [1]: positions in use of the longest sequence, with the step's own
FLAT = "shape.flat"  # the new constant [-1]
ROWS = b"B"  # name of the free axis
ATTENTION = "GroupQueryAttention"
LAST_POSITION, LENGTH = 5, 6  # indices among its inputs
VARINT, EIGHT_BYTES, PIECE, FOUR_BYTES = 0, 1, 2, 5  # protobuf's wire types
GRAPH, NODE, INITIALIZER, INPUT, OUTPUT, HINT = 7, 1, 5, 11, 12, 13  # fields of Model and of Graph
NODE_INPUT, NODE_OUTPUT, OPERATOR, ATTRIBUTE, SUBGRAPH = 1, 2, 4, 5, 6  # fields of Node and of Attribute
INT32, INT64 = 6, 7  # types of tensors

Field = tuple[int, int, bytes]  # number, wire type, content; of numbers their own bytes


def batched(model: bytes) -> bytes | None:
    """The serialized graph with a free first axis, or None where it is not one that takes several sequences."""
    fields = list(_fields(model))
    graphs = [_graph(content) for number, _, content in fields if number == GRAPH]
    if len(graphs) != 1 or graphs[0] is None:
        return None
    return _joined((n, wire, graphs[0] if n == GRAPH else content) for n, wire, content in fields)


def _graph(content: bytes) -> bytes | None:
    fields = [entry for entry in _fields(content) if entry[0] != HINT]
    nodes = {i: _Node(entry) for i, (number, _, entry) in enumerate(fields) if number == NODE}
    attention = [n for node in nodes.values() for n in node.with_subgraphs() if n.operator == ATTENTION]
    made_by = {name: i for i, node in nodes.items() for name in node.outputs}
    pairs = {(made_by.get(n.inputs[LAST_POSITION]), made_by.get(n.inputs[LENGTH])) for n in attention}
    last, length = pairs.pop() if len(pairs) == 1 else (None, None)
    flat = None if last is None else made_by.get(nodes[last].inputs[0])  # the last position is a cast of a reshape
    if length is None or flat is None or nodes[flat].operator != "Reshape":
        return None
    fields[flat] = (NODE, PIECE, nodes[flat].with_input(1, FLAT))
    same = [(NODE_INPUT, LONGEST), *((NODE_OUTPUT, name) for name in nodes[length].outputs), (OPERATOR, "Identity")]
    fields[length] = (NODE, PIECE, _joined((number, PIECE, text.encode()) for number, text in same))
    shapes = {node.inputs[1] for i, node in nodes.items() if node.operator == "Reshape" and i != flat}
    for i, (number, wire, entry) in enumerate(fields):
        if number in (INPUT, OUTPUT):
            fields[i] = (number, wire, _freed(entry))
        elif number == INITIALIZER and _text(entry, 8) in shapes:
            fields[i] = (number, wire, _with_kept_axis(entry))
    one = _joined([(1, PIECE, _joined([(1, VARINT, b"\1")]))])
    tensor = _joined([(1, PIECE, _joined([(1, VARINT, bytes([INT32])), (2, PIECE, one)]))])
    longest = _joined([(1, PIECE, LONGEST.encode()), (2, PIECE, tensor)])
    return _joined([*fields, (INITIALIZER, PIECE, _constant(FLAT, [-1])), (INPUT, PIECE, longest)])


class _Node:
    """An operator: its fields, and what is looked at."""

    def __init__(self, data: bytes) -> None:
        self._fields = list(_fields(data))
        self.inputs = [content.decode() for number, _, content in self._fields if number == NODE_INPUT]
        self.outputs = [content.decode() for number, _, content in self._fields if number == NODE_OUTPUT]
        self.operator = _text(data, OPERATOR)

    def with_subgraphs(self) -> Iterator[_Node]:
        """This node, and the nodes in the branches of an If."""
        yield self
        for attribute in (content for number, _, content in self._fields if number == ATTRIBUTE):
            for graph in (content for number, _, content in _fields(attribute) if number == SUBGRAPH):
                for node in (content for number, _, content in _fields(graph) if number == NODE):
                    yield from _Node(node).with_subgraphs()

    def with_input(self, index: int, name: str) -> bytes:
        """The operator with another input."""
        places = [i for i, (number, _, _) in enumerate(self._fields) if number == NODE_INPUT]
        changed = list(self._fields)
        changed[places[index]] = (NODE_INPUT, PIECE, name.encode())
        return _joined(changed)


def _freed(value: bytes) -> bytes:
    """An input or output of the graph whose first axis is free, where it is 1 of at least two."""
    fields = list(_fields(value))
    tensor = list(_fields(_piece(_piece(value, 2), 1)))
    axes = [axis for number, _, shape in tensor if number == 2 for _, _, axis in _fields(shape)]
    if len(axes) < 2 or axes[0] != _joined([(1, VARINT, b"\1")]):
        return value
    axes[0] = _joined([(2, PIECE, ROWS)])
    shape = _joined((1, PIECE, axis) for axis in axes)
    tensor = [(number, wire, shape if number == 2 else content) for number, wire, content in tensor]
    changed = _joined([(1, PIECE, _joined(tensor))])
    return _joined((number, wire, changed if number == 2 else content) for number, wire, content in fields)


def _with_kept_axis(tensor: bytes) -> bytes:
    """The constant shape with 0 in place of 1, where it is [1, -1, ..]."""
    sizes = np.frombuffer(_piece(tensor, 9), "<i8").tolist()
    return _constant(_text(tensor, 8), [0, *sizes[1:]]) if len(sizes) > 2 and sizes[:2] == [1, -1] else tensor


def _constant(name: str, values: list[int]) -> bytes:
    """A tensor int64 of one axis."""
    raw = np.array(values, "<i8").tobytes()
    of_numbers = [(1, VARINT, bytes([len(values)])), (2, VARINT, bytes([INT64]))]
    return _joined([*of_numbers, (8, PIECE, name.encode()), (9, PIECE, raw)])


def _text(message: bytes, number: int) -> str:
    return _piece(message, number).decode()


def _piece(message: bytes, number: int) -> bytes:
    return next((content for n, _, content in _fields(message) if n == number), b"")


def _fields(message: bytes) -> Iterator[Field]:
    at, end = 0, len(message)
    while at < end:
        tag, at = _number(message, at)
        wire, first = tag & 7, at
        if wire == PIECE:
            size, first = _number(message, at)
            at = first + size
        elif wire == VARINT:
            _, at = _number(message, at)
        else:
            at += 8 if wire == EIGHT_BYTES else 4
        yield tag >> 3, wire, message[first:at]


def _joined(fields: Iterable[Field]) -> bytes:
    parts = []
    for number, wire, content in fields:
        size = _varint(len(content)) if wire == PIECE else b""
        parts.append(_varint(number << 3 | wire) + size + content)
    return b"".join(parts)


def _number(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at, value, shift = at + 1, value | (byte & 127) << shift, shift + 7
        if byte < 128:
            return value, at


def _varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])
