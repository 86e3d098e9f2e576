"""What a bundle is built for, as data: element types, cache form, and how quantised weights are stored.

`onnxruntime` runs on any CPU through ONNX Runtime from 1.25 on. `onnxruntime-1.23` is the same for 1.23, the last with
packages for Python 3.10 (JetPack 6), and later ones: opset 23, so without TensorScatter. `rtx` is parsed and compiled
by TensorRT for RTX and by TensorRT from 10.15 on (JetPack 7.2), where the native lowering's operators exist. ONNX
Runtime runs the `rtx` graph too, slowly: that is how its numbers are checked without a GPU.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from merino_edge.counts import PRECISIONS
from merino_edge.errors import UnsupportedError

TARGETS = ("onnxruntime", "onnxruntime-1.23", "rtx")


@dataclass(frozen=True)
class Target:
    """One target at one precision. `compute_dtype`: of matrices' activations and of the cache."""

    name: str
    precision: str
    compute_dtype: ir.DataType
    static_cache: bool  # the cache's capacity is fixed in the graph (TensorRT), or symbolic (ONNX Runtime)
    opset: int = 24
    tensor_scatter: bool = True  # writes the cache; came with opset 24
    fuses_int8: bool = True  # ONNX Runtime makes one kernel of an int8 DequantizeLinear and its MatMul

    @staticmethod
    def named(name: str, precision: str) -> Target:
        """Raises UnsupportedError for an unknown target or a precision the target cannot run."""
        if name not in TARGETS:
            raise UnsupportedError(f"unknown target {name!r}", f"choose one of: {', '.join(TARGETS)}")
        if precision not in PRECISIONS:
            raise UnsupportedError(f"unknown precision {precision!r}", f"choose one of: {', '.join(PRECISIONS)}")
        if name == "rtx":
            if precision == "fp32":
                raise UnsupportedError("TensorRT's fused attention has no fp32 kernel", "export --precision fp16")
            return Target(name, precision, ir.DataType.FLOAT16, static_cache=True)
        native = Target(name, precision, ir.DataType.FLOAT, static_cache=False)
        if name == "onnxruntime-1.23":
            return replace(native, opset=23, tensor_scatter=False, fuses_int8=False)
        return native
