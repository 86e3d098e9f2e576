"""The graph builder that all lowerings share: embeddings, norms, FFNs, residual stream and head.

A lowering is a subclass that writes attention, the KV cache and some nonlinearities (`GraphBuilder`'s abstract
methods). `merino_edge.export.graph` shows the inputs and outputs. Weights are written by `WeightWriter`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from merino_edge import __version__, cache_rings
from merino_edge.architecture import Architecture, Block, Rotary
from merino_edge.export.lowerings import short_convolution
from merino_edge.export.lowerings.weight_writer import MICROSOFT, WeightWriter
from merino_edge.export.quantization.stored_weights import StoredWeights
from merino_edge.export.targets import Target
from merino_edge.graph_io import LOGIT_ROWS, STATE_PREFIX
from merino_edge.rotary import frequencies

IR_VERSION = 11
LAST = 2**31 - 1  # the end of a slice that goes up to the last element
MASKED = np.float32(-1e9)  # of a score that must not count: its exponential is 0


class GraphBuilder(ABC):
    """Writes one model. Values are float32 unless a comment says otherwise.

    `context`: the largest number of positions. `capacity`: the largest number that the cache can hold, `context` if
    None. `capacity_dim` is the cache's dimension in the graph: `capacity`, or a symbol where the runtime chooses it.
    """

    output_prefix = "new_"  # of the names of the cache outputs

    def __init__(
        self, a: Architecture, stored: StoredWeights, target: Target, context: int, capacity: int | None = None
    ) -> None:
        self.a, self.stored, self.target, self.context = a, stored, target, context
        self.tape = Tape()
        self.capacity = capacity or context
        self.capacity_dim: int | str = self.capacity if target.static_cache else "C"
        self.weights = WeightWriter(self.tape, target, stored)
        self.extra_inputs: list[ir.Value] = []  # of this lowering only
        self.layer = 0  # index of the layer that is written
        self.shared = False  # whether the layers that are written share one set of weights

    @property
    def matrix_dtype(self) -> ir.DataType:
        """The type that matrices compute in: float16 for TensorRT, but float32 at fp32 and inside an fp32 FFN."""
        return self.weights.dtype

    @property
    def cache_dtype(self) -> ir.DataType:
        """The type of the KV cache."""
        return ir.DataType.INT8 if self.target.int8_cache else self.matrix_dtype

    # --- what a lowering decides ---

    @abstractmethod
    def prepare(self, caches: Sequence[ir.Value]) -> None:
        """Write what the attention of all layers shares: masks, positions, angles."""

    @abstractmethod
    def attend(self, packed: ir.Value, block: Block, cache: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        """Attention over packed query, key and value [1, T, (H + 2 Hkv) D].

        Returns the attended heads [1, T, H D] and the outputs for the key cache and the value cache.
        """

    @abstractmethod
    def rms_norm(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """RMS norm of x [1, T, W] with scale [W]."""

    @abstractmethod
    def gelu(self, x: ir.Value, *, tanh: bool) -> ir.Value:
        """GELU of x [1, T, F]; `tanh`: its approximation by tanh."""

    def swish(self, x: ir.Value) -> ir.Value:
        """x * sigmoid(x), as two operators, since TensorRT has Swish from 11.0 only."""
        return self.op("Mul", x, self.op("Sigmoid", x))

    def add_norm(self, x: ir.Value, y: ir.Value | None, name: str) -> tuple[ir.Value, ir.Value]:
        """The sum x + y (x where y is None), and its norm."""
        total = x if y is None else self.op("Add", x, y)
        return total, self.norm(total, name)

    # --- small helpers ---

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """The architecture's norm of x [1, T, W] with the weights `name`."""
        if self.a.norm == "rmsnorm":
            return self.rms_norm(x, *self.norm_weights(name))
        return self.op("LayerNormalization", x, *self.norm_weights(name), epsilon=self.a.norm_epsilon, axis=-1)

    def activation(self, x: ir.Value) -> ir.Value:
        """The FFN's nonlinearity of x [1, T, F]."""
        kind = self.a.ffn
        if kind == "swiglu":
            return self.swish(x)
        if kind in ("relu", "relu_squared"):
            x = self.op("Relu", x)
            return x if kind == "relu" else self.op("Mul", x, x)
        return self.gelu(x, tanh=kind.endswith("tanh"))

    def slice(self, x: ir.Value, axis: int, start: int, end: int = LAST) -> ir.Value:
        """x[start:end] along one axis."""
        return self.op("Slice", x, self.shape(start), self.shape(end), self.shape(axis))

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        """Add an operator with one output."""
        return self.tape.op(kind, inputs, attributes, domain=domain)

    def shape(self, *dims: int) -> ir.Value:
        """The constant `dims` int64 [len(dims)]."""
        return self.weights.shape(*dims)

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        """An initializer with the values and the type of `value`."""
        return self.weights.initializer(name, value)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """x cast to `dtype`, between float32 and the type of matrices; x itself where matrices compute in float32."""
        return x if self.matrix_dtype == ir.DataType.FLOAT else self.op("Cast", x, to=dtype.value)

    def linear(
        self, x: ir.Value, names: Sequence[str], factors: Sequence[float] = (), *, before_relu: bool = False
    ) -> ir.Value:
        """The linear layers `names` of x [1, T, in], written as one matrix: [1, T, sum of out].

        Weight and bias of each are multiplied by its factor. `before_relu`: a Relu follows at once.
        """
        factors = factors or [1.0] * len(names)
        bias = None
        if f"{names[0]}.bias" in self.stored.arrays:
            parts = [self.stored.arrays[f"{n}.bias"] * np.float32(f) for n, f in zip(names, factors, strict=True)]
            bias = self.matrix_constant("+".join(names) + ".bias", np.concatenate(parts))
        return self.weights.matmul(x, names, factors, bias, unfused=self.shared or (before_relu and bias is None))

    def matrix_constant(self, name: str, value: np.ndarray) -> ir.Value:
        """An initializer with the values of `value` in the type that matrices compute in."""
        return self.constant(name, value.astype(self.matrix_dtype.numpy()))

    def capped(self, x: ir.Value, cap: float) -> ir.Value:
        """cap * tanh(x / cap) of x float32."""
        value = self.constant(f"cap.{cap:g}", np.array(cap, np.float32))
        return self.op("Mul", self.op("Tanh", self.op("Div", x, value)), value)

    def norm_weights(self, name: str) -> list[ir.Value]:
        """The scale of the norm `name` and, for a layer norm, its bias."""
        kinds = ("weight",) if self.a.norm == "rmsnorm" else ("weight", "bias")
        return [self.constant(f"{name}.{kind}", self.stored.arrays[f"{name}.{kind}"]) for kind in kinds]

    def output(self, cache: ir.Value, block: Block, positions: int | str) -> ir.Value:
        """The graph's output [1, Hkv, positions, D] for `cache`."""
        name = f"{self.output_prefix}{cache.name}"
        return ir.val(name, self.cache_dtype, [1, block.kv_heads, positions, self.a.head_dim])

    def to_heads(self, x: ir.Value, heads: int) -> ir.Value:
        """[1, T, H * D] -> [1, H, T, D]"""
        return self.op("Transpose", self.op("Reshape", x, self.shape(1, -1, heads, self.a.head_dim)), perm=[0, 2, 1, 3])

    def from_heads(self, x: ir.Value, width: int) -> ir.Value:
        """[1, H, T, D] -> [1, T, H * D]"""
        return self.op("Reshape", self.op("Transpose", x, perm=[0, 2, 1, 3]), self.shape(1, -1, width))

    def split(self, x: ir.Value, axis: int, *sizes: int) -> Sequence[ir.Value]:
        """x cut into parts of `sizes` along one axis."""
        return self.tape.op_multi_out("Split", [x, self.shape(*sizes)], {"axis": axis}, num_outputs=len(sizes))

    def angles(self, kind: Rotary) -> tuple[np.ndarray, np.ndarray]:
        """Cosines and sines [C, R / 2] float64 of the rotary angles of every position, for a kind of rotary."""
        angles = np.outer(np.arange(self.context), frequencies(self.a, kind))
        return np.cos(angles), np.sin(angles)

    @property
    def windows(self) -> list[int]:
        """The windows of the layers that hide a position of the cache; 0 where a layer sees all."""
        return sorted({self.window(block) for block in self.a.blocks if not block.convolution})

    @property
    def has_rings(self) -> bool:
        """Whether the cache of a layer with a window is a ring (merino_edge.cache_rings)."""
        return False

    def ring(self, window: int) -> int:
        """Positions of the ring of layers with a window; 0: they keep the whole cache."""
        length = cache_rings.ring_positions(window, self.capacity)
        return length if self.has_rings and length < self.capacity else 0

    def cache_dim(self, block: Block) -> int | str:
        """The dimension of the positions of the cache of a layer of `block`."""
        return self.ring(block.window) or self.capacity_dim

    def window(self, block: Block) -> int:
        """How many positions a layer of `block` sees; 0: as many as there are."""
        return block.window if block.window < self.capacity else 0

    # --- the model ---

    def build(self) -> ir.Model:
        """Write the whole model."""
        a = self.a
        self.tokens = ir.val("tokens", ir.DataType.INT64, [1, "T"])
        self.positions = ir.val("positions", ir.DataType.INT64, [1, "T"])
        caches = [self.cache_inputs(layer, block) for layer, block in enumerate(a.layer_blocks())]
        inputs = [value for of_layer in caches for value in of_layer]
        self.prepare([value for value in inputs if not str(value.name).startswith(STATE_PREFIX)])
        outputs: list[ir.Value] = []
        x, added = self.embed(), None
        for index, block in enumerate(a.blocks):
            if index and block.width != a.blocks[index - 1].width:
                x, added = self.project_width(self.total(x, added), f"blocks.{index}.projection"), None
            self.shared = block.shared and block.layers > 1
            for depth in range(block.layers):
                stored = f"blocks.{index}.layers.{0 if block.shared else depth}."
                x, added, updated = self.decoder_layer(x, added, block, stored, caches[self.layer])
                outputs += updated
                self.layer += 1
            self.shared = False
        logits = self.head(self.total(x, added))
        return self.model([self.tokens, self.positions, *self.extra_inputs, *inputs], [logits, *outputs])

    def cache_inputs(self, layer: int, block: Block) -> list[ir.Value]:
        """The inputs of a layer for what earlier steps left: the key cache and the value cache, or its state."""
        if block.convolution:
            return [short_convolution.state_input(layer, block)]
        shape = [1, block.kv_heads, self.cache_dim(block), self.a.head_dim]
        return [ir.val(f"{kind}_{layer}", self.cache_dtype, shape) for kind in ("key", "value")]

    def model(self, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Model:
        domains = {node.domain for node in self.tape.nodes}
        opsets = {"": self.target.opset} | ({MICROSOFT: 1} if MICROSOFT in domains else {})
        graph = ir.Graph(
            inputs,
            outputs,
            nodes=self.tape.nodes,
            initializers=self.tape.initializers,
            opset_imports=opsets,
            name="decoder_step",
        )
        return ir.Model(graph, ir_version=IR_VERSION, producer_name="merino-edge", producer_version=__version__)

    def embed(self) -> ir.Value:
        """The residual stream [1, T, W_0] before the first layer."""
        a = self.a
        tied = a.tied_head and not self.stored.own_head
        x = self.weights.gather_rows("embedding.weight", self.tokens, shared_with_head=tied)  # [1, T, E]
        if a.embedding_width != a.blocks[0].width:
            x = self.project_width(x, "projection_in")
        if a.positions == "learned":
            rows = self.positions
            if a.position_offset:
                rows = self.op("Add", rows, self.shape(a.position_offset))
            x = self.op("Add", x, self.weights.gather_rows("positions.weight", rows))
        return x

    def project_width(self, x: ir.Value, name: str) -> ir.Value:
        """x [1, T, W] projected to another width by the weights `name`."""
        return self.cast(self.linear(self.cast(x, self.matrix_dtype), [name]), ir.DataType.FLOAT)

    def total(self, x: ir.Value, added: ir.Value | None) -> ir.Value:
        """x + added; x where `added` is None."""
        return x if added is None else self.op("Add", x, added)

    def decoder_layer(
        self, x: ir.Value, added: ir.Value | None, block: Block, name: str, cache: Sequence[ir.Value]
    ) -> tuple[ir.Value, ir.Value | None, list[ir.Value]]:
        """One layer of the residual stream x + added [1, T, W]: its new x and added, and the cache outputs.

        The last sum of a layer is written together with the next layer's norm, so that a lowering may fuse them.
        """
        if self.a.norm_placement == "after":
            x = self.total(x, added)
            attended, updated = self.mix(x, block, name, cache)
            x = self.op("Add", x, self.norm(attended, f"{name}attention_norm"))
            return x, self.norm(self.ffn(x, block, f"{name}ffn."), f"{name}ffn_norm"), updated
        if self.a.norm_placement == "post":
            attended, updated = self.mix(x, block, name, cache)
            _, x = self.add_norm(x, attended, f"{name}attention_norm")
            _, x = self.add_norm(x, self.ffn(x, block, f"{name}ffn."), f"{name}ffn_norm")
            return x, None, updated
        x, normed = self.add_norm(x, added, f"{name}attention_norm")
        attended, updated = self.mix(normed, block, name, cache)
        if self.a.parallel_residual:
            fed = self.ffn(self.norm(x, f"{name}ffn_norm"), block, f"{name}ffn.")
            return x, self.op("Add", attended, fed), updated
        both = self.a.norm_placement == "both"
        attended = self.norm(attended, f"{name}attention_output_norm") if both else attended
        x, normed = self.add_norm(x, attended, f"{name}ffn_norm")
        fed = self.ffn(normed, block, f"{name}ffn.")
        return x, self.norm(fed, f"{name}ffn_output_norm") if both else fed, updated

    def mix(self, x: ir.Value, block: Block, name: str, cache: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        """What mixes positions in the layer `name`, of x [1, T, W]: attention or a convolution; and its outputs."""
        if not block.convolution:
            return self.attention(x, block, f"{name}attention.", cache)
        y, gated = short_convolution.write(self, x, block, f"{name}convolution.", cache[0])
        return y, [gated]

    def attention(
        self, x: ir.Value, block: Block, name: str, cache: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        """Attention of x [1, T, W] with its projections, and the cache outputs."""
        names, scale = [f"{name}query", f"{name}key", f"{name}value"], 1 / math.sqrt(self.a.head_dim)
        x = self.cast(x, self.matrix_dtype)
        if self.a.qk_norm == "none":
            packed = self.linear(x, names, [scale, 1.0, 1.0])
        else:
            packed = self.normed_heads(self.linear(x, names), block, name, scale)
        y, updated = self.attend(packed, block, cache)
        return self.cast(self.linear(y, [f"{name}output"]), ir.DataType.FLOAT), updated

    def normed_heads(self, packed: ir.Value, block: Block, name: str, scale: float) -> ir.Value:
        """Packed query, key and value [1, T, (H + 2 Hkv) D] with query and key normed, and the query times `scale`."""
        d, by_head = self.a.head_dim, self.a.qk_norm == "head"
        parts = list(self.split(packed, -1, block.heads * d, block.kv_heads * d, block.kv_heads * d))
        for index, (kind, heads, factor) in enumerate((("query", block.heads, scale), ("key", block.kv_heads, 1.0))):
            weight = f"{name}{kind}_norm.weight"
            x = self.cast(parts[index], ir.DataType.FLOAT)
            x = self.op("Reshape", x, self.shape(1, -1, d)) if by_head else x  # [1, T H, D]: a norm has 3 axes
            x = self.rms_norm(x, self.constant(weight, self.stored.arrays[weight] * np.float32(factor)))
            x = self.op("Reshape", x, self.shape(1, -1, heads * d)) if by_head else x
            parts[index] = self.cast(x, self.matrix_dtype)
        return self.op("Concat", *parts, axis=-1)

    @contextmanager
    def computing(self, dtype: ir.DataType) -> Iterator[None]:
        """Matrices compute in another type inside the `with`."""
        usual, self.weights.dtype = self.matrix_dtype, dtype
        try:
            yield
        finally:
            self.weights.dtype = usual

    def ffn(self, x: ir.Value, block: Block, name: str) -> ir.Value:
        """The feed-forward network `name` of x [1, T, W], in float32 where it overflows float16."""
        with self.computing(ir.DataType.FLOAT if name in self.stored.fp32_ffns else self.matrix_dtype):
            return self.ffn_products(x, block, name)

    def ffn_products(self, x: ir.Value, block: Block, name: str) -> ir.Value:
        x = self.cast(x, self.matrix_dtype)
        if self.a.gated:
            packed = self.linear(x, [f"{name}gate", f"{name}up"])
            gate, up = self.split(packed, -1, block.ffn_width, block.ffn_width)
            x = self.op("Mul", self.activation(gate), up)
        else:
            before_relu = self.a.ffn in ("relu", "relu_squared")
            x = self.activation(self.linear(x, [f"{name}up"], before_relu=before_relu))
        return self.cast(self.linear(x, [f"{name}down"]), ir.DataType.FLOAT)

    def wanted_positions(self, x: ir.Value) -> ir.Value:
        """The positions of x [1, T, W] that the graph returns logits for: [1, N, W]."""
        rows = ir.val(LOGIT_ROWS, ir.DataType.INT64, ["N"])
        self.extra_inputs.append(rows)
        return self.op("Gather", x, rows, axis=1)

    def scatter_logits(self, logits: ir.Value) -> ir.Value:
        """Logits [N, V'] of the pruned vocabulary as [N, V]; all other tokens get minus infinity."""
        shape = self.op("Concat", self.op("Shape", logits, end=1), self.shape(self.a.vocab_size), axis=0)
        columns = self.op("Unsqueeze", self.weights.pruned_vocab(), self.shape(0))
        columns = self.op("Expand", columns, self.op("Shape", logits))  # [N, V']
        everywhere = self.op("ConstantOfShape", shape, value=ir.tensor(np.array([-np.inf], np.float32)))
        return self.op("ScatterElements", everywhere, columns, logits, axis=1)

    def head(self, x: ir.Value) -> ir.Value:
        """Logits [N, V] float32 of the wanted positions."""
        a = self.a
        x = self.wanted_positions(x)
        if a.final_norm:
            x = self.norm(x, "final_norm")
        if a.embedding_width != a.blocks[-1].width:
            x = self.project_width(x, "projection_out")
        x = self.cast(self.op("Reshape", x, self.shape(-1, a.embedding_width)), self.matrix_dtype)
        logits = self.cast(self.weights.head(x, tied=a.tied_head), ir.DataType.FLOAT)
        logits = self.capped(logits, a.logit_cap) if a.logit_cap else logits
        logits = self.op("Identity", logits) if self.stored.pruned_vocab is None else self.scatter_logits(logits)
        logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape(["N", a.vocab_size])
        return logits
