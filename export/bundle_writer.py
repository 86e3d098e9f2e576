"""From a checkpoint to a bundle: build the graph, save it, compare it, and only then let it be seen.

Everything happens in a hidden folder beside the target; a failed check, an interrupt or a full disk leave
nothing. Knows which engine runs the graph only through `open_engine`, so that export does not depend on a runtime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import onnx_ir as ir

from merino_edge import artefact, bundle
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import ArtefactError, InputError
from merino_edge.export import parity
from merino_edge.export.graph import OPSET, build_stored, cache_names
from merino_edge.export.quantize import store
from merino_edge.export.targets import Target
from merino_edge.export.tensorrt import compile_for
from merino_edge.tokenizer import Tokenizer

MIN_EXTERNAL_BYTES = 1024  # smaller tensors stay inside model.onnx

OpenEngine = Callable[[Path, int], Any]  # (path of model.onnx, context) -> Engine


def write_bundle(
    checkpoint: Checkpoint,
    out: Path | str,
    precision: str,
    context: int,
    target: str,
    open_engine: OpenEngine,
    on_step: Callable[[str], None] = lambda step: None,
) -> bundle.Bundle:
    """Export `checkpoint` to the folder `out`; its manifest holds the parity report.

    An `rtx` graph is also compiled, where TensorRT for RTX is installed.
    `on_step` is told what happens now. Raises ParityError, OutputError, UnsupportedError, InputError.
    """
    a = checkpoint.architecture
    if not 1 <= context <= a.max_positions:
        raise InputError(
            f"context {context} is outside 1 to the model's {a.max_positions} positions", "change --context"
        )
    with artefact.new_folder(out) as folder:
        on_step(f"writing the {precision} graph")
        graph = folder / "model.onnx"
        chosen = Target.named(target, precision)
        stored = store(a, checkpoint.weights, chosen)
        model = build_stored(a, stored, chosen, context)
        ir.save(model, graph, external_data="model.onnx.data", size_threshold_bytes=MIN_EXTERNAL_BYTES)
        for name in ("tokenizer.json", "chat.json"):
            artefact.write_bytes(folder / name, (checkpoint.path / name).read_bytes())
        on_step("comparing with PyTorch fp32")
        engine = open_engine(graph, context)
        tokens = Tokenizer.load(folder).encode(parity.TEXT)
        if max(tokens, default=0) >= a.vocab_size:
            raise ArtefactError(
                f"the tokenizer gives id {max(tokens)}, the model has {a.vocab_size} tokens", "import the model again"
            )
        checks = parity.compare(checkpoint, stored, engine, precision, tokens)
        engine.close()
        parity.require_passed(checks)
        compiled = None
        if target == "rtx" and find_spec("tensorrt_rtx_bindings"):
            on_step("compiling with TensorRT for RTX")
            compiled = asdict(compile_for(graph, context))
        on_step("hashing")
        graph_facts = {
            "opset": OPSET,
            "lowering": "native",
            "inputs": ["tokens", "positions"],
            "output": "logits",
            "caches": cache_names(a),
        }
        made_from = {"checkpoint_sha256": checkpoint.training["sha256"]}
        bundle.write_manifest(
            folder,
            a,
            precision,
            target,
            context,
            graph=graph_facts,
            made_from=made_from,
            parity=parity.report(checks),
            compiled=compiled,
        )
        written = bundle.load(folder, verify=False)  # once it stands at `out`, another export may replace it
    return replace(written, path=Path(out))
