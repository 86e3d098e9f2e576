"""How one weight matrix is stored in the graph and multiplied, per target and precision.

| precision | onnxruntime | rtx |
|---|---|---|
| fp32 | float32 | - |
| fp16 | float16, cast to float32 when loaded | float16 |
| int8 | int8, one scale per 32 inputs | int8, one scale per output |
| int4 | int4, one float32 scale per 32 inputs; head int8 | int4, one float16 scale per 32 inputs; head int8 |

With int8 and int4 the embedding is a float16 table of its own (one row of it is read per step), while
the head, all of which is read every step, is int8: a tied table is then stored twice.
"""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from merino_edge.counts import INT4_BLOCK
from merino_edge.errors import UnsupportedError
from merino_edge.export.quantize import Quantized, int4_blocks, int8_rows
from merino_edge.export.targets import Target


class MatrixWriter:
    """Adds matrices and their products to a tape. Weights come as [N, K] float32 (out, in)."""

    def __init__(self, tape: Tape, target: Target) -> None:
        self.tape, self.target = tape, target
        self.dtype = target.compute_dtype
        self.quantized = target.precision in ("int8", "int4")
        self.dequantized: dict[str, ir.Value] = {}

    def _store(self, name: str, array: np.ndarray) -> ir.Value:
        return self.tape.initializer(ir.tensor(np.ascontiguousarray(array), name=name))

    def matmul(self, x: ir.Value, name: str, weight: np.ndarray) -> ir.Value:
        """x [.., K] times the transpose of weight [N, K] -> [.., N]. Shared layers store it once."""
        if name not in self.dequantized:
            self.dequantized[name] = self._matrix(name, weight)
        return self.tape.op("MatMul", [x, self.dequantized[name]])

    def head(self, x: ir.Value, name: str, weight: np.ndarray) -> ir.Value:
        """x [1, E] -> [1, V]. Unquantised, the matrix stays [V, E], so that a tied embedding is stored once."""
        if self.quantized:  # at int4 a head would cost more accuracy than all layers together
            matrix = self._int8(f"head.{name}" if name in self.dequantized else name, weight)
            return self.tape.op("MatMul", [x, matrix])
        return self.tape.op("Gemm", [x, self._table(name, weight)], {"transB": 1})

    def gather_rows(self, name: str, weight: np.ndarray, rows: ir.Value) -> ir.Value:
        """Rows of the table weight [V, E] as float32: [1, T, E]."""
        if self.quantized:
            self.dequantized[name] = self._store(name, weight.astype(np.float16))
            return self.as_float(self.tape.op("Gather", [self.dequantized[name], rows]))
        taken = self.tape.op("Gather", [self._table(name, weight), rows])
        return taken if self.dtype == ir.DataType.FLOAT else self.as_float(taken)

    def _table(self, name: str, weight: np.ndarray) -> ir.Value:
        """weight [V, E] in the type that matrices compute in, stored once."""
        if name not in self.dequantized:
            self.dequantized[name] = self._float(name, weight)
        return self.dequantized[name]

    def _float(self, name: str, array: np.ndarray) -> ir.Value:
        if self.target.precision == "fp32":
            return self._store(name, array.astype(np.float32))
        stored = self._store(name, array.astype(np.float16))
        return stored if self.dtype == ir.DataType.FLOAT16 else self.as_float(stored)

    def as_float(self, x: ir.Value) -> ir.Value:
        return self.tape.op("Cast", [x], {"to": ir.DataType.FLOAT.value})

    def _matrix(self, name: str, weight: np.ndarray) -> ir.Value:
        """weight [N, K] as the right-hand operand [K, N] of a MatMul."""
        if not self.quantized:
            return self._float(name, weight.T)
        return self._int4(name, weight) if self.target.precision == "int4" else self._int8(name, weight)

    def _int4(self, name: str, weight: np.ndarray) -> ir.Value:
        _require_blocks(name, weight)
        return self._dequantize(name, int4_blocks(weight), ml_dtypes.int4, blocked=True)

    def _int8(self, name: str, weight: np.ndarray) -> ir.Value:
        if self.target.name == "rtx":  # TensorRT knows blocks for int4 only
            return self._dequantize(name, int8_rows(weight), np.int8, blocked=False)
        _require_blocks(name, weight)
        return self._dequantize(name, int8_rows(weight, INT4_BLOCK), np.int8, blocked=True)

    def _dequantize(self, name: str, q: Quantized, code_type: type, blocked: bool) -> ir.Value:
        codes = self._store(name, q.codes.reshape(len(q.codes), -1).T.astype(code_type))  # [K, N]
        scales = q.scales.T if blocked else q.scales[:, 0]  # [K / 32, N] or [N]
        dtype = self.dtype.numpy()
        least = np.finfo(dtype).smallest_subnormal  # a scale that rounds to 0 is refused by TensorRT
        scale = self._store(f"{name}.scale", np.maximum(scales.astype(dtype), least))
        attributes = {"axis": 0, "block_size": INT4_BLOCK} if blocked else {"axis": 1}
        return self.tape.op("DequantizeLinear", [codes, scale], attributes)


def _require_blocks(name: str, weight: np.ndarray) -> None:
    if weight.shape[1] % INT4_BLOCK:
        raise UnsupportedError(f"{name} has {weight.shape[1]} inputs, not a multiple of {INT4_BLOCK}",
                               "export --precision fp16")  # fmt: skip
