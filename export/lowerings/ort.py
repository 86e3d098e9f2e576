"""The `ort` lowering: ONNX Runtime's own operators, each several of ONNX's in one kernel. ONNX Runtime only, from 1.23.

GroupQueryAttention rotates, writes the cache in place (its outputs are bound to its inputs' memory) and attends over
the positions in use, however large the cache; SkipLayerNormalization adds and norms; MatMulNBits
(merino_edge.export.lowerings.weight_writer) multiplies by int8 and int4 codes and adds the bias. Keys and values may be kept as int8
codes with one scale each (merino_edge.export.quantization.smoothing), which attention multiplies by as they are; that needs a newer
ONNX Runtime, whose kernel takes row by row. So a step of more than a few tokens makes floats of the codes, attends as
over a float cache, and writes the new codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from merino_edge.architecture import Block
from merino_edge.errors import UnsupportedError
from merino_edge.export.lowerings.builder import LAST, GraphBuilder
from merino_edge.export.lowerings.weight_writer import MICROSOFT
from merino_edge.graph_io import NUM_LOGITS

ROTATED_TOGETHER = 16  # numbers of a head
FIRST_SCALE = 12  # of GroupQueryAttention's inputs: the keys' scale, and then the values'
MAX_INT8_ATTENTION_TOKENS = 8  # tokens of a step, as many as a guess and the one before it are, for which codes are as fast as floats
INT8 = ir.DataType.INT8.value
CODED: dict[str, Any] = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}


def fresh() -> list[ir.Value]:
    """For what attention gives: the attended heads, keys and values."""
    return [ir.Value() for _ in range(3)]


class OrtBuilder(GraphBuilder):
    """See merino_edge.export.graph."""

    rows = "N"

    def last_positions(self, x: ir.Value) -> ir.Value:
        wanted = ir.val(NUM_LOGITS, ir.DataType.INT64, [1])
        self.asked.append(wanted)
        return self.op("Slice", x, self.op("Neg", wanted), self.shape(LAST), self.shape(1))

    def prepare(self, caches: Sequence[ir.Value]) -> None:
        last = self.slice(self.positions, 1, -1)  # [1, 1]
        last = self.op("Cast", self.op("Reshape", last, self.shape(1)), to=ir.DataType.INT32.value)
        self.last_position = last  # int32 [1]
        self.length = self.op("Add", last, self.constant("one", np.array([1], np.int32)))  # int32 [1]
        self.rotation: list[ir.Value] = []  # cosines and sines [C, R / 2]
        if self.a.positions == "rotary":
            if self.a.rotary_dim % ROTATED_TOGETHER:
                raise UnsupportedError(
                    f"ONNX Runtime's attention rotates multiples of {ROTATED_TOGETHER}, not {self.a.rotary_dim}",
                    "export with --lowering native",
                )
            self.rotation = [
                self.computed(f"rotary.{n}", t) for n, t in zip(("cos", "sin"), self.angles(), strict=True)
            ]
        if self.target.int8_cache:
            self.own_places = self.op("Reshape", self.positions, self.shape(-1))  # int64 [T]
            self.start = self.slice(self.own_places, 0, 0, 1)  # int64 [1]
            tokens = self.op("Squeeze", self.op("Shape", self.tokens, start=1))  # int64 []
            self.many = self.op("Greater", tokens, self.constant("few", np.array(MAX_INT8_ATTENTION_TOKENS, np.int64)))  # bool []

    def attend(self, packed: ir.Value, block: Block, cache: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        outputs = [ir.Value(), *(self.output(past, block, self.capacity) for past in cache)]
        if self.target.int8_cache:
            scales = [self.constant(f"{c.name}.scale", self.stored.cache_scales[str(c.name)]) for c in cache]
            branches = {
                "then_branch": self.branch("many", lambda: self.attend_to_floats(packed, block, cache, scales)),
                "else_branch": self.branch("few", lambda: self.query(packed, block, cache, fresh(), scales)),
            }
            self.tape.op_multi_out("If", [self.many], branches, outputs=outputs)
        else:
            self.query(packed, block, cache, outputs)
        return outputs[0], outputs[1:]

    def attend_to_floats(
        self, packed: ir.Value, block: Block, cache: Sequence[ir.Value], scales: Sequence[ir.Value]
    ) -> Sequence[ir.Value]:
        """As `query` over codes, but of them only the step's own are made: what it attends to are floats."""
        floats = [
            self.op("DequantizeLinear", self.op("Slice", codes, self.shape(0), self.start, self.shape(2)), scale)
            for codes, scale in zip(cache, scales, strict=True)
        ]
        y, *longer = self.query(packed, block, floats, fresh())
        outputs = [y]
        for codes, whole, scale in zip(cache, longer, scales, strict=True):
            # Through a Slice ONNX Runtime would move the rounding, and round everything.
            own = self.op("Gather", whole, self.own_places, axis=2)
            rounded = self.op("QuantizeLinear", own, scale, output_dtype=INT8)
            outputs.append(self.op("TensorScatter", codes, rounded, self.start, axis=2))
        return outputs

    def query(
        self,
        packed: ir.Value,
        block: Block,
        cache: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        scales: Sequence[ir.Value] = (),
    ) -> Sequence[ir.Value]:
        """GroupQueryAttention over a cache of floats, or of codes where there are scales."""
        inputs = [packed, None, None, *cache, self.last_position, self.length, *self.rotation]
        attributes: dict[str, Any] = {"num_heads": block.heads, "kv_num_heads": block.kv_heads, "scale": 1.0}
        attributes["do_rotary"] = int(bool(self.rotation))
        if scales:
            inputs += [*[None] * (FIRST_SCALE - len(inputs)), *scales]
            attributes |= CODED
        return self.tape.op_multi_out("GroupQueryAttention", inputs, attributes, outputs=outputs, domain=MICROSOFT)

    def branch(self, name: str, write: Callable[[], Sequence[ir.Value]]) -> ir.Graph:
        """What `write` writes, as a graph inside this one, whose outputs it returns."""
        around, self.tape = self.tape, Tape()
        try:
            outputs, nodes = write(), self.tape.nodes
        finally:
            self.tape = around
        name = f"{name}.{self.layer}"
        for place, value in enumerate(value for node in nodes for value in node.outputs):
            value.name = f"{name}.{place}"  # no other's in the whole model
        return ir.Graph([], outputs, nodes=nodes, name=name)

    def rms_norm(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        return self.op("SimplifiedLayerNormalization", x, scale, epsilon=self.a.norm_epsilon, axis=-1)

    def add_norm(self, x: ir.Value, y: ir.Value | None, name: str) -> tuple[ir.Value, ir.Value]:
        if y is None:
            return x, self.norm(x, name)
        kind = "SkipSimplifiedLayerNormalization" if self.a.norm == "rmsnorm" else "SkipLayerNormalization"
        inputs = [x, y, *self.norm_weights(name)]
        normed, _, _, total = self.tape.op_multi_out(
            kind, inputs, {"epsilon": self.a.norm_epsilon}, num_outputs=4, domain=MICROSOFT
        )
        return total, normed

    def swish(self, x: ir.Value) -> ir.Value:
        return self.op("QuickGelu", x, domain=MICROSOFT, alpha=1.0)

    def gelu(self, x: ir.Value, tanh: bool) -> ir.Value:
        return self.op("FastGelu" if tanh else "Gelu", x, domain=MICROSOFT)
