"""NVIDIA's own parser and compiler over an exported graph: from TensorRT 8.6 to 11, and TensorRT for RTX.

An engine is built where it will run: it is tied to the release, the GPU and, since its kernels are timed, the clocks.
TensorRT for RTX alone compiles for a compute capability that is named instead of read from a GPU, which is how exports
are proven to compile on a machine without one. Two optimization profiles: one for decode, one for chunks of a prompt.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from merino_edge import tensorrt_library
from merino_edge.errors import UnsupportedError

PREFILL_CHUNK = 512  # tokens run at once
# Capability and precision that TensorRT for RTX 1.7 refuses: "FP32 GEMM is not supported", "HW-specific datatypes".
NO_KERNEL = {("SM75", "fp32"), ("SM75", "int4")}
OnProgress = Callable[[str, float], None]  # (phase, share of it that is done)


@dataclass(frozen=True)
class Engine:
    """A serialized engine. `layers`: how many of each kind the parser made, `capability`: "" for the GPU at hand,
    `profiles`: (least, optimum, most) tokens of a step in each, `timings`: of kernels, for the next build."""

    plan: bytes = field(repr=False)
    library: str
    version: str
    capability: str
    seconds: float
    layers: Counter[str]
    profiles: list[tuple[int, int, int]]
    timings: bytes = field(repr=False)


def build_engine(
    library: str,
    graph: Path | bytes,
    context: int,
    capability: str = "",
    workspace_bytes: int = 0,
    on_progress: OnProgress | None = None,
    timings: bytes = b"",
) -> Engine:
    """Compile `graph` (model.onnx with its data beside it, or a serialized model) for steps of up to 512 tokens.

    `capability`, such as SM86, instead of the GPU at hand: TensorRT for RTX only. `workspace_bytes` bounds what a
    kernel may use (0: the library's own limit). `timings` of an earlier build spare those of the same kernels; what
    another release or GPU left, or anything else, is not used. Raises MissingExtraError, UnsupportedError with the
    parser's or the compiler's first message, KeyboardInterrupt when it was interrupted.
    """
    trt, log = tensorrt_library.load(library)
    builder = trt.Builder(log)
    network = builder.create_network(_network_flags(trt))
    parser = trt.OnnxParser(network, log)
    parsed = parser.parse(graph) if isinstance(graph, bytes) else parser.parse_from_file(str(graph))
    if not parsed:
        first = parser.get_error(0)
        node = first.node_name() if hasattr(first, "node_name") else ""
        raise UnsupportedError(
            f"TensorRT {trt.__version__} cannot parse the graph: {first.desc()}{f' (node {node})' if node else ''}",
            "export it for this TensorRT: merino-edge targets lists them",
        )
    config = builder.create_builder_config()
    if capability:
        _compile_for(trt, config, capability)
    if workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    for name in _weak_precisions(trt, network):
        config.set_flag(getattr(trt.BuilderFlag, name))
    times_kernels = library != tensorrt_library.RTX  # whose calls for it do nothing
    if times_kernels:
        use_timing_cache(config, timings)
    longest = min(context, PREFILL_CHUNK)
    profiles = [(1, 1, min(2, longest)), (1, longest, longest)]  # 1..1 finds no fused kernel for attention
    for tokens in profiles:
        profile = builder.create_optimization_profile()
        for name in ("tokens", "positions"):
            profile.set_shape(name, *((1, count) for count in tokens))
        config.add_optimization_profile(profile)
    started = time.perf_counter()
    with _interruptible(trt, config, on_progress):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnsupportedError(
            f"TensorRT {trt.__version__} cannot compile the graph: {log.first}",
            "choose another --precision, or export with less --context",
        )
    return Engine(
        bytes(plan),
        library,
        str(trt.__version__),
        capability,
        time.perf_counter() - started,
        layer_kinds(network),
        profiles,
        bytes(config.get_timing_cache().serialize()) if times_kernels else b"",
    )


def use_timing_cache(config: Any, timings: bytes) -> None:
    if not config.set_timing_cache(config.create_timing_cache(timings), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def layer_kinds(network: Any) -> Counter[str]:
    """How many layers of each kind a parsed network has, as TensorRT names the kinds."""
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def _network_flags(trt: Any) -> int:
    """Strongly typed where there is such a thing (from 9.0 on); an explicit batch dimension before."""
    flags = trt.NetworkDefinitionCreationFlag
    name = "STRONGLY_TYPED" if hasattr(flags, "STRONGLY_TYPED") else "EXPLICIT_BATCH"
    return 1 << int(getattr(flags, name))


def _weak_precisions(trt: Any, network: Any) -> list[str]:
    """Flags that let a network without strong typing (TensorRT 8.6) compute in the types its graph has."""
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return []
    types = {network.get_input(index).dtype for index in range(network.num_inputs)}
    return (["FP16"] if trt.DataType.HALF in types else []) + ["INT8"]


def _compile_for(trt: Any, config: Any, capability: str) -> None:
    known = getattr(trt, "ComputeCapability", None)
    if known is None:
        raise UnsupportedError("full TensorRT compiles for the GPU at hand only", "leave --capability out")
    if not hasattr(known, capability):
        names = ", ".join(sorted(name for name in known.__members__ if name.startswith("SM")))
        raise UnsupportedError(f"TensorRT for RTX does not know {capability!r}", f"choose one of: {names}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(known, capability), 0)


@contextmanager
def _interruptible(trt: Any, config: Any, on_progress: OnProgress | None) -> Iterator[None]:
    """Let Ctrl-C end a build between two of its steps: an exception cannot leave the compiler through C++."""
    if not hasattr(trt, "IProgressMonitor"):
        yield
        return
    stopped = threading.Event()

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc,name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.steps: dict[str, int] = {}

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps

        def phase_finish(self, phase_name: str) -> None:
            self.steps.pop(phase_name, None)

        def step_complete(self, phase_name: str, step: int) -> bool:
            if on_progress is not None and self.steps.get(phase_name):
                on_progress(phase_name, (step + 1) / self.steps[phase_name])
            return not stopped.is_set()

    config.progress_monitor = Monitor()
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    for number in handlers:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped.is_set():
        raise KeyboardInterrupt
