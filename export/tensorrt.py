"""NVIDIA's parser and compiler over an exported graph: TensorRT 8.6 to 11, and TensorRT for RTX.

An engine is built where it will run. It is tied to the TensorRT release, to the GPU and, because kernels are timed, to
the clocks. Only TensorRT for RTX can compile for a compute capability that is named instead of read from a GPU. So a
machine without a GPU can prove that exports compile.
There are two optimization profiles: one for decode, one for chunks of a prompt. This module knows no bundle.
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

PREFILL_CHUNK = 512  # most tokens of one step
# Capabilities and precisions that TensorRT for RTX 1.7 refuses: "FP32 GEMM is not supported", "HW-specific datatypes".
NO_KERNEL = {("SM75", "fp32"), ("SM75", "int4")}
OnProgress = Callable[[str, float], None]  # (phase, the share of it that is done)


@dataclass(frozen=True)
class Engine:
    """A serialized engine.

    `capability`: the one it was compiled for; "" is that of the GPU at hand. `seconds`: how long the build took.
    `layers`: how many of each kind the parser made. `profiles`: (least, optimum, most) tokens of a step in each.
    `timings`: a timing cache of the kernels, for the next build.
    """

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
    *,
    workspace_bytes: int = 0,
    on_progress: OnProgress | None = None,
    timings: bytes = b"",
) -> Engine:
    """Compile `graph` (the path of a graph with its data beside it, or a serialized model).

    A step has at most `PREFILL_CHUNK` tokens. `capability`, such as SM86, replaces the GPU at hand (TensorRT for RTX
    only). `workspace_bytes` bounds the memory of a kernel; 0 leaves the library's own limit.
    `timings`: the timing cache of an earlier build, which spares timing the same kernels. One of another release or
    GPU, or damaged bytes, are ignored.

    Raises MissingExtraError where the library is not installed. Raises UnsupportedError with the first message of the
    parser or the compiler, and KeyboardInterrupt where the user interrupts the build.
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
    times_kernels = library != tensorrt_library.RTX  # TensorRT for RTX has the calls, but they do nothing
    if times_kernels:
        use_timing_cache(config, timings)
    longest = min(context, PREFILL_CHUNK)
    profiles = [(1, 1, min(2, longest)), (1, longest, longest)]  # with 1..1 attention gets no fused kernel
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
        plan=bytes(plan),
        library=library,
        version=str(trt.__version__),
        capability=capability,
        seconds=time.perf_counter() - started,
        layers=layer_kinds(network),
        profiles=profiles,
        timings=bytes(config.get_timing_cache().serialize()) if times_kernels else b"",
    )


def use_timing_cache(config: Any, timings: bytes) -> None:
    """Give the build the timing cache `timings`, or an empty one where TensorRT does not accept it."""
    accepts_mismatch = False  # it is for this release and GPU only
    if not config.set_timing_cache(config.create_timing_cache(timings), accepts_mismatch):
        config.set_timing_cache(config.create_timing_cache(b""), accepts_mismatch)


def layer_kinds(network: Any) -> Counter[str]:
    """How many layers of each kind a parsed network has, as TensorRT names the kinds."""
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def _network_flags(trt: Any) -> int:
    """The flags of a strongly typed network, which exists from 9.0 on; before, those of an explicit batch dimension."""
    flags = trt.NetworkDefinitionCreationFlag
    name = "STRONGLY_TYPED" if hasattr(flags, "STRONGLY_TYPED") else "EXPLICIT_BATCH"
    return 1 << int(getattr(flags, name))


def _weak_precisions(trt: Any, network: Any) -> list[str]:
    """Flags that let a network without strong typing (TensorRT 8.6) compute in the types of its graph."""
    if hasattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED"):
        return []
    types = {network.get_input(index).dtype for index in range(network.num_inputs)}
    return (["FP16"] if trt.DataType.HALF in types else []) + ["INT8"]


def _compile_for(trt: Any, config: Any, capability: str) -> None:
    capabilities = getattr(trt, "ComputeCapability", None)
    if capabilities is None:
        raise UnsupportedError("full TensorRT compiles for the GPU at hand only", "leave --capability out")
    if not hasattr(capabilities, capability):
        names = ", ".join(sorted(name for name in capabilities.__members__ if name.startswith("SM")))
        raise UnsupportedError(f"TensorRT for RTX does not know {capability!r}", f"choose one of: {names}")
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(capabilities, capability), 0)


@contextmanager
def _interruptible(trt: Any, config: Any, on_progress: OnProgress | None) -> Iterator[None]:
    """Let Ctrl-C end a build between two of its steps, since an exception cannot pass through the compiler's C++."""
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
