"""The `ort` lowering: ONNX Runtime's own operators, each several of ONNX's in one kernel. ONNX Runtime only, from 1.23.

GroupQueryAttention rotates, writes the cache in place (its outputs are bound to its inputs' memory) and attends over
the positions in use, however large the cache; SkipLayerNormalization adds and norms; MatMulNBits
(merino_edge.export.linear) multiplies by int8 and int4 codes and adds the bias. Keys and values may be kept as int8
codes with a scale per channel, which attention multiplies by as they are; that needs a newer ONNX Runtime.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from merino_edge.architecture import Block
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import LAST, GraphBuilder
from merino_edge.export.linear import MICROSOFT

WANTED = "wanted"  # the input that says of how many of the last positions the logits leave
ROTATED_TOGETHER = 16  # numbers of a head
FIRST_SCALE = 12  # of GroupQueryAttention's inputs: the keys' scales [Hkv * D], and then the values'
CODED: dict[str, Any] = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}


class OrtBuilder(GraphBuilder):
    """See merino_edge.export.graph."""

    rows = "N"

    def last_positions(self, x: ir.Value) -> ir.Value:
        wanted = ir.val(WANTED, ir.DataType.INT64, [1])
        self.asked.append(wanted)
        return self.op("Slice", x, self.op("Neg", wanted), self.shape(LAST), self.shape(1))

    def prepare(self, caches: Sequence[ir.Value]) -> None:
        last = self.slice(self.positions, 1, -1)  # [1, 1]
        last = self.op("Cast", self.op("Reshape", last, self.shape(1)), to=ir.DataType.INT32.value)
        self.last_position = last  # int32 [1]
        self.length = self.op("Add", last, self.constant("one", np.array([1], np.int32)))  # int32 [1]

    def attend(self, packed: ir.Value, block: Block, cache: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        inputs = [packed, None, None, *cache, self.last_position, self.length]
        rotary = self.a.positions == "rotary"
        if rotary:
            if self.a.rotary_dim % ROTATED_TOGETHER:
                raise UnsupportedError(
                    f"ONNX Runtime's attention rotates multiples of {ROTATED_TOGETHER}, not {self.a.rotary_dim}",
                    "export with --lowering native",
                )
            inputs += [self.computed(f"rotary.{n}", t) for n, t in zip(("cos", "sin"), self.angles(), strict=True)]
        attributes: dict[str, Any] = {"num_heads": block.heads, "kv_num_heads": block.kv_heads, "scale": 1.0}
        attributes["do_rotary"] = int(rotary)
        if self.target.cache_in_int8:
            scales = [self.constant(f"{c.name}.scale", self.stored.cache_scales[str(c.name)].ravel()) for c in cache]
            inputs += [*[None] * (FIRST_SCALE - len(inputs)), *scales]
            attributes |= CODED
        y = ir.Value()
        outputs = [y, *(self.output(past, block, self.capacity) for past in cache)]
        self.tape.op_multi_out("GroupQueryAttention", inputs, attributes, outputs=outputs, domain=MICROSOFT)
        return y, outputs[1:]

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
