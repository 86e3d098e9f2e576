"""The `primitive` lowering, opset 19 to 21: only operators that every TensorRT from 10.3 on parses.

It serves JetPack 6.x, 7.0 and 7.1, whose TensorRT has neither attention nor a cache update of its own, and fp32 on any
TensorRT. The cache is read only: new keys and values are outputs of the graph, and the runtime copies them into the
cache. Attention scores the cache and the new keys apart and joins the scores, so that no step copies a cache. The query
heads that share a key are rows of one product, so that no key is repeated.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from merino_edge.architecture import Block
from merino_edge.export.lowerings.builder import GraphBuilder
from merino_edge.graph_io import NEW_KV_PREFIX

MASKED = np.float32(-1e9)  # is added to a score that must not count, so that its exponential is 0


class PrimitiveBuilder(GraphBuilder):
    """See merino_edge.export.graph. G: the query heads that share a key/value head."""

    output_prefix = NEW_KV_PREFIX

    def prepare(self, caches: Sequence[ir.Value]) -> None:
        first = self.slice(self.positions, 1, 0, 1)  # [1, 1]
        columns = self.constant(f"cache_positions.{self.capacity}", np.arange(self.capacity, dtype=np.int64))
        zero, masked = (self.constant(n, np.array(v, np.float32)) for n, v in (("zero", 0), ("masked", MASKED)))
        self.past_bias = self.op("Where", self.op("Less", columns, first), zero, masked)  # [1, C]
        rows = self.op("Reshape", self.positions, self.shape(1, 1, -1, 1))
        ahead = self.op("LessOrEqual", self.op("Reshape", self.positions, self.shape(1, 1, 1, -1)), rows)
        new_bias = self.op("Where", ahead, zero, masked)  # [1, 1, T, T]
        groups = {block.heads // block.kv_heads for block in self.a.blocks}
        self.new_bias = {  # [1, 1, G * T, T]
            group: self.op("Concat", *[new_bias] * group, axis=2) if group > 1 else new_bias for group in sorted(groups)
        }
        if self.a.positions == "rotary":
            self.cos, self.sin = (self.rotation(n) for n in ("cos", "sin"))

    def rotation(self, name: str) -> ir.Value:
        """The factors [1, 1, T, D] of a head ("cos"), or of the head with its two halves exchanged ("sin")."""
        cos, sin = self.angles()
        rest = self.a.head_dim - self.a.rotary_dim
        table = np.hstack([cos, cos] if name == "cos" else [-sin, sin])
        table = np.pad(table, ((0, 0), (0, rest)), constant_values=1.0 if name == "cos" else 0.0)  # [C, D]
        rows = self.op("Gather", self.matrix_constant(f"rotation.{name}", table), self.positions)
        return self.op("Reshape", rows, self.shape(1, 1, -1, self.a.head_dim))

    def rotate(self, x: ir.Value) -> ir.Value:
        """x [1, H, T, D] rotated to its positions."""
        half, rest = self.a.rotary_dim // 2, self.a.head_dim - self.a.rotary_dim
        low, high, *unrotated = self.split(x, -1, half, half, *([rest] if rest else []))
        exchanged = self.op("Concat", high, low, *unrotated, axis=-1)
        return self.op("Add", self.op("Mul", x, self.cos), self.op("Mul", exchanged, self.sin))

    def attend(self, packed: ir.Value, block: Block, cache: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        d, group = self.a.head_dim, block.heads // block.kv_heads
        qk, v = self.split(packed, -1, (block.heads + block.kv_heads) * d, block.kv_heads * d)
        qk = self.to_heads(qk, block.heads + block.kv_heads)  # [1, H + Hkv, T, D]
        if self.a.positions == "rotary":
            qk = self.rotate(qk)
        q, k = self.split(qk, 1, block.heads, block.kv_heads)
        v = self.to_heads(v, block.kv_heads)
        q = self.op("Reshape", q, self.shape(1, block.kv_heads, -1, d))  # [1, Hkv, G * T, D]
        past, new = self.scores(q, cache[0], self.past_bias), self.scores(q, k, self.new_bias[group])
        shares = self.op("Softmax", self.op("Concat", past, new, axis=-1), axis=-1)  # [1, Hkv, G * T, C + T]
        past_shares, new_shares = self.slice(shares, 3, 0, self.capacity), self.slice(shares, 3, self.capacity)
        y = self.op(
            "Add",
            self.op("MatMul", self.cast(past_shares, self.matrix_dtype), cache[1]),
            self.op("MatMul", self.cast(new_shares, self.matrix_dtype), v),
        )
        y = self.op("Reshape", y, self.shape(1, block.heads, -1, d))  # [1, H, T, D]
        new_kv = [self.new_kv(past, new, block) for past, new in zip(cache, (k, v), strict=True)]
        return self.from_heads(y, block.width), new_kv

    def scores(self, q: ir.Value, k: ir.Value, bias: ir.Value) -> ir.Value:
        """Scores [1, Hkv, G * T, S] float32 of q [1, Hkv, G * T, D] and k [1, Hkv, S, D], with `bias` added."""
        product = self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2]))
        return self.op("Add", self.cast(product, ir.DataType.FLOAT), bias)

    def new_kv(self, past: ir.Value, new: ir.Value, block: Block) -> ir.Value:
        """The graph's output for the cache `past`: the new keys or values [1, Hkv, T, D]."""
        return self.tape.op("Identity", [new], output=self.output(past, block, "T"))

    def rms_norm(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        square = self.op("Mul", x, x)
        mean = self.op("ReduceMean", square, self.shape(-1), keepdims=1)
        epsilon = self.constant("epsilon", np.array(self.a.norm_epsilon, np.float32))
        root = self.op("Sqrt", self.op("Add", mean, epsilon))
        return self.op("Mul", self.op("Div", x, root), scale)

    def gelu(self, x: ir.Value, *, tanh: bool) -> ir.Value:
        # In float32, since the cube may overflow float16.
        x32 = self.cast(x, ir.DataType.FLOAT)
        half, one = (self.constant(n, np.array(v, np.float32)) for n, v in (("half", 0.5), ("unit", 1.0)))
        if tanh:
            cubed, root = (
                self.constant(n, np.array(v, np.float32))
                for n, v in (("cubed", 0.044715), ("root", math.sqrt(2 / math.pi)))
            )
            cube = self.op("Mul", self.op("Mul", self.op("Mul", x32, x32), x32), cubed)
            inner = self.op("Tanh", self.op("Mul", self.op("Add", x32, cube), root))
        else:
            root = self.constant("sqrt_half", np.array(math.sqrt(0.5), np.float32))
            inner = self.op("Erf", self.op("Mul", x32, root))
        y = self.op("Mul", self.op("Mul", x32, half), self.op("Add", inner, one))
        return self.cast(y, self.matrix_dtype)
