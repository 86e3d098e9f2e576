"""The `native` lowering, opset 24: ONNX's own attention, rotation and cache update, one operator each.

It runs on TensorRT from 10.15 on, TensorRT for RTX, and ONNX Runtime from 1.25 on. TensorScatter updates the cache in
place if the runtime binds its output to its input's memory (TensorRT: KVCacheUpdate). Attention gets an explicit
boolean mask, because TensorRT aligned its causal flag to the upper left before version 11. It reads the whole cache.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from merino_edge.architecture import Block, Rotary
from merino_edge.export.lowerings.builder import MASKED, GraphBuilder


class NativeBuilder(GraphBuilder):
    """See merino_edge.export.graph."""

    def prepare(self, caches: Sequence[ir.Value]) -> None:
        rows = self.op("Reshape", self.positions, self.shape(1, 1, -1, 1))  # [1, 1, T, 1]
        first = self.slice(self.positions, 1, 0, 1)  # [1, 1]
        self.write_index = self.op("Reshape", first, self.shape(1))  # [1]
        columns = self.constant(f"cache_positions.{self.capacity}", np.arange(self.capacity, dtype=np.int64))
        if not self.target.static_cache:  # the runtime may bind a smaller cache
            capacity = self.op("Shape", caches[0], start=2, end=3)
            columns = self.op("Slice", columns, self.shape(0), capacity)
        # [1, 1, T, C] bool: a query sees the cache up to and including its own position.
        before = self.op("LessOrEqual", columns, rows)
        self.masks = {0: before}  # by window
        for window in self.windows:
            if window:
                inside = self.op("Greater", columns, self.op("Sub", rows, self.shape(window)))
                self.masks[window] = self.op("And", before, inside)

    def attend(self, packed: ir.Value, block: Block, cache: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        heads = [block.heads, block.kv_heads, block.kv_heads]
        split = self.split(packed, -1, *(count * self.a.head_dim for count in heads))
        q, k, v = (self.to_heads(part, count) for part, count in zip(split, heads, strict=True))  # [1, H, T, D]
        if block.rotary in self.a.rotaries:
            q, k = self.rotate(q, block.heads, block.rotary), self.rotate(k, block.kv_heads, block.rotary)
        updated = [self.write(past, new, block) for past, new in zip(cache, (k, v), strict=True)]
        mask = self.masks[self.window(block)]
        if self.a.attention_cap:
            y = self.capped_attention(q, updated[0], updated[1], mask, block)
        else:
            y = self.op("Attention", q, updated[0], updated[1], mask, scale=1.0)  # [1, H, T, D]
        return self.from_heads(y, block.heads * self.a.head_dim), updated

    def capped_attention(self, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value, block: Block) -> ir.Value:
        """Attention whose scores are capped [1, H, T, D], operator by operator.

        ONNX's own caps the masked scores too, which then count again.
        """
        group, d = block.heads // block.kv_heads, self.a.head_dim
        q = self.op("Reshape", q, self.shape(block.kv_heads, group, -1, d))  # [Hkv, G, T, D]
        k, v = (self.op("Transpose", part, perm=[1, 0, 2, 3]) for part in (k, v))  # [Hkv, 1, C, D]
        scores = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        scores = self.capped(self.cast(scores, ir.DataType.FLOAT), self.a.attention_cap)  # [Hkv, G, T, C]
        hidden = self.constant("masked", np.array(MASKED, np.float32))
        shares = self.op("Softmax", self.op("Where", mask, scores, hidden), axis=-1)
        y = self.op("MatMul", self.cast(shares, self.matrix_dtype), v)
        return self.op("Reshape", y, self.shape(1, block.heads, -1, d))

    def write(self, past: ir.Value, new: ir.Value, block: Block) -> ir.Value:
        """The cache `past` [1, Hkv, C, D] with `new` [1, Hkv, T, D] written at the step's positions."""
        inputs = [past, new, self.write_index]
        updated = self.output(past, block, self.capacity_dim)
        return self.tape.op("TensorScatter", inputs, {"axis": -2, "mode": "linear"}, output=updated)

    def rotate(self, x: ir.Value, heads: int, kind: Rotary) -> ir.Value:
        """x [1, H, T, D] rotated to its positions."""
        prefix = "rotary" if kind == "global" else f"rotary.{kind}"
        cos, sin = (
            self.matrix_constant(f"{prefix}.{n}", t) for n, t in zip(("cos", "sin"), self.angles(kind), strict=True)
        )
        partial: dict[str, Any] = {}
        if self.a.rotary_dim != self.a.head_dim:  # ONNX Runtime then asks for the heads, though x has them
            partial = {"rotary_embedding_dim": self.a.rotary_dim, "num_heads": heads}
        return self.op("RotaryEmbedding", x, cos, sin, self.positions, **partial)

    def rms_norm(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        return self.op("RMSNormalization", x, scale, epsilon=self.a.norm_epsilon, axis=-1)

    def gelu(self, x: ir.Value, *, tanh: bool) -> ir.Value:
        return self.op("Gelu", x, approximate="tanh" if tanh else "none")
