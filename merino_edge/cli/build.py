"""`merino-edge build BUNDLE`: make a bundle ready for the machine that will run it.

One for ONNX Runtime: measure with how many threads it runs best; `--json` prints {"out", "tuning": the entry of
merino_edge.runtime.tuning}. One for TensorRT: compile its graphs with the library of this machine; `--json` prints
{"out", "engines": [{"file", "library", "version", "capability", "machine", "precision", "context", "profiles",
"onnx_sha256", "seconds", "bytes", "peak_memory_bytes", "layers": {kind: count}}]}, one for each of its contexts.
"profiles": the [least, optimum, most] tokens of a step that each optimization profile takes.
"""

from __future__ import annotations

import hashlib
import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle

WORKSPACE_SHARE = 0.25  # of the memory that is free, for kernels to try themselves out in
# Peak memory of a build without the workspace: what the library takes, and per byte of the graph
# (benchmarks/compile_engines.py).
LIBRARY_BYTES, PEAK_OVER_GRAPH = 500_000_000, 3


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder.")],
    capability: Annotated[
        str, typer.Option(help="Compile for this one, such as SM86, instead of the GPU here (TensorRT for RTX only).")
    ] = "",
    workspace_mb: Annotated[
        int | None, typer.Option(help="Most memory that a kernel may use. [default: a quarter of what is free]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Make BUNDLE ready for this machine: TensorRT engines for its GPU, or the best threads for ONNX Runtime."""
    from merino_edge import artefact, limits, tensorrt_library
    from merino_edge import bundle as bundles
    from merino_edge.cli import console
    from merino_edge.errors import InputError, OutputError, UnsupportedError, require

    opened = bundles.load(bundle)
    if opened.target == "onnxruntime":
        if capability or workspace_mb is not None:
            raise InputError(
                f"{bundle} was exported for ONNX Runtime, which compiles nothing",
                "leave the option out, or export it for TensorRT with --target",
            )
        _tune(opened, as_json)
        return

    require("onnx_ir", "export")
    from merino_edge.export.targets import PLATFORMS, TARGETS
    from merino_edge.export.tensorrt import build_engine
    from merino_edge.jetson.device import device_card
    from merino_edge.runtime.cuda import capability_here
    from merino_edge.runtime.memory import peak_memory_mb

    platform = PLATFORMS.get(opened.target)
    if platform is None or platform.tensorrt is None:
        able = ", ".join(name for name in TARGETS if PLATFORMS[name].tensorrt)
        raise UnsupportedError(
            f"{bundle} was exported for {opened.target}, which TensorRT does not parse",
            f"export it with --target, one of {able}",
        )
    library = tensorrt_library.RTX if capability else tensorrt_library.installed()
    here = "" if capability else capability_here()  # compiling takes minutes: first see whether there is a GPU
    graph_bytes = sum(file["bytes"] for name, file in opened.manifest["files"].items() if name.startswith("model.onnx"))
    free = _available_bytes()
    if workspace_mb is not None:
        limits.check_range("workspace-mb", workspace_mb, 1, limits.MAX_WORKSPACE_MB)
    workspace = (workspace_mb or max(64, int(WORKSPACE_SHARE * free / 1e6))) * 1_000_000
    screen = console.stderr()
    screen.print(_memory_needed(graph_bytes, workspace, free), highlight=False)
    card, made = device_card(), []
    kept = _timings_file(library, card)
    for context in reversed(opened.contexts):  # the largest first: without it there is no engine for every length
        graph = opened.graph_of(context)
        with screen.status(f"parsing {graph.name}") as status:
            engine = build_engine(
                library,
                graph,
                context,
                capability,
                workspace,
                on_progress=lambda phase, share: status.update(f"{phase}: {share:.0%}"),
                timings=kept.read_bytes() if kept.is_file() else b"",
            )
        entry: dict[str, Any] = {
            "library": engine.library,
            "version": engine.version,
            "capability": capability or here,
            "machine": card,
            "precision": opened.precision,
            "context": context,
            "profiles": engine.profiles,
            "onnx_sha256": opened.manifest["files"][graph.name]["sha256"],
            "seconds": round(engine.seconds, 1),
            "bytes": len(engine.plan),
            "peak_memory_bytes": round(1e6 * peak_memory_mb()),
            "layers": dict(sorted(engine.layers.items())),
        }
        opened = bundles.add_engine(opened, engine.plan, entry, partial(_is_replaced_by, entry))
        made.append(opened.engines[-1])
        if engine.timings:
            try:
                artefact.write_bytes(kept, engine.timings)
            except OutputError as error:  # the engine is there all the same
                screen.print(f"warning: the next build will take as long: {error}", highlight=False, markup=False)
        if as_json:
            continue
        console.print_line(
            f"{bundle / made[-1]['file']}: TensorRT {'for RTX ' if library == tensorrt_library.RTX else ''}"
            f"{engine.version}, {entry['capability']}, {opened.precision}, {context} positions, "
            f"{len(engine.plan) / 1e6:.1f} MB, {engine.seconds:.1f} s"
        )
        fused = {kind: engine.layers[kind] for kind in ("ATTENTION_INPUT", "KV_CACHE_UPDATE") if engine.layers[kind]}
        if fused:
            console.print_line(", ".join(f"{count} {kind.lower()}" for kind, count in fused.items()) + " layers")
    if as_json:
        console.print_json({"out": str(bundle), "engines": made})


def _tune(opened: Bundle, as_json: bool) -> None:
    from importlib.metadata import version

    from merino_edge import bundle as bundles
    from merino_edge.cli import console
    from merino_edge.runtime import tuning
    from merino_edge.runtime.onnx_engine import OnnxEngine

    machine = tuning.this_machine()
    found = tuning.possibilities(machine["cores"])
    with console.progress() as bar:
        task = bar.add_task("measuring", total=(tuning.ROUNDS + 1) * len(found), note="")
        measured = tuning.tune(
            lambda wanted: OnnxEngine.from_bundle(opened, wanted.threads, wanted.spinning),
            found,
            lambda: bar.advance(task),
        )
    best = tuning.leanest(measured)
    entry = {
        **machine,
        "onnxruntime": version("onnxruntime"),
        "threads": best.threads,
        "spinning": best.spinning,
        "answer_ms": {str(wanted): round(ms, 3) for wanted, ms in measured.items()},
    }
    bundles.add_tuning(opened, entry)
    if as_json:
        console.print_json({"out": str(opened.path), "tuning": entry})
        return
    for wanted, ms in measured.items():
        chosen = "  <- kept in the bundle" if wanted == best else ""
        console.print_line(f"{wanted!s:<22}{ms:9.1f} ms a prompt and an answer{chosen}")


def _memory_needed(graph_bytes: int, workspace_bytes: int, free_bytes: int) -> str:
    """A line that says it. Raises UnsupportedError where it is more than is free."""
    from merino_edge.errors import UnsupportedError

    needed_mb = (LIBRARY_BYTES + PEAK_OVER_GRAPH * graph_bytes) / 1e6
    workspace_mb, free_mb = workspace_bytes / 1e6, free_bytes / 1e6
    if needed_mb > free_mb:
        raise UnsupportedError(
            f"building needs about {needed_mb:,.0f} MB, {free_mb:,.0f} MB are free",
            "close programs, add swap (merino-edge doctor says how), or export at a lower --precision",
        )
    return f"needs about {needed_mb:,.0f} MB and up to {workspace_mb:,.0f} MB of workspace; {free_mb:,.0f} MB are free"


def _timings_file(library: str, card: dict[str, Any]) -> Path:
    """Where the timings of kernels are kept: those of this library, on this board, at its clocks."""
    from merino_edge import artefact, tensorrt_library

    trt, _ = tensorrt_library.load(library)
    here = json.dumps([library, trt.__version__, *(card[key] for key in ("module", "power_mode", "gpu"))])
    return artefact.user_cache() / f"timings-{hashlib.sha256(here.encode()).hexdigest()[:12]}.bin"


def _is_replaced_by(entry: dict[str, Any], old: dict[str, Any]) -> bool:
    return all(old.get(key) == entry[key] for key in ("library", "capability", "context"))


def _available_bytes() -> int:
    """Memory that programs may still take, swap included."""
    from merino_edge.jetson.system_files import read_text

    fields = dict(line.split(":", 1) for line in read_text(Path("/proc/meminfo")).splitlines() if ":" in line)
    return sum(1024 * int(fields[name].split()[0]) for name in ("MemAvailable", "SwapFree") if name in fields)
