"""The engine build: it compiles a bundle for a GPU, an engine for each of the bundle's contexts.

Engines for this machine's GPU go into the engine store, so the bundle may be read-only. Engines for a capability that
was named go into the bundle, which carries them to their machine. The disk and the memory are checked first. The entry
of an engine, in the store or in "engines" of the bundle's manifest:

    {"file", "library", "version", "capability", "machine", "precision", "context", "lowering", "profiles",
     "onnx_sha256", "seconds", "bytes", "peak_memory_bytes", "layers": {kind: count}}

"profiles" holds the [least, optimum, most] tokens of a step for each optimization profile. "peak_memory_bytes" is how
far the machine's free memory fell (`merino_edge.runtime.memory`). Kernel timings are kept in the store, so that the
next build is faster. The compiler itself is `merino_edge.export.tensorrt`.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merino_edge import engine_store, limits, store_limit, tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.bundle import Bundle, add_engine
from merino_edge.engine_store import BuiltEngine, add_stored
from merino_edge.errors import UnsupportedError
from merino_edge.export.targets import PLATFORMS, TARGETS
from merino_edge.export.tensorrt import Engine, build_engine, default_lowering, require_kernels
from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.kernel_timings import KernelTimings
from merino_edge.runtime.cuda.cuda import gpu_capability
from merino_edge.runtime.memory import NVMAP, MemoryWatch, free_text, gpu_free_bytes, meminfo_bytes

WORKSPACE_SHARE = 0.25  # of the free memory, for timing kernels
MIN_WORKSPACE_MB = 64
# The peak memory of a build without the workspace: the library's own, and for each byte of the graph
# (benchmarks/compile_engines.py).
LIBRARY_BYTES, PEAK_OVER_GRAPH = 500_000_000, 3
# A measured peak counts other programs' memory too. One that is further from the estimate is theirs, or damaged.
MOST_OVER_ESTIMATE = 3
KERNEL_BYTES = 25_000_000  # of an engine's file without its weights (benchmarks/compile_engines.py)
OUT_OF_MEMORY = re.compile(r"out ?of ?memory|insufficient memory|cannot allocate|allocation|error 12\b", re.IGNORECASE)


@dataclass(frozen=True)
class BuildPlan:
    """What a build of `bundle` needs: the library, the GPU, the memory, and the folder of its engines."""

    bundle: Bundle
    library: str
    capability: str  # compute capability to compile for; "": this machine's GPU
    gpu_capability: str
    workspace_bytes: int
    needed_bytes: int
    is_measured: bool  # whether `needed_bytes` is the last build's, which holds its workspace
    free_bytes: int
    folder: Path

    def __str__(self) -> str:
        needed_mb, workspace_mb, free_mb = (
            size / 1e6 for size in (self.needed_bytes, self.workspace_bytes, self.free_bytes)
        )
        more = "with its" if self.is_measured else f"and up to {workspace_mb:,.0f} MB of"
        return (
            f"needs about {needed_mb:,.0f} MB {more} workspace; {free_mb:,.0f} MB are free; engines go to {self.folder}"
        )


def plan_build(bundle: Bundle, capability: str = "", workspace_mb: int | None = None) -> BuildPlan:
    """Check whether `bundle` can be compiled here, before minutes of work.

    Raises UnsupportedError where its target has no engines, or GPU or memory are missing. Raises MissingExtraError
    where TensorRT is missing, InputError where `workspace_mb` or the store's limit is out of range, and OutputError
    where the engines cannot be written.
    """
    platform = PLATFORMS.get(bundle.target)
    if platform is None or platform.tensorrt is None:
        targets = ", ".join(name for name in TARGETS if PLATFORMS[name].tensorrt)
        raise UnsupportedError(
            f"{bundle.path} was exported for {bundle.target}, which TensorRT does not parse",
            f"export it with --target, one of {targets}",
        )
    if workspace_mb is not None:
        limits.check_range("workspace-mb", workspace_mb, 1, limits.MAX_WORKSPACE_MB)
    library = tensorrt_library.RTX if capability else tensorrt_library.installed()
    here = "" if capability else gpu_capability()
    require_kernels(library, capability or here)
    graph_bytes = sum(file["bytes"] for name, file in bundle.manifest["files"].items() if name.startswith("model"))
    room_bytes = len(bundle.contexts) * most_engine_bytes(bundle.architecture, bundle.precision, graph_bytes)
    if capability:
        folder = bundle.path
        elsewhere = "copy the bundle to a folder that you may write, and build the copy"
        engine_store.check_room(folder, room_bytes, elsewhere)
    else:
        folder = engine_store.store_folder()
        engine_store.check_room(folder, room_bytes)
        store_limit.limit_bytes()  # is a number
    ram = gpu_free_bytes() or 0
    free = ram + (meminfo_bytes("SwapFree") or 0)
    estimate = LIBRARY_BYTES + PEAK_OVER_GRAPH * graph_bytes
    measured = _measured_bytes(bundle, library, estimate)
    needed = measured or estimate
    workspace = workspace_mb * 1_000_000 if workspace_mb else usual_workspace_bytes()
    if needed > free:
        raise UnsupportedError(
            f"building needs about {needed / 1e6:,.0f} MB, {free_text()} ({NVMAP})",
            "close programs, add swap (merino-edge doctor says how), or export at a lower --precision",
        )
    return BuildPlan(bundle, library, capability, here, workspace, needed, measured > 0, free, folder)


def most_engine_bytes(a: Architecture, precision: str, graph_bytes: int) -> int:
    """The most bytes of an engine's file: it holds all weights, and some heads a second time.

    A head of 50,257 words is held once more, padded for its kernel; one of 50,272 is not.
    """
    table_bytes = a.vocab_size * a.embedding_width * (4 if precision == "fp32" else 2)
    return graph_bytes + table_bytes + KERNEL_BYTES


def usual_workspace_bytes() -> int:
    """The workspace of a kernel, unless one is asked for."""
    return max(MIN_WORKSPACE_MB * 1_000_000, int(WORKSPACE_SHARE * (gpu_free_bytes() or 0)))


def build_engines(
    plan: BuildPlan,
    on_progress: Callable[[str, float], None] = lambda phase, share: None,
    on_engine: Callable[[BuiltEngine], None] = lambda built: None,
    on_warning: Callable[[str], None] = lambda line: None,
) -> list[BuiltEngine]:
    """Compile every graph of the plan's bundle, write the engines and return them.

    `on_progress` gets a phase and the share of it that is done, `on_engine` each engine once it is written,
    `on_warning` a line. Raises UnsupportedError where TensorRT refuses a graph or memory runs out, OutputError where an
    engine cannot be written.
    """
    bundle, card, engines = plan.bundle, device_card(), []
    timings = KernelTimings(plan.library, card)
    # TensorRT for RTX knows the GPUs it has kernels for by name, and says so for any other.
    compile_for = plan.capability or (plan.gpu_capability if plan.library == tensorrt_library.RTX else "")
    for context in reversed(bundle.contexts):  # the largest first: it serves every length
        with MemoryWatch() as memory:
            graph, engine = _compiled(
                plan,
                context,
                on_warning,
                capability=compile_for,
                on_progress=on_progress,
                timings=timings.data,
            )
        entry: dict[str, Any] = {
            "library": engine.library,
            "version": engine.version,
            "capability": plan.capability or plan.gpu_capability,
            "machine": card,
            "precision": bundle.precision,
            "context": context,
            "lowering": "native" if engine.layers["KV_CACHE_UPDATE"] else "primitive",
            "profiles": engine.profiles,
            "onnx_sha256": bundle.manifest["files"][graph.name]["sha256"],
            "seconds": round(engine.seconds, 1),
            "bytes": len(engine.plan),
            "peak_memory_bytes": memory.taken_bytes,
            "layers": dict(sorted(engine.layers.items())),
        }
        if plan.capability:
            bundle = add_engine(bundle, engine.plan, entry, partial(_is_replaced_by, entry))
            built = BuiltEngine(bundle.path / bundle.engines[-1]["file"], bundle.engines[-1])
        else:
            built = add_stored(plan.folder, bundle.graph_sha256(context), engine.plan, entry)
        engines.append(built)
        if engine.widened:
            on_warning(engine.widened)
        if warning := timings.keep(engine.timings):  # the engine itself is written
            on_warning(warning)
        on_engine(built)
    newest = [built.path for built in reversed(engines)]  # the largest serves every length, so it would leave last
    if not plan.capability and (line := store_limit.remove_least_used(plan.folder, newest)):
        on_warning(line)
    return engines


def _compiled(plan: BuildPlan, context: int, on_warning: Callable[[str], None], **options: Any) -> tuple[Path, Engine]:
    """A graph of `context` that TensorRT takes, and its engine: the primitive one where it refuses the native one."""
    graph, primitive = plan.bundle.graph_of(context), plan.bundle.primitive_graph_of(context)
    if primitive is not None and default_lowering(plan.library, plan.bundle.precision) == "primitive":
        return primitive, _build(plan, primitive, context, **options)
    try:
        return graph, _build(plan, graph, context, **options)
    except UnsupportedError as error:
        if primitive is None or OUT_OF_MEMORY.search(error.message):
            raise
        on_warning(f"{error.message}; so the primitive graph is compiled")
        return primitive, _build(plan, primitive, context, **options)


def _build(plan: BuildPlan, graph: Path, context: int, **options: Any) -> Engine:
    options["on_progress"](f"parsing {graph.name}", 0.0)
    try:
        return build_engine(plan.library, graph, context, workspace_bytes=plan.workspace_bytes, **options)
    except UnsupportedError as error:
        if not OUT_OF_MEMORY.search(error.message):
            raise
        raise without_memory(error, "build with --workspace-mb 256") from error


def without_memory(error: UnsupportedError, then: str) -> UnsupportedError:
    """`error`, which OUT_OF_MEMORY found, with what is free and what to do; `then`: after memory was freed."""
    return UnsupportedError(
        f"{error.message} ({free_text()}; {NVMAP})",
        f"close programs or reboot, then {then}; merino-edge doctor says what takes memory",
    )


def _measured_bytes(bundle: Bundle, library: str, estimate: int) -> int:
    """The memory that the last build of these graphs took; 0 where none is known or it is far from the estimate."""
    entries = (built.entry for built in engine_store.engines_of(bundle))
    peaks = [entry.get("peak_memory_bytes") for entry in entries if entry.get("library") == library]
    last = peaks[-1] if peaks else 0
    if not isinstance(last, int):
        return 0
    return last if estimate / MOST_OVER_ESTIMATE <= last <= estimate * MOST_OVER_ESTIMATE else 0


def _is_replaced_by(entry: dict[str, Any], old: dict[str, Any]) -> bool:
    return all(old.get(key) == entry[key] for key in ("library", "capability", "context"))
