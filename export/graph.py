"""A checkpoint's weights as an ONNX graph, written node by node (no tracing): the `native` lowering, opset 24.

One step of one sequence with a static, preallocated cache that is updated in place:

    tokens int64 [1, T]    positions int64 [1, T] (consecutive)    key_L, value_L  [1, Hkv, C, D]  per layer
    -> logits float32 [1, V] of the last position                  new_key_L, new_value_L (same shapes)

The runtime binds `new_key_L` to the memory of `key_L`. Attention gets an explicit boolean mask, since
TensorRT's causal flag is aligned to the upper left before version 11. The residual stream, norms and
logits stay float32 whatever the precision of the matrices. The 1/sqrt(D) of attention is multiplied
into the query weights, because TensorRT's attention layer has no scale of its own.

This module knows no precision's storage form (`merino_edge.export.quantize`, `linear`) and no runtime.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from merino_edge import __version__
from merino_edge.architecture import Architecture, Block
from merino_edge.export.linear import MICROSOFT, MatrixWriter
from merino_edge.export.quantize import StoredWeights, store
from merino_edge.export.targets import Target

OPSET = 24
IR_VERSION = 11


def build_model(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    precision: str = "fp32",
    context: int = 1024,
    target: str = "onnxruntime",
) -> ir.Model:
    """The graph of `a` with its weights (by the names of merino_edge.weights) at `precision`.

    `context` is the greatest number of positions C of the cache. Raises UnsupportedError when the
    target cannot run the precision.
    """
    chosen = Target.named(target, precision)
    return build_stored(a, store(a, weights, chosen), chosen, context)


def build_stored(a: Architecture, stored: StoredWeights, target: Target, context: int) -> ir.Model:
    """The graph over weights that are already in the form `target` stores."""
    return GraphBuilder(a, stored, target, context).build()


def to_bytes(model: ir.Model) -> bytes:
    """The model as one serialized ONNX file, weights included (at most 2 GB): for timing and tests."""
    return bytes(ir.to_proto(model).SerializeToString())


def cache_names(a: Architecture) -> list[tuple[str, str]]:
    """(input, output) names of the caches: key and value of every computed layer, in order."""
    names = [f"{kind}_{layer}" for layer in range(a.layers) for kind in ("key", "value")]
    return [(name, f"new_{name}") for name in names]


class GraphBuilder:
    """Writes one model. Values are float32 unless said otherwise; `half` is what matrices compute in."""

    def __init__(self, a: Architecture, stored: StoredWeights, target: Target, context: int) -> None:
        self.a, self.stored, self.target, self.context = a, stored, target, context
        self.tape = Tape()
        self.half = target.compute_dtype
        self.matrices = MatrixWriter(self.tape, target, stored)
        self.layer = 0
        self.shared = False  # whether the layers being written use one set of weights

    # --- small helpers ---

    def op(self, kind: str, *inputs: ir.Value | None, **attributes: object) -> ir.Value:
        return self.tape.op(kind, inputs, attributes)  # type: ignore[arg-type]

    def shape(self, *dims: int) -> ir.Value:
        return self.matrices.initializer(f"shape.{'x'.join(map(str, dims))}", np.array(dims, np.int64))

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A cast where the target computes in another type than float32; nothing where it does not."""
        return x if self.half == ir.DataType.FLOAT else self.op("Cast", x, to=dtype.value)

    def linear(
        self, x: ir.Value, names: Sequence[str], factors: Sequence[float] = (), before_relu: bool = False
    ) -> ir.Value:
        """x [1, T, in] -> [1, T, sum of out], several linears with one input written as one matrix."""
        factors = factors or [1.0] * len(names)
        biased = f"{names[0]}.bias" in self.stored.arrays
        y = self.matrices.matmul(x, names, factors, unfused=self.shared or (before_relu and not biased))
        if not biased:
            return y
        bias = np.concatenate(
            [self.stored.arrays[f"{n}.bias"] * np.float32(f) for n, f in zip(names, factors, strict=True)]
        )
        return self.op("Add", y, self.computed("+".join(names) + ".bias", bias))

    def computed(self, name: str, value: np.ndarray) -> ir.Value:
        """An initializer in the type that matrices compute in."""
        return self.matrices.initializer(name, value.astype(self.half.numpy()))

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        scale = self.matrices.initializer(f"{name}.weight", self.stored.arrays[f"{name}.weight"])
        if self.a.norm == "rmsnorm":
            return self.op("RMSNormalization", x, scale, epsilon=self.a.norm_epsilon, axis=-1)
        bias = self.matrices.initializer(f"{name}.bias", self.stored.arrays[f"{name}.bias"])
        return self.op("LayerNormalization", x, scale, bias, epsilon=self.a.norm_epsilon, axis=-1)

    # --- the model ---

    def build(self) -> ir.Model:
        a = self.a
        self.tokens = ir.val("tokens", ir.DataType.INT64, [1, "T"])
        self.positions = ir.val("positions", ir.DataType.INT64, [1, "T"])
        inputs = [self.tokens, self.positions]
        outputs: list[ir.Value] = []
        self.rows = self.op("Reshape", self.positions, self.shape(1, 1, -1, 1))  # [1, 1, T, 1]
        if self.target.tensor_scatter:
            first = self.op("Slice", self.positions, self.shape(0), self.shape(1), self.shape(1))  # [1, 1]
            self.write_index = self.op("Reshape", first, self.shape(1))  # [1]
        capacity = self.context if self.target.static_cache else "C"
        caches = [
            ir.val(f"{kind}_{layer}", self.half, [1, block.kv_heads, capacity, a.head_dim])
            for layer, block in enumerate(a.layer_blocks())
            for kind in ("key", "value")
        ]
        self.mask = self.attention_mask(caches[0])

        x = self.embed()
        for index, block in enumerate(a.blocks):
            if index and block.width != a.blocks[index - 1].width:
                x = self.widen(x, f"blocks.{index}.projection")
            self.shared = block.shared and block.layers > 1
            for depth in range(block.layers):
                stored = f"blocks.{index}.layers.{0 if block.shared else depth}."
                x, updated = self.decoder_layer(x, block, stored, caches[2 * self.layer : 2 * self.layer + 2])
                outputs += updated
                self.layer += 1
            self.shared = False
        logits = self.head(x)
        return self.model(inputs + caches, [logits, *outputs])

    def model(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports={"": self.target.opset, MICROSOFT: 1},
            name="decoder_step",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="merino-edge", producer_version=__version__)

    def attention_mask(self, cache: ir.Value) -> ir.Value:
        """[1, 1, T, C] bool: a query sees the cache up to and including its own position."""
        columns = self.matrices.initializer("cache_positions", np.arange(self.context, dtype=np.int64))
        if not self.target.static_cache:  # the runtime may bind a cache smaller than the context
            capacity = self.op("Shape", cache, start=2, end=3)
            columns = self.op("Slice", columns, self.shape(0), capacity)
        return self.op("LessOrEqual", columns, self.rows)

    def embed(self) -> ir.Value:
        a = self.a
        x = self.matrices.gather_rows("embedding.weight", self.tokens)  # [1, T, E]
        if a.embedding_width != a.blocks[0].width:
            x = self.widen(x, "projection_in")
        if a.positions == "learned":
            rows = self.positions
            if a.position_offset:
                rows = self.op("Add", rows, self.shape(a.position_offset))
            x = self.op("Add", x, self.matrices.gather_rows("positions.weight", rows))
        return x  # [1, T, W_0]

    def widen(self, x: ir.Value, name: str) -> ir.Value:
        return self.cast(self.linear(self.cast(x, self.half), [name]), ir.DataType.FLOAT)

    def decoder_layer(
        self, x: ir.Value, block: Block, name: str, cache: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        """x [1, T, W] through one layer; also the two updated caches."""
        post = self.a.norm_placement == "post"
        attention_in = x if post else self.norm(x, f"{name}attention_norm")
        attended, updated = self.attention(attention_in, block, f"{name}attention.", cache)
        if self.a.parallel_residual:
            fed = self.ffn(self.norm(x, f"{name}ffn_norm"), block, f"{name}ffn.")
            return self.op("Add", self.op("Add", x, attended), fed), updated
        x = self.op("Add", x, attended)
        if post:
            x = self.norm(x, f"{name}attention_norm")
        fed = self.ffn(x if post else self.norm(x, f"{name}ffn_norm"), block, f"{name}ffn.")
        x = self.op("Add", x, fed)
        return (self.norm(x, f"{name}ffn_norm") if post else x), updated

    def attention(
        self, x: ir.Value, block: Block, name: str, cache: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        a = self.a
        heads = [block.heads, block.kv_heads, block.kv_heads]
        names = [f"{name}query", f"{name}key", f"{name}value"]
        packed = self.linear(self.cast(x, self.half), names, [1 / math.sqrt(a.head_dim), 1.0, 1.0])
        split = self.tape.op_multi_out(
            "Split", [packed, self.shape(*(h * a.head_dim for h in heads))], {"axis": -1}, num_outputs=3
        )
        q, k, v = (self.to_heads(part, count) for part, count in zip(split, heads, strict=True))  # [1, H, T, D]
        if a.positions == "rotary":
            q, k = self.rotate(q, block.heads), self.rotate(k, block.kv_heads)
        updated = [self.write(past, new, block.kv_heads) for past, new in zip(cache, (k, v), strict=True)]
        y = self.op("Attention", q, updated[0], updated[1], self.mask, scale=1.0)  # [1, H, T, D]
        y = self.op("Reshape", self.op("Transpose", y, perm=[0, 2, 1, 3]), self.shape(1, -1, block.width))
        return self.cast(self.linear(y, [f"{name}output"]), ir.DataType.FLOAT), updated

    def write(self, past: ir.Value, new: ir.Value, heads: int) -> ir.Value:
        """The cache `past` [1, Hkv, C, D] with `new` [1, Hkv, T, D] at its positions."""
        updated = ir.val(f"new_{past.name}", self.half, past.shape)
        if self.target.tensor_scatter:
            inputs = [past, new, self.write_index]
            return self.tape.op("TensorScatter", inputs, {"axis": -2, "mode": "linear"}, output=updated)
        places = self.op("Expand", self.rows, self.shape(1, heads, 1, self.a.head_dim))  # [1, Hkv, T, D]
        return self.tape.op("ScatterElements", [past, places, new], {"axis": 2}, output=updated)

    def to_heads(self, x: ir.Value, heads: int) -> ir.Value:
        """[1, T, H * D] -> [1, H, T, D]"""
        return self.op("Transpose", self.op("Reshape", x, self.shape(1, -1, heads, self.a.head_dim)), perm=[0, 2, 1, 3])

    def rotate(self, x: ir.Value, heads: int) -> ir.Value:
        a = self.a
        exponent = np.arange(0, a.rotary_dim, 2, dtype=np.float64) / a.rotary_dim
        angles = np.outer(np.arange(self.context), a.rotary_base**-exponent)  # [context, rotary_dim / 2]
        cos, sin = (self.computed(f"rotary.{n}", f(angles)) for n, f in (("cos", np.cos), ("sin", np.sin)))
        partial = {}
        if a.rotary_dim != a.head_dim:  # ONNX Runtime 1.23 asks for the heads, though x tells them
            partial = {"rotary_embedding_dim": a.rotary_dim, "num_heads": heads}
        return self.op("RotaryEmbedding", x, cos, sin, self.positions, **partial)

    def ffn(self, x: ir.Value, block: Block, name: str) -> ir.Value:
        x = self.cast(x, self.half)
        if self.a.gated:
            packed = self.linear(x, [f"{name}gate", f"{name}up"])
            sizes = self.shape(block.ffn_width, block.ffn_width)
            gate, up = self.tape.op_multi_out("Split", [packed, sizes], {"axis": -1}, num_outputs=2)
            x = self.op("Mul", self.op("Mul", gate, self.op("Sigmoid", gate)), up)
        else:
            x = self.linear(x, [f"{name}up"], before_relu=self.a.ffn == "relu")
            if self.a.ffn == "relu":
                x = self.op("Relu", x)
            else:
                x = self.op("Gelu", x, approximate="tanh" if self.a.ffn == "gelu_tanh" else "none")
        return self.cast(self.linear(x, [f"{name}down"]), ir.DataType.FLOAT)

    def head(self, x: ir.Value) -> ir.Value:
        """Logits [1, V] float32 of the last of the T positions."""
        a = self.a
        x = self.op(
            "Slice", x, self.shape(-1), self.matrices.initializer("slice_end", np.array([2**31 - 1])), self.shape(1)
        )
        if a.norm_placement == "pre":
            x = self.norm(x, "final_norm")
        if a.embedding_width != a.blocks[-1].width:
            x = self.widen(x, "projection_out")
        x = self.cast(self.op("Reshape", x, self.shape(1, a.embedding_width)), self.half)
        logits = self.cast(self.matrices.head(x, a.tied_head), ir.DataType.FLOAT)
        logits = self.op("Identity", logits)
        logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape([1, a.vocab_size])
        return logits
