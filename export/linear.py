"""How stored weights become initializers and products of the graph, per target and precision.

| precision | onnxruntime | TensorRT |
|---|---|---|
| fp32 | float32 | float32 |
| fp16 | float16, cast to float32 when loaded | float16 |
| int8 | int8, one scale per 32 inputs | int8, one scale per output |
| int4 | int4, one scale per 32 inputs | the same |
| the table of embeddings and head, int8 and int4 | int8, one scale per token, one table if tied | int8, float16 |

Scales are float16. For ONNX Runtime, which wants them float32 and makes them so when it loads the graph, the codes are
those of MatMulNBits and GatherBlockQuantized, kernels that read them. In the `native` lowering, which is of
ONNX's operators alone where it can be, they are a blocked DequantizeLinear and a MatMul that ONNX Runtime fuses into
that kernel, but only where the codes have one consumer and no Relu follows at once: matrices that several layers share,
and those right before a Relu, are written as MatMulNBits there too. Unfused, a further layer of a shared int8 block
took 1.40 ms instead of 0.15, and an int4 ReLU layer without biases 0.79 instead of 0.09 (docs/lab-notes.md).
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from merino_edge.counts import INT4_BLOCK
from merino_edge.export.quantize import EMBEDDING, HEAD, Quantized, StoredWeights
from merino_edge.export.targets import Target

MICROSOFT = "com.microsoft"  # ONNX Runtime's own operators
LARGEST_BLOCK = 256  # inputs with one scale, of MatMulNBits


class MatrixWriter:
    """Adds weights and their products to a tape, every weight once however often it is used."""

    def __init__(self, tape: Tape, target: Target, stored: StoredWeights) -> None:
        self.tape, self.target, self.stored = tape, target, stored
        self.dtype = target.compute_dtype
        self.values: dict[str, ir.Value] = {}
        self.kernel_forms: dict[str, tuple[ir.Value, ir.Value, int]] = {}

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self.values:
            self.values[name] = self.tape.initializer(ir.tensor(np.ascontiguousarray(array), name=name))
        return self.values[name]

    def matmul(
        self,
        x: ir.Value,
        names: Sequence[str],
        factors: Sequence[float] = (),
        bias: ir.Value | None = None,
        unfused: bool = False,
    ) -> ir.Value:
        """x [.., K] times the weights `names` [N_i, K], stacked along N and each times its factor, plus a bias
        [sum N_i] -> [.., sum N_i].

        `unfused`: ONNX Runtime would not fuse a DequantizeLinear here.
        """
        name = "+".join(names) + ".weight"
        factors = factors or [1.0] * len(names)
        quantized = f"{names[0]}.weight" in self.stored.quantized
        if quantized and not self.target.on_tensorrt:
            q = self._stacked(names, factors)
            if unfused or self.target.lowering != "native" or q.codes.shape[1] == 1:
                return self._matmul_nbits(x, name, q, bias)
        if name not in self.values:
            if quantized:
                self.values[name] = self._dequantized(name, self._stacked(names, factors))
            else:
                parts = [self.stored.arrays[f"{n}.weight"] * np.float32(f) for n, f in zip(names, factors, strict=True)]
                weight = np.concatenate(parts).astype(self.stored.arrays[f"{names[0]}.weight"].dtype)
                self.values[name] = self._computed(self.initializer(f"stored.{name}", weight.T))
        product = self.tape.op("MatMul", [x, self.values[name]])
        return product if bias is None else self.tape.op("Add", [product, bias])

    def _stacked(self, names: Sequence[str], factors: Sequence[float]) -> Quantized:
        """Quantised matrices of one bit width as one, along N; a factor is one of the scales."""
        parts = [self.stored.quantized[f"{name}.weight"] for name in names]
        scales = [part.scales * np.float32(factor) for part, factor in zip(parts, factors, strict=True)]
        return Quantized(np.concatenate([part.codes for part in parts]), np.concatenate(scales), parts[0].bits)

    def _matmul_nbits(self, x: ir.Value, name: str, q: Quantized, bias: ir.Value | None) -> ir.Value:
        """com.microsoft.MatMulNBits: codes [N, G, B * bits / 8] uint8 with the middle as zero, scales [N, G]."""
        codes, scales, block = self._kernel_form(name, q)
        inputs: list[ir.Value | None] = [x, codes, scales]
        inputs += [None, None, bias] if bias is not None else []
        shape = {"K": q.codes[0].size, "N": len(q.codes), "bits": q.bits, "block_size": block, "accuracy_level": 4}
        return self.tape.op("MatMulNBits", inputs, shape, domain=MICROSOFT)

    def _kernel_form(self, name: str, q: Quantized) -> tuple[ir.Value, ir.Value, int]:
        """Codes and scales as ONNX Runtime's kernels read them, and how many inputs share a scale there: of a row that
        has one scale, the largest power of two that divides it."""
        if name in self.kernel_forms:
            return self.kernel_forms[name]
        outputs, groups, block = q.codes.shape
        if groups == 1:
            block = min(block & -block, LARGEST_BLOCK)
        codes = (q.codes.astype(np.int16) + (1 << (q.bits - 1))).astype(np.uint8).reshape(outputs, -1, block)
        if q.bits == 4:
            codes = np.bitwise_or(codes[..., 0::2], np.left_shift(codes[..., 1::2], 4, dtype=np.uint8))
        scales = self._computed(self.initializer(f"{name}.scale", q.scales.astype(np.float16)))
        if groups == 1:
            shape = self.initializer(f"{name}.scales", np.array([outputs, codes.shape[1]], np.int64))
            scales = self.tape.op("Expand", [scales, shape])
        self.kernel_forms[name] = self.initializer(name, codes), scales, block
        return self.kernel_forms[name]

    def head(self, x: ir.Value, tied: bool) -> ir.Value:
        """x [1, E] -> [1, V]. A tied table is stored once; unquantised, the matrix stays [V, E]."""
        if self.stored.own_head:
            return self.matmul(x, ["head"])
        name = EMBEDDING if tied else HEAD
        if name in self.stored.quantized:
            return self._matmul_nbits(x, name, self.stored.quantized[name], None)
        table = self._computed(self.initializer(name, self.stored.arrays[name]))
        return self.tape.op("Gemm", [x, table], {"transB": 1})

    def gather_rows(self, name: str, rows: ir.Value) -> ir.Value:
        """Rows of the table `name` [V, E] as float32: [1, T, E]."""
        if name in self.stored.quantized:
            q = self.stored.quantized[name]
            codes, scales, block = self._kernel_form(name, q)
            shape = self.initializer(f"{name}.blocks", np.array([len(q.codes), -1, 1], np.int64))
            inputs = [codes, rows, self.tape.op("Reshape", [scales, shape])]
            attributes = {"bits": q.bits, "block_size": block, "gather_axis": 0, "quantize_axis": 2}
            taken = self.tape.op("GatherBlockQuantized", inputs, attributes, domain=MICROSOFT)  # [1, T, G, B]
            whole = self.initializer(f"{name}.row", np.array([1, -1, q.codes[0].size], np.int64))
            return self.tape.op("Reshape", [taken, whole])
        table = self.stored.arrays[name]
        taken = self.tape.op("Gather", [self.initializer(name, table), rows])
        return taken if table.dtype == np.float32 else self._cast(taken, ir.DataType.FLOAT)

    def _dequantized(self, name: str, q: Quantized) -> ir.Value:
        """The matrix [N, K] as the right-hand operand [K, N] of a MatMul.

        Scales have the type of the product. ONNX Runtime gets them by a cast, which it does once; TensorRT wants them
        as they are, and before opset 19 float32.
        """
        codes = q.codes.reshape(len(q.codes), -1).T  # [K, N]
        scales = q.scales.T  # [G, N]
        code_type = ml_dtypes.int4 if q.bits == 4 else np.int8
        inputs = [self.initializer(f"stored.{name}", codes.astype(code_type))]
        blocked = q.bits == 4 or self.target.blocks_int8
        scale = scales if blocked else scales[0]
        attributes = {"axis": 0, "block_size": INT4_BLOCK} if blocked else {"axis": 1}
        dtype = self.dtype if self.target.opset >= 19 else ir.DataType.FLOAT
        stored = dtype if self.target.on_tensorrt else ir.DataType.FLOAT16
        kept = self.initializer(f"stored.{name}.scale", scale.astype(stored.numpy()))
        inputs.append(kept if stored == dtype else self._cast(kept, dtype))
        matrix = self.tape.op("DequantizeLinear", inputs, attributes)
        return matrix if dtype == self.dtype else self._cast(matrix, self.dtype)

    def _computed(self, stored: ir.Value) -> ir.Value:
        """A float weight in the type that matrices compute in."""
        if stored.dtype == self.dtype:
            return stored
        name = f"{stored.name} as {self.dtype.name}"
        if name not in self.values:
            self.values[name] = self._cast(stored, self.dtype)
        return self.values[name]

    def _cast(self, x: ir.Value, dtype: ir.DataType) -> ir.Value:
        return self.tape.op("Cast", [x], {"to": dtype.value})
