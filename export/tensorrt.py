"""NVIDIA's parser and compiler over an exported graph: TensorRT 8.6 to 11, and TensorRT for RTX.

An engine is built where it will run. It is tied to the TensorRT release, to the GPU and, because kernels are timed, to
the clocks. Only TensorRT for RTX can compile for a compute capability that is named instead of read from a GPU. So a
machine without a GPU can prove that exports compile.
There are two optimization profiles: one for decode, one for chunks of a prompt and for several rows of logits. This
module knows no bundle.
"""

from __future__ import annotations

import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from merino_edge import tensorrt_library
from merino_edge.errors import UnsupportedError
from merino_edge.export.operators import OPERATORS_SINCE
from merino_edge.export.targets import PLATFORMS
from merino_edge.graph_io import LOGIT_ROWS, MAX_LOGIT_ROWS
from merino_edge.storage import Lowering

PREFILL_CHUNK = 512  # most tokens of one step
# Capabilities and precisions that TensorRT for RTX 1.7 refuses: "FP32 GEMM is not supported", "HW-specific datatypes".
NO_KERNEL = {("SM75", "fp32"), ("SM75", "int4")}
OLDEST_TARGET = "jetpack-6.2"  # of those for TensorRT
DECOMPOSABLE = "TRT_decomposable"  # NVIDIA's attribute of Attention
JETSONS = ("SM53", "SM62", "SM72", "SM87", "SM101", "SM110")
LIBRARY_BYTES = 20_000_000  # of an engine without its weights: kernels, graph
OnProgress = Callable[[str, float], None]  # (phase, the share of it that is done)


@dataclass(frozen=True)
class Engine:
    """A serialized engine.

    `capability`: the one it was compiled for; "" is that of the GPU at hand. `seconds`: how long the build took.
    `layers`: how many of each kind the parser made. `profiles`: (least, optimum, most) tokens of a step in each.
    `timings`: a timing cache of the kernels, for the next build. `weight_bytes`: of the graph's weights.
    `widening_bytes`: what they would gain at float16.
    """

    plan: bytes = field(repr=False)
    library: str
    version: str
    capability: str
    seconds: float
    layers: Counter[str]
    profiles: list[tuple[int, int, int]]
    timings: bytes = field(repr=False)
    weight_bytes: int
    widening_bytes: int

    @property
    def widened(self) -> str:
        """A warning where the engine is so large that it holds quantised weights as float16; "" where it is not.

        A library without a kernel for quantised weights widens them when it builds. A step then reads as many bytes as
        at fp16.
        """
        if len(self.plan) - self.weight_bytes < self.widening_bytes / 2 + LIBRARY_BYTES:
            return ""
        return (
            f"the engine has {len(self.plan) / 1e6:,.0f} MB for {self.weight_bytes / 1e6:,.0f} MB of weights: TensorRT "
            "stored quantised ones as float16, and a step takes as long as at fp16; try --block 128 or fp16"
        )


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
    builder = tensorrt_library.start(trt.Builder, log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    model = graph if isinstance(graph, bytes) else graph.read_bytes()
    proto = onnx.ModelProto()
    with suppress(DecodeError):  # NVIDIA's parser says what is wrong
        proto.ParseFromString(model)
    weight_bytes, widening_bytes = _weight_bytes(proto)
    native = _mark_decomposable(proto)
    if native:
        model = proto.SerializeToString()
    del proto
    _parse(trt, log, network, model, "" if isinstance(graph, bytes) else str(graph))
    del model
    config = builder.create_builder_config()
    if capability:
        _compile_for(trt, config, capability, library)
    if workspace_bytes:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace_bytes)
    times_kernels = library != tensorrt_library.RTX  # TensorRT for RTX has the calls, but they do nothing
    if times_kernels:
        use_timing_cache(config, timings, log)
    longest = min(context, PREFILL_CHUNK)
    profiles = [(1, 1, min(2, longest)), (1, longest, longest)]  # with 1..1 attention gets no fused kernel
    inputs = {network.get_input(index).name for index in range(network.num_inputs)}
    for tokens, most_rows in zip(profiles, (1, MAX_LOGIT_ROWS), strict=True):
        profile = builder.create_optimization_profile()
        for name in ("tokens", "positions"):
            profile.set_shape(name, *((1, count) for count in tokens))
        if LOGIT_ROWS in inputs:  # graphs of older bundles return one row
            profile.set_shape(LOGIT_ROWS, (1,), (most_rows,), (most_rows,))
        config.add_optimization_profile(profile)
    started = time.perf_counter()
    with _interruptible(trt, config, on_progress):
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnsupportedError(
            f"TensorRT {trt.__version__} cannot compile the graph: {log.reason()}",
            "export it again with --lowering primitive" if native else "choose another --precision or less --context",
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
        weight_bytes=weight_bytes,
        widening_bytes=widening_bytes,
    )


def default_lowering(library: str, precision: str) -> Lowering:
    """The lowering for the TensorRT that is installed: `native` where its parser has attention and the cache update."""
    if precision == "fp32":  # fused attention has none
        return "primitive"
    return "native" if _has_cache_update(library) else "primitive"


def profile_target(library: str) -> str:
    """The target whose graphs a profile times on the TensorRT that is installed: the newest that it can parse.

    So a profile has a large table in pieces where the export for that target has.
    """
    if _has_cache_update(library):
        return "rtx"  # the graphs of every target that has it are alike
    release = _release(library)
    return max(
        (name for name, platform in PLATFORMS.items() if platform.tensorrt and platform.tensorrt <= release),
        key=lambda name: PLATFORMS[name].tensorrt or (),
        default=OLDEST_TARGET,
    )


def _has_cache_update(library: str) -> bool:
    """Whether the parser of `library` takes the operator that updates the cache in place."""
    return library == tensorrt_library.RTX or _release(library) >= OPERATORS_SINCE["TensorScatter"]


def _release(library: str) -> tuple[int, ...]:
    """(major, minor) of the library that is installed."""
    trt, _ = tensorrt_library.load(library)
    return tuple(map(int, re.findall(r"\d+", trt.__version__)[:2]))


def use_timing_cache(config: Any, timings: bytes, log: Any) -> None:
    """Give the build the timing cache `timings`, or an empty one where TensorRT does not accept it.

    What the library logs about a cache that it does not accept is no reason of a later failure.
    """
    accepts_mismatch = False  # it is for this release and GPU only
    if not config.set_timing_cache(config.create_timing_cache(timings), accepts_mismatch):
        config.set_timing_cache(config.create_timing_cache(b""), accepts_mismatch)
    log.forget()


def layer_kinds(network: Any) -> Counter[str]:
    """How many layers of each kind a parsed network has, as TensorRT names the kinds."""
    return Counter(network.get_layer(index).type.name for index in range(network.num_layers))


def require_kernels(library: str, capability: str) -> None:
    """Raise UnsupportedError where `library` has no kernels for a GPU of `capability`, such as SM87.

    Full TensorRT says so itself when it builds.
    """
    if library != tensorrt_library.RTX:
        return
    trt, _ = tensorrt_library.load(library)
    names = sorted((n for n in trt.ComputeCapability.__members__ if n.startswith("SM")), key=lambda name: int(name[2:]))
    if capability not in names:
        board = "build on the board, with its own TensorRT" if capability in JETSONS else "use full TensorRT there"
        raise UnsupportedError(
            f"TensorRT for RTX has no kernels for {capability}: it knows {', '.join(names)}",
            f"{board} (pip install 'merino-edge[tensorrt]' on a PC)" if capability not in JETSONS else board,
        )


def _parse(trt: Any, log: Any, network: Any, model: bytes, path: str) -> None:
    """Fill `network` from a serialized model, whose weights lie beside the file `path`. Raises UnsupportedError."""
    parser = trt.OnnxParser(network, log)
    if parser.parse(model, path) if path else parser.parse(model):
        return
    first = parser.get_error(0)
    node = first.node_name() if hasattr(first, "node_name") else ""
    raise UnsupportedError(
        f"TensorRT {trt.__version__} cannot parse the graph: {first.desc()}{f' (node {node})' if node else ''}",
        "export it for this TensorRT: merino-edge targets lists them",
    )


def _mark_decomposable(model: onnx.ModelProto) -> bool:
    """Let attention be several kernels; whether the model has any."""
    attention = [node for node in model.graph.node if node.op_type == "Attention"]
    for node in attention:
        node.attribute.append(onnx.helper.make_attribute(DECOMPOSABLE, 1))
    return bool(attention)


def _weight_bytes(model: onnx.ModelProto) -> tuple[int, int]:
    """The bytes of the weights, in the model or in the file beside it, and how many more they have at float16."""
    added = {onnx.TensorProto.INT8: 1, onnx.TensorProto.INT4: 3}  # for each byte
    total = widening = 0
    for tensor in model.graph.initializer:
        outside = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
        size = outside[0] if outside else len(tensor.raw_data)
        total += size
        widening += added.get(tensor.data_type, 0) * size
    return total, widening


def _compile_for(trt: Any, config: Any, capability: str, library: str) -> None:
    if library != tensorrt_library.RTX:
        raise UnsupportedError("full TensorRT compiles for the GPU at hand only", "leave --capability out")
    require_kernels(library, capability)
    config.num_compute_capabilities = 1
    config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)


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
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    handlers = {one: handler for one in numbers if (handler := signal.getsignal(one)) is not signal.SIG_IGN}
    for number in handlers:
        signal.signal(number, lambda *_: stopped.set())
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    if stopped.is_set():
        raise KeyboardInterrupt
