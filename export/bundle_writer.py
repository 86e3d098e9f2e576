"""From a checkpoint to a bundle: build the graph, save it, compare it, and only then let it be seen.

Everything happens in a hidden folder beside the target; a failed check, an interrupt or a full disk leave
nothing. Knows which engine runs the graph only through `open_engine`, so that export does not depend on a runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merino_edge import artefact, bundle, tensorrt_library
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import ArtefactError, InputError
from merino_edge.export import parity
from merino_edge.export.calibration import input_moments
from merino_edge.export.graph import build_stored, cache_names, lowering, save
from merino_edge.export.quantize import store
from merino_edge.export.targets import Target, require_parsed
from merino_edge.export.tensorrt import build_engine
from merino_edge.tokenizer import Tokenizer

COMPILED_FOR = "SM86"  # what an export for `rtx` is compiled for, to see that it can be

OpenEngine = Callable[[Path, int], Any]  # (path of model.onnx, context) -> Engine


def write_bundle(
    checkpoint: Checkpoint,
    out: Path | str,
    target: Target,
    context: int,
    open_engine: OpenEngine,
    on_step: Callable[[str], None] = lambda step: None,
    rounding: str = "nearest",
) -> bundle.Bundle:
    """Export `checkpoint` to the folder `out`; its manifest holds the parity report.

    A graph for TensorRT is refused where its parser is known not to take an operator, and compiled where TensorRT for
    RTX is installed and the target is `rtx`.
    `rounding` of int4: nearest, or gptq, on text that the model draws itself. `on_step` is told what happens now.
    Raises ParityError, OutputError, UnsupportedError, InputError.
    """
    a = checkpoint.architecture
    if not 1 <= context <= a.max_positions:
        raise InputError(
            f"context {context} is outside 1 to the model's {a.max_positions} positions", "change --context"
        )
    with artefact.new_folder(out) as folder:
        moments = None
        if target.precision == "int4" and rounding == "gptq":
            on_step("drawing calibration text")
            moments = input_moments(a, checkpoint.weights)
        on_step(f"writing the {target.precision} graph")
        graph = folder / "model.onnx"
        stored = store(a, checkpoint.weights, target, moments)
        model = build_stored(a, stored, target, context)
        require_parsed(model, target)
        save(model, graph)
        for name in ("tokenizer.json", "chat.json"):
            artefact.write_bytes(folder / name, (checkpoint.path / name).read_bytes())
        on_step("comparing with PyTorch fp32")
        engine = open_engine(graph, context)
        tokens = Tokenizer.load(folder).encode(parity.TEXT)
        if max(tokens, default=0) >= a.vocab_size:
            raise ArtefactError(
                f"the tokenizer gives id {max(tokens)}, the model has {a.vocab_size} tokens", "import the model again"
            )
        checks = parity.compare(checkpoint, stored, engine, target.precision, tokens)
        engine.close()
        parity.require_passed(checks)
        compiled = None
        if target.name == "rtx" and find_spec(tensorrt_library.RTX):
            on_step("compiling with TensorRT for RTX")
            made = build_engine(tensorrt_library.RTX, graph, context, COMPILED_FOR)
            compiled = {
                "capability": made.capability,
                "engine_bytes": len(made.plan),
                "seconds": made.seconds,
                "version": made.version,
                "layers": dict(sorted(made.layers.items())),
            }
        on_step("hashing")
        graph_facts = {
            "opset": target.opset,
            "lowering": target.lowering,
            "inputs": ["tokens", "positions"],
            "output": "logits",
            "caches": cache_names(a, lowering(target.lowering).output_prefix),
        }
        made_from = {"checkpoint_sha256": checkpoint.training["sha256"]}
        bundle.write_manifest(
            folder,
            a,
            target.precision,
            target.name,
            context,
            graph=graph_facts,
            made_from=made_from,
            parity=parity.report(checks),
            compiled=compiled,
        )
        written = bundle.load(folder, verify=False)  # once it stands at `out`, another export may replace it
    return replace(written, path=Path(out))
