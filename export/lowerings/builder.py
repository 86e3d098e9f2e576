"""What all lowerings share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from merino_edge import __version__
from merino_edge.architecture import Architecture, Block
from merino_edge.export.lowerings.weight_writer import MICROSOFT, WeightWriter
from merino_edge.export.quantization.stored_weights import StoredWeights
from merino_edge.export.targets import Target

IR_VERSION = 11


LAST = 2**31 - 1  # end of a slice up to the end


class GraphBuilder(ABC):
    """Writes one model. Values are float32 unless said otherwise; `half` is what matrices compute in."""

    output_prefix = "new_"  # of the caches' outputs
    rows: int | str = 1  # of the logits

    def __init__(
        self, a: Architecture, stored: StoredWeights, target: Target, context: int, capacity: int | None = None
    ) -> None:
        self.a, self.stored, self.target, self.context = a, stored, target, context
        self.tape = Tape()
        self.places = capacity or context  # that the cache may have
        self.capacity: int | str = self.places if target.static_cache else "C"  # of the caches
        self.matrices = WeightWriter(self.tape, target, stored)
        self.asked: list[ir.Value] = []  # inputs that a lowering has beyond the others
        self.layer = 0
        self.shared = False  # whether the layers being written use one set of weights

    @property
    def half(self) -> ir.DataType:
        """What matrices compute in."""
        return self.matrices.dtype

    @property
    def cache_dtype(self) -> ir.DataType:
        return ir.DataType.INT8 if self.target.int8_cache else self.half

    # --- what a lowering decides ---

    @abstractmethod
    def prepare(self, caches: Sequence[ir.Value]) -> None:
        """Write what every layer's attention needs once a step: masks, places, angles."""

    @abstractmethod
    def attend(self, packed: ir.Value, block: Block, cache: Sequence[ir.Value]) -> tuple[ir.Value, list[ir.Value]]:
        """Query, key and value [1, T, (H + 2 Hkv) D], packed, to the attended heads [1, T, H D], and both outputs."""

    @abstractmethod
    def rms_norm(self, x: ir.Value, scale: ir.Value) -> ir.Value:
        """x [1, T, W] over its root mean square, times scale [W]."""

    @abstractmethod
    def gelu(self, x: ir.Value, tanh: bool) -> ir.Value:
        """x [1, T, F] through GELU, or its approximation by tanh."""

    def swish(self, x: ir.Value) -> ir.Value:
        """x * sigmoid(x); as one operator it came with TensorRT 11.0."""
        return self.op("Mul", x, self.op("Sigmoid", x))

    def add_norm(self, x: ir.Value, y: ir.Value | None, name: str) -> tuple[ir.Value, ir.Value]:
        """x + y (y may be missing), and that normed."""
        total = x if y is None else self.op("Add", x, y)
        return total, self.norm(total, name)

    # --- small helpers ---

    def norm(self, x: ir.Value, name: str) -> ir.Value:
        """x [1, T, W] normed by the weights `name`."""
        if self.a.norm == "rmsnorm":
            return self.rms_norm(x, *self.norm_weights(name))
        return self.op("LayerNormalization", x, *self.norm_weights(name), epsilon=self.a.norm_epsilon, axis=-1)

    def activation(self, x: ir.Value) -> ir.Value:
        """x [1, T, F] through the FFN's nonlinearity."""
        if self.a.gated:
            return self.swish(x)
        return self.op("Relu", x) if self.a.ffn == "relu" else self.gelu(x, tanh=self.a.ffn == "gelu_tanh")

    def slice(self, x: ir.Value, axis: int, start: int, end: int = LAST) -> ir.Value:
        return self.op("Slice", x, self.shape(start), self.shape(end), self.shape(axis))

    def op(self, kind: str, *inputs: ir.Value | None, domain: str = "", **attributes: Any) -> ir.Value:
        return self.tape.op(kind, inputs, attributes, domain=domain)

    def shape(self, *dims: int) -> ir.Value:
        return self.matrices.shape(*dims)

    def constant(self, name: str, value: np.ndarray) -> ir.Value:
        return self.matrices.initializer(name, value)

    def cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        """A cast where the target computes in another type than float32; nothing where it does not."""
        return x if self.half == ir.DataType.FLOAT else self.op("Cast", x, to=dtype.value)

    def linear(
        self, x: ir.Value, names: Sequence[str], factors: Sequence[float] = (), before_relu: bool = False
    ) -> ir.Value:
        """x [1, T, in] -> [1, T, sum of out], several linears with one input written as one matrix."""
        factors = factors or [1.0] * len(names)
        bias = None
        if f"{names[0]}.bias" in self.stored.arrays:
            parts = [self.stored.arrays[f"{n}.bias"] * np.float32(f) for n, f in zip(names, factors, strict=True)]
            bias = self.computed("+".join(names) + ".bias", np.concatenate(parts))
        return self.matrices.matmul(x, names, factors, bias, unfused=self.shared or (before_relu and bias is None))

    def computed(self, name: str, value: np.ndarray) -> ir.Value:
        """An initializer in the type that matrices compute in."""
        return self.constant(name, value.astype(self.half.numpy()))

    def norm_weights(self, name: str) -> list[ir.Value]:
        """Scale and, for a layer norm, bias."""
        kinds = ("weight",) if self.a.norm == "rmsnorm" else ("weight", "bias")
        return [self.constant(f"{name}.{kind}", self.stored.arrays[f"{name}.{kind}"]) for kind in kinds]

    def output(self, cache: ir.Value, block: Block, places: int | str) -> ir.Value:
        """The value [1, Hkv, places, D] that leaves the graph for `cache`."""
        name = f"{self.output_prefix}{cache.name}"
        return ir.val(name, self.cache_dtype, [1, block.kv_heads, places, self.a.head_dim])

    def to_heads(self, x: ir.Value, heads: int) -> ir.Value:
        """[1, T, H * D] -> [1, H, T, D]"""
        return self.op("Transpose", self.op("Reshape", x, self.shape(1, -1, heads, self.a.head_dim)), perm=[0, 2, 1, 3])

    def from_heads(self, x: ir.Value, width: int) -> ir.Value:
        """[1, H, T, D] -> [1, T, H * D]"""
        return self.op("Reshape", self.op("Transpose", x, perm=[0, 2, 1, 3]), self.shape(1, -1, width))

    def split(self, x: ir.Value, axis: int, *sizes: int) -> Sequence[ir.Value]:
        return self.tape.op_multi_out("Split", [x, self.shape(*sizes)], {"axis": axis}, num_outputs=len(sizes))

    def angles(self) -> tuple[np.ndarray, np.ndarray]:
        """Cosine and sine [C, R / 2] of every position's rotation, float64."""
        exponent = np.arange(0, self.a.rotary_dim, 2, dtype=np.float64) / self.a.rotary_dim
        angles = np.outer(np.arange(self.context), self.a.rotary_base**-exponent)
        return np.cos(angles), np.sin(angles)

    # --- the model ---

    def build(self) -> ir.Model:
        a = self.a
        self.tokens = ir.val("tokens", ir.DataType.INT64, [1, "T"])
        self.positions = ir.val("positions", ir.DataType.INT64, [1, "T"])
        caches = [
            ir.val(f"{kind}_{layer}", self.cache_dtype, [1, block.kv_heads, self.capacity, a.head_dim])
            for layer, block in enumerate(a.layer_blocks())
            for kind in ("key", "value")
        ]
        self.prepare(caches)
        outputs: list[ir.Value] = []
        x, added = self.embed(), None
        for index, block in enumerate(a.blocks):
            if index and block.width != a.blocks[index - 1].width:
                x, added = self.widen(self.total(x, added), f"blocks.{index}.projection"), None
            self.shared = block.shared and block.layers > 1
            for depth in range(block.layers):
                stored = f"blocks.{index}.layers.{0 if block.shared else depth}."
                cache = caches[2 * self.layer : 2 * self.layer + 2]
                x, added, updated = self.decoder_layer(x, added, block, stored, cache)
                outputs += updated
                self.layer += 1
            self.shared = False
        logits = self.head(self.total(x, added))
        return self.model([self.tokens, self.positions, *self.asked, *caches], [logits, *outputs])

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
        a = self.a
        tied = a.tied_head and not self.stored.own_head
        x = self.matrices.gather_rows("embedding.weight", self.tokens, multiplied_too=tied)  # [1, T, E]
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

    def total(self, x: ir.Value, added: ir.Value | None) -> ir.Value:
        return x if added is None else self.op("Add", x, added)

    def decoder_layer(
        self, x: ir.Value, added: ir.Value | None, block: Block, name: str, cache: Sequence[ir.Value]
    ) -> tuple[ir.Value, ir.Value | None, list[ir.Value]]:
        """The residual stream x + added [1, T, W] through one layer: the same two, and the caches' outputs.

        What a layer adds last is added where the next one norms it, so that a lowering may do both at once.
        """
        if self.a.norm_placement == "post":
            attended, updated = self.attention(x, block, f"{name}attention.", cache)
            _, x = self.add_norm(x, attended, f"{name}attention_norm")
            _, x = self.add_norm(x, self.ffn(x, block, f"{name}ffn."), f"{name}ffn_norm")
            return x, None, updated
        x, normed = self.add_norm(x, added, f"{name}attention_norm")
        attended, updated = self.attention(normed, block, f"{name}attention.", cache)
        if self.a.parallel_residual:
            fed = self.ffn(self.norm(x, f"{name}ffn_norm"), block, f"{name}ffn.")
            return x, self.op("Add", attended, fed), updated
        x, normed = self.add_norm(x, attended, f"{name}ffn_norm")
        return x, self.ffn(normed, block, f"{name}ffn."), updated

    def attention(
        self, x: ir.Value, block: Block, name: str, cache: Sequence[ir.Value]
    ) -> tuple[ir.Value, list[ir.Value]]:
        names = [f"{name}query", f"{name}key", f"{name}value"]
        packed = self.linear(self.cast(x, self.half), names, [1 / math.sqrt(self.a.head_dim), 1.0, 1.0])
        y, updated = self.attend(packed, block, cache)
        return self.cast(self.linear(y, [f"{name}output"]), ir.DataType.FLOAT), updated

    @contextmanager
    def computing(self, dtype: ir.DataType) -> Iterator[None]:
        """Matrices, and what lies between them, in another type for a while."""
        usual, self.matrices.dtype = self.half, dtype
        try:
            yield
        finally:
            self.matrices.dtype = usual

    def ffn(self, x: ir.Value, block: Block, name: str) -> ir.Value:
        with self.computing(ir.DataType.FLOAT if name in self.stored.fp32_ffns else self.half):
            return self.ffn_products(x, block, name)

    def ffn_products(self, x: ir.Value, block: Block, name: str) -> ir.Value:
        x = self.cast(x, self.half)
        if self.a.gated:
            packed = self.linear(x, [f"{name}gate", f"{name}up"])
            gate, up = self.split(packed, -1, block.ffn_width, block.ffn_width)
            x = self.op("Mul", self.activation(gate), up)
        else:
            x = self.activation(self.linear(x, [f"{name}up"], before_relu=self.a.ffn == "relu"))
        return self.cast(self.linear(x, [f"{name}down"]), ir.DataType.FLOAT)

    def last_positions(self, x: ir.Value) -> ir.Value:
        """Of x [1, T, W] those whose logits leave the graph: [1, N, W]."""
        return self.slice(x, 1, -1)

    def spread(self, logits: ir.Value) -> ir.Value:
        """Logits [N, V'] of the tokens kept to [N, V]; all others are never drawn."""
        nothing = ir.tensor(np.array([-np.inf], np.float32))
        shape, places = self.shape(1, self.a.vocab_size), self.op("Unsqueeze", self.matrices.pruned_vocab(), self.shape(0))
        if self.rows != 1:
            shape = self.op("Concat", self.op("Shape", logits, end=1), self.shape(self.a.vocab_size), axis=0)
            places = self.op("Expand", places, self.op("Shape", logits))  # [N, V']
        everywhere = self.op("ConstantOfShape", shape, value=nothing)
        return self.op("ScatterElements", everywhere, places, logits, axis=1)

    def head(self, x: ir.Value) -> ir.Value:
        """Logits [N, V] float32 of the last of the T positions, of one as a rule."""
        a = self.a
        x = self.last_positions(x)
        if a.norm_placement == "pre":
            x = self.norm(x, "final_norm")
        if a.embedding_width != a.blocks[-1].width:
            x = self.widen(x, "projection_out")
        x = self.cast(self.op("Reshape", x, self.shape(1 if self.rows == 1 else -1, a.embedding_width)), self.half)
        logits = self.cast(self.matrices.head(x, a.tied_head), ir.DataType.FLOAT)
        logits = self.op("Identity", logits) if self.stored.pruned_vocab is None else self.spread(logits)
        logits.name, logits.dtype, logits.shape = "logits", ir.DataType.FLOAT, ir.Shape([self.rows, a.vocab_size])
        return logits
