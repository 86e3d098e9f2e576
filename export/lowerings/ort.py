"""The `ort` lowering: ONNX Runtime's own operators, each one kernel for several of ONNX's. ONNX Runtime from 1.23.

GroupQueryAttention rotates, writes the cache in place (its outputs are bound to its inputs' memory) and attends. It
reads only the positions in use, however large the cache is. SkipLayerNormalization adds and norms. MatMulNBits
(merino_edge.export.lowerings.weight_writer) multiplies by int8 and int4 codes and adds the bias.

An int8 KV cache has one scale for a layer's keys and one for its values. Attention multiplies by the codes as they are,
which needs a newer ONNX Runtime, but its kernel takes one query row after the other. So a step of more tokens
dequantises the cache, attends as over a float cache, and writes the new codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from merino_edge.architecture import Block
from merino_edge.export.lowerings.builder import LAST, GraphBuilder
from merino_edge.export.lowerings.weight_writer import MICROSOFT
from merino_edge.graph_io import NUM_LOGITS

FIRST_SCALE_INPUT = 12  # index among GroupQueryAttention's inputs: the keys' scale, then the values'
# Most tokens of a step for which attention over codes is as fast as over floats. Draft tokens and the token before them
# are as many at most.
MAX_INT8_ATTENTION_TOKENS = 8
INT8 = ir.DataType.INT8.value
INT8_CACHE: dict[str, Any] = {"k_quant_type": "PER_TENSOR", "v_quant_type": "PER_TENSOR", "kv_cache_bit_width": 8}


def attention_outputs() -> list[ir.Value]:
    """New values for the outputs of attention: the attended heads, keys and values."""
    return [ir.Value() for _ in range(3)]


class OrtBuilder(GraphBuilder):
    """See merino_edge.export.graph."""

    def wanted_positions(self, x: ir.Value) -> ir.Value:
        num_logits = ir.val(NUM_LOGITS, ir.DataType.INT64, [1])
        self.extra_inputs.append(num_logits)
        return self.op("Slice", x, self.op("Neg", num_logits), self.shape(LAST), self.shape(1))

    def prepare(self, caches: Sequence[ir.Value]) -> None:
        last = self.slice(self.positions, 1, -1)  # [1, 1]
        last = self.op("Cast", self.op("Reshape", last, self.shape(1)), to=ir.DataType.INT32.value)
        self.last_position = last  # int32 [1]
        self.length = self.op("Add", last, self.constant("one", np.array([1], np.int32)))  # int32 [1]
        self.rotations: dict[str, list[ir.Value]] = {}  # cosines and sines [C, R / 2] by the kind of rotary
        for kind in self.a.rotaries:
            prefix = "rotary" if kind == "global" else f"rotary.{kind}"
            self.rotations[kind] = [
                self.matrix_constant(f"{prefix}.{n}", t) for n, t in zip(("cos", "sin"), self.angles(kind), strict=True)
            ]
        if self.target.int8_cache:
            self.step_positions = self.op("Reshape", self.positions, self.shape(-1))  # int64 [T]
            self.start = self.slice(self.step_positions, 0, 0, 1)  # int64 [1]
            tokens = self.op("Squeeze", self.op("Shape", self.tokens, start=1))  # int64 []
            self.is_long_step = self.op(
                "Greater", tokens, self.constant("few", np.array(MAX_INT8_ATTENTION_TOKENS, np.int64))
            )  # bool []

    def attend(self, packed: ir.Value, block: Block, cache: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        outputs = [ir.Value(), *(self.output(past, block, self.capacity_dim) for past in cache)]
        if self.target.int8_cache:
            scales = [self.constant(f"{c.name}.scale", self.stored.cache_scales[str(c.name)]) for c in cache]
            branches = {
                "then_branch": self.branch("many", lambda: self.attend_dequantized(packed, block, cache, scales)),
                "else_branch": self.branch(
                    "few", lambda: self.group_query_attention(packed, block, cache, attention_outputs(), scales)
                ),
            }
            self.tape.op_multi_out("If", [self.is_long_step], branches, outputs=outputs)
        else:
            self.group_query_attention(packed, block, cache, outputs)
        return outputs[0], outputs[1:]

    def attend_dequantized(
        self, packed: ir.Value, block: Block, cache: Sequence[ir.Value], scales: Sequence[ir.Value]
    ) -> Sequence[ir.Value]:
        """`group_query_attention` over a dequantised int8 cache; only the step's own positions are quantised again."""
        floats = [
            self.op("DequantizeLinear", self.op("Slice", codes, self.shape(0), self.start, self.shape(2)), scale)
            for codes, scale in zip(cache, scales, strict=True)
        ]
        y, *caches_after = self.group_query_attention(packed, block, floats, attention_outputs())
        outputs = [y]
        for codes, floats_after, scale in zip(cache, caches_after, scales, strict=True):
            # A Gather, since ONNX Runtime would move the rounding before a Slice and so round everything.
            step_floats = self.op("Gather", floats_after, self.step_positions, axis=2)
            step_codes = self.op("QuantizeLinear", step_floats, scale, output_dtype=INT8)
            outputs.append(self.op("TensorScatter", codes, step_codes, self.start, axis=2))
        return outputs

    def group_query_attention(
        self,
        packed: ir.Value,
        block: Block,
        cache: Sequence[ir.Value],
        outputs: Sequence[ir.Value],
        scales: Sequence[ir.Value] = (),
    ) -> Sequence[ir.Value]:
        """GroupQueryAttention over a float cache, or over an int8 cache where `scales` are given."""
        rotation = self.rotations.get(block.rotary, [])
        inputs = [packed, None, None, *cache, self.last_position, self.length, *rotation]
        attributes: dict[str, Any] = {"num_heads": block.heads, "kv_num_heads": block.kv_heads, "scale": 1.0}
        attributes["do_rotary"] = int(bool(rotation))
        if window := self.window(block):
            attributes["local_window_size"] = window
        if self.a.attention_cap:
            attributes["softcap"] = self.a.attention_cap
        if scales:
            inputs += [*[None] * (FIRST_SCALE_INPUT - len(inputs)), *scales]
            attributes |= INT8_CACHE
        return self.tape.op_multi_out("GroupQueryAttention", inputs, attributes, outputs=outputs, domain=MICROSOFT)

    def branch(self, name: str, write: Callable[[], Sequence[ir.Value]]) -> ir.Graph:
        """A branch of an If: a subgraph of the operators that `write` adds, with the outputs that it returns."""
        outer_tape, self.tape = self.tape, Tape()
        try:
            outputs, nodes = write(), self.tape.nodes
        finally:
            self.tape = outer_tape
        name = f"{name}.{self.layer}"
        for index, value in enumerate(value for node in nodes for value in node.outputs):
            value.name = f"{name}.{index}"  # unique in the whole model
        return ir.Graph([], outputs, nodes=nodes, name=name)

    def rms_norm(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        # ONNX Runtime has its RMS norm alone in ONNX's own domain, where onnx.checker and other readers know no such
        # operator. The norm of x + x is that of x if epsilon is four times as large; powers of two change no digit.
        inputs, epsilon = [x, x, scale], 4 * self.a.norm_epsilon
        return self.op("SkipSimplifiedLayerNormalization", *inputs, epsilon=epsilon, domain=MICROSOFT)

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

    def gelu(self, x: ir.Value, *, tanh: bool) -> ir.Value:
        return self.op("FastGelu" if tanh else "Gelu", x, domain=MICROSOFT)
