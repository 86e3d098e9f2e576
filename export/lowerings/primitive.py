"""The `primitive` lowering, opset 19 to 21: only operators that every TensorRT from 10.3 on parses.

It serves JetPack 6.x, 7.0 and 7.1, whose TensorRT has neither attention nor a cache update of its own, and fp32 on any
TensorRT. The cache is read only: new keys and values are outputs of the graph, and the runtime copies them into the
cache. Attention scores the cache and the new keys apart and joins the scores, so that no step copies a cache. The query
heads that share a key are rows of one product, so that no key is repeated.

For TensorRT the cache of a layer with a window is a ring of its window and `SLACK` positions (merino_edge.cache_rings).
Row j then holds the newest position before the step whose remainder is j; the window hides what is older.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from merino_edge.architecture import Block, Rotary
from merino_edge.export.lowerings.builder import MASKED, GraphBuilder
from merino_edge.graph_io import NEW_KV_PREFIX


class PrimitiveBuilder(GraphBuilder):
    """See merino_edge.export.graph. G: the query heads that share a key/value head."""

    output_prefix = NEW_KV_PREFIX

    @property
    def has_rings(self) -> bool:
        return self.target.on_tensorrt

    def prepare(self, caches: Sequence[ir.Value]) -> None:
        first = self.slice(self.positions, 1, 0, 1)  # [1, 1]
        whole = [window for window in self.windows if not self.ring(window)]
        columns = self.numbers("cache_positions", self.capacity) if whole else None
        zero, masked = (self.constant(n, np.array(v, np.float32)) for n, v in (("zero", 0), ("masked", MASKED)))
        # By window, of the cache's rows: their positions, and whether they stand before the step.
        held = {}
        if columns is not None:
            past = self.op("Less", columns, first)  # [1, C]
            held = dict.fromkeys(whole, (columns, past))
        past_bias = self.op("Where", held[0][1], zero, masked) if 0 in held else None
        rows = self.op("Reshape", self.positions, self.shape(1, 1, -1, 1))
        new_columns = self.op("Reshape", self.positions, self.shape(1, 1, 1, -1))
        ahead = self.op("LessOrEqual", new_columns, rows)  # [1, 1, T, T]
        self.past_bias: dict[tuple[int, int], ir.Value] = {}  # by window and G: [1, C], or [1, 1, G * T, C] in a window
        self.new_bias: dict[tuple[int, int], ir.Value] = {}  # [1, 1, G * T, T]
        for window in self.windows:
            seen = ahead
            if window:
                least = self.op("Sub", rows, self.shape(window))  # a query sees the positions above it
                if length := self.ring(window):
                    held[window] = self.held(first, length)
                positions, past = held[window]
                seen_past = self.op("And", past, self.op("Greater", positions, least))
                past_bias = self.op("Where", seen_past, zero, masked)
                seen = self.op("And", ahead, self.op("Greater", new_columns, least))
            new_bias = self.op("Where", seen, zero, masked)
            assert past_bias is not None
            for group in sorted(
                {b.heads // b.kv_heads for b in self.a.blocks if not b.convolution and self.window(b) == window}
            ):
                self.past_bias[window, group] = self.repeated(past_bias, group) if window else past_bias
                self.new_bias[window, group] = self.repeated(new_bias, group)
        self.rotations = {kind: [self.rotation(n, kind) for n in ("cos", "sin")] for kind in self.a.rotaries}

    def numbers(self, name: str, count: int, modulo: int | None = None) -> ir.Value:
        """The constant 0, 1, ... int64 [count], each modulo `modulo`."""
        return self.constant(f"{name}.{count}", np.arange(count, dtype=np.int64) % (modulo or count))

    def held(self, first: ir.Value, length: int) -> tuple[ir.Value, ir.Value]:
        """The position [1, L] that each row of a ring holds before a step at `first` [1, 1], and whether it has one."""
        rows = self.numbers("cache_positions", length)
        turned = self.op("Gather", self.numbers(f"ring.{length}", self.capacity, length), first)  # `first` modulo L
        newer = self.op("Less", rows, turned)  # of the turn of the ring that `first` is in
        row = self.op("Where", newer, rows, self.op("Sub", rows, self.shape(length)))
        held = self.op("Add", self.op("Sub", first, turned), row)
        return held, self.op("Greater", held, self.shape(-1))

    def repeated(self, bias: ir.Value, group: int) -> ir.Value:
        """The rows of a bias [1, 1, T, S] once for each query head of a group: [1, 1, G * T, S]."""
        return self.op("Concat", *[bias] * group, axis=2) if group > 1 else bias

    def rotation(self, name: str, kind: Rotary) -> ir.Value:
        """The factors [1, 1, T, D] of a head ("cos"), or of the head with its two halves exchanged ("sin")."""
        cos, sin = self.angles(kind)
        rest = self.a.head_dim - self.a.rotary_dim
        table = np.hstack([cos, cos] if name == "cos" else [-sin, sin])
        table = np.pad(table, ((0, 0), (0, rest)), constant_values=1.0 if name == "cos" else 0.0)  # [C, D]
        prefix = "rotation" if kind == "global" else f"rotation.{kind}"
        rows = self.op("Gather", self.matrix_constant(f"{prefix}.{name}", table), self.positions)
        return self.op("Reshape", rows, self.shape(1, 1, -1, self.a.head_dim))

    def rotate(self, x: ir.Value, kind: Rotary) -> ir.Value:
        """x [1, H, T, D] rotated to its positions."""
        half, rest = self.a.rotary_dim // 2, self.a.head_dim - self.a.rotary_dim
        low, high, *unrotated = self.split(x, -1, half, half, *([rest] if rest else []))
        exchanged = self.op("Concat", high, low, *unrotated, axis=-1)
        cos, sin = self.rotations[kind]
        return self.op("Add", self.op("Mul", x, cos), self.op("Mul", exchanged, sin))

    def attend(self, packed: ir.Value, block: Block, cache: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        d, group = self.a.head_dim, block.heads // block.kv_heads
        qk, v = self.split(packed, -1, (block.heads + block.kv_heads) * d, block.kv_heads * d)
        qk = self.to_heads(qk, block.heads + block.kv_heads)  # [1, H + Hkv, T, D]
        if block.rotary in self.a.rotaries:
            qk = self.rotate(qk, block.rotary)
        q, k = self.split(qk, 1, block.heads, block.kv_heads)
        v = self.to_heads(v, block.kv_heads)
        q = self.op("Reshape", q, self.shape(1, block.kv_heads, -1, d))  # [1, Hkv, G * T, D]
        bias = self.window(block), group
        past, new = self.scores(q, cache[0], self.past_bias[bias]), self.scores(q, k, self.new_bias[bias])
        shares = self.op("Softmax", self.op("Concat", past, new, axis=-1), axis=-1)  # [1, Hkv, G * T, C + T]
        kept = self.ring(block.window) or self.capacity
        past_shares, new_shares = self.slice(shares, 3, 0, kept), self.slice(shares, 3, kept)
        y = self.op(
            "Add",
            self.op("MatMul", self.cast(past_shares, self.matrix_dtype), cache[1]),
            self.op("MatMul", self.cast(new_shares, self.matrix_dtype), v),
        )
        y = self.op("Reshape", y, self.shape(1, block.heads, -1, d))  # [1, H, T, D]
        new_kv = [self.new_kv(past, new, block) for past, new in zip(cache, (k, v), strict=True)]
        return self.from_heads(y, block.heads * d), new_kv

    def scores(self, q: ir.Value, k: ir.Value, bias: ir.Value) -> ir.Value:
        """Scores [1, Hkv, G * T, S] float32 of q [1, Hkv, G * T, D] and k [1, Hkv, S, D], with `bias` added."""
        product = self.cast(self.op("MatMul", q, self.op("Transpose", k, perm=[0, 1, 3, 2])), ir.DataType.FLOAT)
        product = self.capped(product, self.a.attention_cap) if self.a.attention_cap else product
        return self.op("Add", product, bias)

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
