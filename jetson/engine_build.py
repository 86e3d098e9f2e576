"""The engine build: it compiles a bundle for this machine's GPU, an engine for each of the bundle's contexts.

Memory is checked first. An engine's entry in the bundle's manifest, one of "engines":

    {"file", "library", "version", "capability", "machine", "precision", "context", "profiles", "onnx_sha256",
     "seconds", "bytes", "peak_memory_bytes", "layers": {kind: count}}

"profiles" holds the [least, optimum, most] tokens of a step for each optimization profile. Kernel timings are kept in
the user's cache, so that the next build is faster. The compiler itself is `merino_edge.export.tensorrt`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from merino_edge import artefact, limits, tensorrt_library
from merino_edge.bundle import Bundle, add_engine
from merino_edge.errors import OutputError, UnsupportedError
from merino_edge.export.targets import PLATFORMS, TARGETS
from merino_edge.export.tensorrt import build_engine
from merino_edge.jetson.device.card import available_bytes, device_card
from merino_edge.runtime.engines.cuda import gpu_capability
from merino_edge.runtime.memory import peak_memory_mb

WORKSPACE_SHARE = 0.25  # of the free memory, for timing kernels
MIN_WORKSPACE_MB = 64
# The peak memory of a build without the workspace: the library's own, and for each byte of the graph
# (benchmarks/compile_engines.py).
LIBRARY_BYTES, PEAK_OVER_GRAPH = 500_000_000, 3


@dataclass(frozen=True)
class BuildPlan:
    """What a build of `bundle` needs: the library, the GPU and the memory."""

    bundle: Bundle
    library: str
    capability: str  # compute capability to compile for; "": this machine's GPU
    gpu_capability: str
    workspace_bytes: int
    needed_bytes: int
    free_bytes: int

    def __str__(self) -> str:
        needed_mb, workspace_mb, free_mb = (
            size / 1e6 for size in (self.needed_bytes, self.workspace_bytes, self.free_bytes)
        )
        return (
            f"needs about {needed_mb:,.0f} MB and up to {workspace_mb:,.0f} MB of workspace; {free_mb:,.0f} MB are free"
        )


def plan_build(bundle: Bundle, capability: str = "", workspace_mb: int | None = None) -> BuildPlan:
    """Check whether `bundle` can be compiled here, before minutes of work.

    Raises UnsupportedError where its target has no engines, or GPU or memory are missing. Raises MissingExtraError
    where TensorRT is missing, InputError where `workspace_mb` is out of range.
    """
    platform = PLATFORMS.get(bundle.target)
    if platform is None or platform.tensorrt is None:
        targets = ", ".join(name for name in TARGETS if PLATFORMS[name].tensorrt)
        raise UnsupportedError(
            f"{bundle.path} was exported for {bundle.target}, which TensorRT does not parse",
            f"export it with --target, one of {targets}",
        )
    library = tensorrt_library.RTX if capability else tensorrt_library.installed()
    here = "" if capability else gpu_capability()
    graph_bytes = sum(file["bytes"] for name, file in bundle.manifest["files"].items() if name.startswith("model.onnx"))
    free = available_bytes()
    if workspace_mb is not None:
        limits.check_range("workspace-mb", workspace_mb, 1, limits.MAX_WORKSPACE_MB)
    workspace = (workspace_mb or max(MIN_WORKSPACE_MB, int(WORKSPACE_SHARE * free / 1e6))) * 1_000_000
    needed = LIBRARY_BYTES + PEAK_OVER_GRAPH * graph_bytes
    if needed > free:
        raise UnsupportedError(
            f"building needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free",
            "close programs, add swap (merino-edge doctor says how), or export at a lower --precision",
        )
    return BuildPlan(bundle, library, capability, here, workspace, needed, free)


def build_engines(
    plan: BuildPlan,
    on_progress: Callable[[str, float], None] = lambda phase, share: None,
    on_engine: Callable[[dict[str, Any]], None] = lambda entry: None,
    on_warning: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """Compile every graph of the plan's bundle, add the engines to the bundle and return their entries.

    `on_progress` gets a phase and the share of it that is done, `on_engine` each entry once it is in the bundle,
    `on_warning` a line. Raises UnsupportedError where TensorRT refuses a graph, OutputError where the bundle cannot be
    written.
    """
    bundle, card, entries = plan.bundle, device_card(), []
    timings = _timings_file(plan.library, card)
    for context in reversed(bundle.contexts):  # the largest first: it serves every length
        graph = bundle.graph_of(context)
        on_progress(f"parsing {graph.name}", 0.0)
        engine = build_engine(
            plan.library,
            graph,
            context,
            plan.capability,
            workspace_bytes=plan.workspace_bytes,
            on_progress=on_progress,
            timings=timings.read_bytes() if timings.is_file() else b"",
        )
        entry: dict[str, Any] = {
            "library": engine.library,
            "version": engine.version,
            "capability": plan.capability or plan.gpu_capability,
            "machine": card,
            "precision": bundle.precision,
            "context": context,
            "profiles": engine.profiles,
            "onnx_sha256": bundle.manifest["files"][graph.name]["sha256"],
            "seconds": round(engine.seconds, 1),
            "bytes": len(engine.plan),
            "peak_memory_bytes": round(1e6 * peak_memory_mb()),
            "layers": dict(sorted(engine.layers.items())),
        }
        bundle = add_engine(bundle, engine.plan, entry, partial(_is_replaced_by, entry))
        entries.append(bundle.engines[-1])
        if engine.timings:
            try:
                artefact.write_bytes(timings, engine.timings)
            except OutputError as error:  # the engine itself is written
                on_warning(f"the next build will take as long: {error}")
        on_engine(entries[-1])
    return entries


def _timings_file(library: str, card: dict[str, Any]) -> Path:
    """The file of kernel timings of this library on this board in its power mode."""
    trt, _ = tensorrt_library.load(library)
    identity = json.dumps([library, trt.__version__, *(card[key] for key in ("module", "power_mode", "gpu"))])
    return artefact.user_cache() / f"timings-{hashlib.sha256(identity.encode()).hexdigest()[:12]}.bin"


def _is_replaced_by(entry: dict[str, Any], old: dict[str, Any]) -> bool:
    return all(old.get(key) == entry[key] for key in ("library", "capability", "context"))
