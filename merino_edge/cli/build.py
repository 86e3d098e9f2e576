"""`merino-edge build BUNDLE`: prepares a bundle for the machine that will run it.

A bundle for ONNX Runtime: it measures which number of threads is fastest. `--json` prints {"out", "tuning"}, where
tuning is the entry of `merino_edge.runtime.thread_tuning`. A bundle for TensorRT: it compiles the graphs with the
library of this machine. `--json` prints {"out", "engines": [entries of `merino_edge.jetson.engine_build`]}, one for
each context, where "out" is the folder of the engines.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle
    from merino_edge.engine_store import BuiltEngine


def build(
    bundle: Annotated[Path, typer.Argument(metavar="BUNDLE", help="Bundle folder.")],
    capability: Annotated[
        str,
        typer.Option(
            metavar="SMxx",
            help="Compute capability to compile for, such as SM86 (TensorRT for RTX only). [default: this GPU's]",
        ),
    ] = "",
    workspace_mb: Annotated[
        int | None,
        typer.Option(help="Largest workspace of a kernel, in MB. [default: a quarter of the free memory]"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the result as JSON.")] = False,
) -> None:
    """Build the engines of a bundle, or tune its CPU threads.

    For a bundle for TensorRT it compiles engines for the GPU of this machine. They are kept on this machine, in
    $MERINO_ENGINES, /engines or the user's cache. With --capability they go into the bundle. A bundle for ONNX Runtime
    gets the number of threads that is fastest on this machine.
    """
    from merino_edge import bundle as bundles
    from merino_edge import output
    from merino_edge.cli import outputs
    from merino_edge.errors import InputError

    opened = bundles.load(bundle)
    writes_into_it = capability or opened.target.startswith("onnxruntime")
    if writes_into_it and os.access(opened.path.parent, os.W_OK):
        outputs.hold(output.lock(opened.path))
    if not opened.target.startswith("onnxruntime"):
        _compile(opened, capability, workspace_mb, as_json=as_json)
        return
    if capability or workspace_mb is not None:
        raise InputError(
            f"{bundle} was exported for ONNX Runtime, which needs no compilation",
            "leave the option out, or export it for TensorRT with --target",
        )
    _tune(opened, as_json=as_json)


def _compile(bundle: Bundle, capability: str, workspace_mb: int | None, *, as_json: bool) -> None:
    from merino_edge import tensorrt_library
    from merino_edge.cli import console
    from merino_edge.errors import require

    require("onnx_ir", "export")
    from merino_edge.jetson.engine_build import build_engines, plan_build

    plan = plan_build(bundle, capability, workspace_mb)
    screen = console.stderr()
    screen.print(str(plan), highlight=False)

    def print_engine(built: BuiltEngine) -> None:
        entry = built.entry
        console.print_line(
            f"{built.path}: TensorRT {'for RTX ' if plan.library == tensorrt_library.RTX else ''}"
            f"{entry['version']}, {entry['capability']}, {entry['precision']}, {entry['context']} positions, "
            f"{entry['bytes'] / 1e6:.1f} MB, {entry['seconds']:.1f} s"
        )
        layers = entry["layers"]
        fused = {kind: layers[kind] for kind in ("ATTENTION_INPUT", "KV_CACHE_UPDATE") if layers.get(kind)}
        if fused:
            console.print_line(", ".join(f"{count} {kind.lower()}" for kind, count in fused.items()) + " layers")

    with screen.status("compiling") as status:
        engines = build_engines(
            plan,
            on_progress=lambda phase, share: status.update(f"{phase}: {share:.0%}"),
            on_engine=(lambda built: None) if as_json else print_engine,
            on_warning=lambda line: screen.print(f"warning: {line}", highlight=False, markup=False),
        )
    if as_json:
        entries = [{"file": built.path.name, **built.entry} for built in engines]
        console.print_json({"out": str(plan.folder), "engines": entries})


def _tune(bundle: Bundle, *, as_json: bool) -> None:
    from merino_edge.cli import console
    from merino_edge.runtime import thread_tuning

    candidates = thread_tuning.candidate_tunings(thread_tuning.this_machine()["cores"])
    with console.progress() as bar:
        task = bar.add_task("measuring", total=thread_tuning.timed_answers(candidates), note="")
        best, entry = thread_tuning.tune_bundle(bundle, candidates, lambda: bar.advance(task))
    if as_json:
        console.print_json({"out": str(bundle.path), "tuning": entry})
        return
    for tuning, ms in entry["answer_ms"].items():
        mark = "  <- kept in the bundle" if tuning == str(best) else ""
        console.print_line(f"{tuning:<22}{ms:9.1f} ms a prompt and an answer{mark}")
