"""NVIDIA's own parser and compiler over an exported graph: TensorRT for RTX, which needs no GPU to build.

Two builder settings make that possible: the target compute capability is named instead of read from a
device. `compile_for` is how an export for the `rtx` target is proven to be accepted; it keeps no engine.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge.errors import UnsupportedError, require


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: `engine_bytes` for compute capability `capability`, in `seconds`."""

    capability: str
    engine_bytes: int
    seconds: float
    version: str


def compile_for(graph: Path, context: int, capability: str = "SM86") -> Compiled:
    """Parse and compile `graph` (model.onnx with its data beside it) for a GPU that need not be here.

    The profile covers one to `context` new tokens. Raises UnsupportedError with the parser's or the builder's
    first message, MissingExtraError without the package.
    """
    require("tensorrt_rtx_bindings", "rtx")
    import tensorrt_rtx_bindings as trt

    log = _Log(trt)
    builder = trt.Builder(log.logger)
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log.logger)
    if not parser.parse_from_file(str(graph)):
        first = parser.get_error(0)
        raise UnsupportedError(
            f"TensorRT cannot parse {graph}: {first.desc()} (node {first.node_name()})",
            "export with another --target or --precision",
        )
    config = builder.create_builder_config()
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    profile = builder.create_optimization_profile()
    for name in ("tokens", "positions"):
        profile.set_shape(name, (1, 1), (1, 1), (1, context))
    config.add_optimization_profile(profile)
    started = time.perf_counter()
    engine = builder.build_serialized_network(network, config)
    if engine is None:
        raise UnsupportedError(
            f"TensorRT cannot compile {graph} for {capability}: {log.first_error()}", "export with another --precision"
        )
    return Compiled(capability, int(engine.nbytes), time.perf_counter() - started, str(trt.__version__))


class _Log:
    """Collects the compiler's errors instead of printing them."""

    def __init__(self, trt: Any) -> None:
        errors: list[str] = []

        class Collector(trt.ILogger):  # type: ignore[misc,name-defined]
            def log(self, severity: Any, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    errors.append(message)

        self.errors = errors
        self.logger = Collector()

    def first_error(self) -> str:
        return self.errors[0] if self.errors else "no reason given"
