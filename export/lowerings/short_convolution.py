"""A gated short convolution in any lowering, by ONNX's own operators: a product for each tap, and their sum.

In: the state [1, K - 1, W], the gated inputs of the K - 1 positions before the step, zeros before the first. Out: the
gated inputs [1, T, W] of the step's own positions. The runtime keeps them and gives the last ones to the next step, so
that a step may go back. Both are float32, as is all between the two matrices.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from merino_edge.architecture import Block
from merino_edge.graph_io import GATED_PREFIX, STATE_PREFIX

if TYPE_CHECKING:
    from merino_edge.export.lowerings.builder import GraphBuilder


def state_input(layer: int, block: Block) -> ir.Value:
    """The graph's input for the state of a layer."""
    return ir.val(f"{STATE_PREFIX}{layer}", ir.DataType.FLOAT, [1, block.convolution - 1, block.width])


def write(b: GraphBuilder, x: ir.Value, block: Block, name: str, state: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The convolution `name` of x [1, T, W]: its result [1, T, W], and the output of gated inputs."""
    packed = b.cast(b.linear(b.cast(x, b.matrix_dtype), [f"{name}input"]), ir.DataType.FLOAT)
    before, after, inner = b.split(packed, -1, *[block.width] * 3)  # the gates before and behind the taps
    gated = ir.val(f"{GATED_PREFIX}{b.layer}", ir.DataType.FLOAT, [1, "T", block.width])
    b.tape.op("Mul", [before, inner], output=gated)
    y = b.op("Mul", after, _taps(b, b.op("Concat", state, gated, axis=1), block.convolution, f"{name}taps"))
    y = b.linear(b.cast(y, b.matrix_dtype), [f"{name}output"])
    return b.cast(y, ir.DataType.FLOAT), gated


def _taps(b: GraphBuilder, x: ir.Value, taps: int, name: str) -> ir.Value:
    """The causal convolution [1, T, W] of x [1, K - 1 + T, W], each channel by itself."""
    weight, total = b.stored.arrays[f"{name}.weight"], None
    for tap in range(taps):
        behind = taps - 1 - tap
        seen = b.slice(x, 1, tap, -behind) if behind else b.slice(x, 1, tap)  # [1, T, W]
        product = b.op("Mul", seen, b.constant(f"{name}.{tap}.weight", weight[:, tap].astype(np.float32)))
        total = product if total is None else b.op("Add", total, product)
    assert total is not None
    if (bias := b.stored.arrays.get(f"{name}.bias")) is not None:
        total = b.op("Add", total, b.constant(f"{name}.bias", bias.astype(np.float32)))
    return total
