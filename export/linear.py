"""How stored weights become initializers and products of the graph, per target and precision.

| precision | onnxruntime | rtx |
|---|---|---|
| fp32 | float32 | - |
| fp16 | float16, cast to float32 when loaded | float16 |
| int8 | int8, one float32 scale per 32 inputs | int8, one float16 scale per output |
| int4 | int4, one float32 scale per 32 inputs; head int8 | int4, one float16 scale per 32 inputs; head int8 |

ONNX Runtime fuses a blocked DequantizeLinear and its MatMul into one kernel that reads the codes.
"""

from __future__ import annotations

from collections.abc import Sequence

import ml_dtypes
import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from merino_edge.counts import INT4_BLOCK
from merino_edge.export.quantize import Quantized, StoredWeights
from merino_edge.export.targets import Target


class MatrixWriter:
    """Adds weights and their products to a tape, every weight once however often it is used."""

    def __init__(self, tape: Tape, target: Target, stored: StoredWeights) -> None:
        self.tape, self.target, self.stored = tape, target, stored
        self.dtype = target.compute_dtype
        self.values: dict[str, ir.Value] = {}

    def initializer(self, name: str, array: np.ndarray) -> ir.Value:
        if name not in self.values:
            self.values[name] = self.tape.initializer(ir.tensor(np.ascontiguousarray(array), name=name))
        return self.values[name]

    def matmul(self, x: ir.Value, names: Sequence[str], factors: Sequence[float]) -> ir.Value:
        """x [.., K] times the weights `names` [N_i, K], stacked along N and each times its factor -> [.., sum N_i]."""
        name = "+".join(names) + ".weight"
        if name not in self.values:
            parts = [_scaled(self.stored[f"{n}.weight"], f) for n, f in zip(names, factors, strict=True)]
            self.values[name] = self._matrix(name, parts)
        return self.tape.op("MatMul", [x, self.values[name]])

    def head(self, x: ir.Value, tied: bool) -> ir.Value:
        """x [1, E] -> [1, V]. Unquantised, the matrix stays [V, E], so that a tied table is stored once."""
        if isinstance(self.stored.get("head.weight"), Quantized):
            return self.matmul(x, ["head"], [1.0])
        return self.tape.op("Gemm", [x, self._table("embedding.weight" if tied else "head.weight")], {"transB": 1})

    def gather_rows(self, name: str, rows: ir.Value) -> ir.Value:
        """Rows of the table `name` [V, E] as float32: [1, T, E]."""
        table = self.stored[name]
        taken = self.tape.op("Gather", [self.initializer(name, table), rows])
        return taken if table.dtype == np.float32 else self._cast(taken, ir.DataType.FLOAT)

    def _table(self, name: str) -> ir.Value:
        return self._computed(self.initializer(name, self.stored[name]))

    def _matrix(self, name: str, parts: Sequence[np.ndarray | Quantized]) -> ir.Value:
        """The stacked parts [N, K] as the right-hand operand [K, N] of a MatMul."""
        if not isinstance(parts[0], Quantized):
            return self._computed(self.initializer(f"stored.{name}", np.concatenate(parts).T))
        codes = np.concatenate([part.codes.reshape(len(part.codes), -1) for part in parts]).T  # [K, N]
        scales = np.concatenate([part.scales for part in parts]).T  # [G, N]
        code_type = ml_dtypes.int4 if parts[0].bits == 4 else np.int8
        inputs = [self.initializer(f"stored.{name}", codes.astype(code_type))]
        blocked = len(scales) * INT4_BLOCK == len(codes)
        scale = scales if blocked else scales[0]
        inputs.append(self.initializer(f"stored.{name}.scale", scale.astype(self.dtype.numpy())))
        attributes = {"axis": 0, "block_size": INT4_BLOCK} if blocked else {"axis": 1}
        return self.tape.op("DequantizeLinear", inputs, attributes)

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


def _scaled(weight: np.ndarray | Quantized, factor: float) -> np.ndarray | Quantized:
    if factor == 1.0:
        return weight
    if isinstance(weight, Quantized):
        return Quantized(weight.codes, weight.scales * np.float32(factor), weight.bits)
    return (weight * factor).astype(weight.dtype)
