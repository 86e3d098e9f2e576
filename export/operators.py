"""Operators and element types that the ONNX parser of each TensorRT takes, with the release that brought them.

The tables come from onnx-tensorrt's `docs/operators.md` for 8.5, 8.6, 10.1, 10.14, 10.15, 10.16 and 11.1. TensorRT's
CHANGELOG fills in the releases between them. The table of 10.3 (JetPack 6.1 and 6.2) is not public: that
of 10.1 and the CHANGELOG up to 10.3 stand for it.
Only operators that some lowering writes are listed. Any other is refused as unknown rather than guessed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import onnx_ir as ir

from merino_edge.storage import Version

OLDEST: Version = (8, 5)  # or older: it is the first of the tables
NEVER: Version = (99, 0)

# The first TensorRT whose parser takes an operator of ONNX's own domain.
OPERATORS_SINCE: dict[str, Version] = {
    **dict.fromkeys(
        [
            "Add",
            "And",
            "Cast",
            "Concat",
            "ConstantOfShape",
            "DequantizeLinear",
            "Div",
            "Equal",
            "Erf",
            "Expand",
            "Gather",
            "Gemm",
            "Greater",
            "Identity",
            "Less",
            "LessOrEqual",
            "MatMul",
            "Mul",
            "Pad",
            "Pow",
            "Reciprocal",
            "ReduceMean",
            "ReduceSum",
            "Relu",
            "Reshape",
            "ScatterElements",
            "ScatterND",
            "Shape",
            "Sigmoid",
            "Slice",
            "Softmax",
            "Split",
            "Sqrt",
            "Sub",
            "Tanh",
            "Tile",
            "Transpose",
            "Trilu",
            "Unsqueeze",
            "Where",
        ],
        OLDEST,
    ),
    "LayerNormalization": (8, 6),
    "Gelu": (10, 0),
    "Attention": (10, 14),
    "RMSNormalization": (10, 15),
    "RotaryEmbedding": (10, 15),
    "TensorScatter": (10, 15),
    "Swish": (11, 0),
}

# The first TensorRT that has an element type, as a weight or between operators.
TYPES_SINCE: dict[ir.DataType, Version] = {
    **dict.fromkeys((ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.INT32, ir.DataType.BOOL), OLDEST),
    # 8.x reads INT64 too and casts it to INT32 with a warning; positions fit.
    **dict.fromkeys((ir.DataType.INT64, ir.DataType.INT8), OLDEST),
    ir.DataType.BFLOAT16: (9, 0),
    ir.DataType.INT4: (10, 0),
    ir.DataType.UINT8: NEVER,  # only as input or output of a network
}


@dataclass(frozen=True)
class Feature:
    """An operator or element type, and the first TensorRT whose parser takes it; None: no release does."""

    name: str
    since: Version | None

    def __str__(self) -> str:
        since = "no TensorRT has it" if self.since is None else f"from TensorRT {version_text(self.since)}"
        return f"{self.name} ({since})"


def version_text(version: Version) -> str:
    """(10, 15) -> "10.15"."""
    return ".".join(map(str, version))


def find_unsupported(model: ir.Model, tensorrt: Version) -> list[Feature]:
    """Every operator and element type of `model` that the parser of release `tensorrt` does not take, each once."""
    used = {**{_operator(node): None for node in model.graph}, **{_type(v): None for v in _typed_values(model)}}
    return [feature for feature in used if feature.since is None or feature.since > tensorrt]


def _operator(node: ir.Node) -> Feature:
    name = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    return Feature(name, None if node.domain else OPERATORS_SINCE.get(node.op_type))


def _type(value: ir.Value) -> Feature:
    assert value.dtype is not None
    since = TYPES_SINCE.get(value.dtype, NEVER)
    return Feature(value.dtype.name, None if since == NEVER else since)


def _typed_values(model: ir.Model) -> Iterator[ir.Value]:
    graph = model.graph
    for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()):
        if value.dtype is not None:
            yield value
