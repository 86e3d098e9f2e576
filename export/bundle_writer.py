"""From a checkpoint to a bundle: build the graph, save it, compare it, and only then let it be seen.

Everything happens in a hidden folder beside the target; a failed check, an interrupt or a full disk leave
nothing. Knows which engine runs the graph only through `open_engine`, so that export does not depend on a runtime.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from merino_edge import artefact, bundle, data, tensorrt_library
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import ArtefactError, InputError
from merino_edge.export import mixed, parity
from merino_edge.export.calibration import Observed, observe
from merino_edge.export.graph import build_stored, cache_names, lowering, save, save_beside
from merino_edge.export.ort import WANTED
from merino_edge.export.overflow import wide_ffns
from merino_edge.export.quantize import cache_scales, store
from merino_edge.export.quantized import Quantized
from merino_edge.export.smoothing import smoothed
from merino_edge.export.targets import Target, require_parsed
from merino_edge.export.tensorrt import build_engine
from merino_edge.export.vocabulary import kept_tokens
from merino_edge.tokenizer import Tokenizer, compact

COMPILED_FOR = "SM86"  # what an export for `rtx` is compiled for, to see that it can be

TIMED_STEPS = 31
MANIFEST_BYTES = 1 << 14  # about, of the file that comes last

OpenEngine = Callable[[Path, int], Any]  # (path of model.onnx, context) -> Engine


def write_bundle(
    checkpoint: Checkpoint,
    out: Path | str,
    target: Target,
    context: int,
    open_engine: OpenEngine,
    on_step: Callable[[str], None] = lambda step: None,
    rounding: str = "nearest",
    max_kl: float | None = None,
    max_bytes: int | None = None,
    keep_vocab: Path | None = None,
    smaller: Sequence[int] = (),
) -> bundle.Bundle:
    """Export `checkpoint` to the folder `out`; its manifest holds the parity report.

    A graph for TensorRT is refused where its parser is known not to take an operator, and compiled where TensorRT for
    RTX is installed and the target is `rtx`.
    `rounding` of int4: nearest, or gptq, on text that the model draws itself. At int4, the matrices that matter most
    are int8: as few as keep `mean_kl` within `max_kl`, or as many as a bundle of `max_bytes` has room for. Of a text
    `keep_vocab` (a file, or a folder of them), the head keeps the tokens, others are never said. Where a graph fixes
    its cache's capacity, which is for TensorRT, there is one more for each of `smaller`, over the same weights.
    `on_step` is told what happens now. Raises ParityError, OutputError, UnsupportedError, InputError.
    """
    a = checkpoint.architecture
    if target.precision != "int4" and (max_kl is not None or max_bytes is not None):
        raise InputError(f"only int4 can be mixed with a higher precision, not {target.precision}", "use int4")
    if not 1 <= context <= a.max_positions:
        raise InputError(
            f"context {context} is outside 1 to the model's {a.max_positions} positions", "change --context"
        )
    smaller = sorted(set(smaller))
    if smaller and not target.on_tensorrt:
        raise InputError(f"a bundle for {target.name} has one context", "give the largest --context alone")
    if smaller and not 1 <= smaller[0] <= smaller[-1] < context:
        raise InputError(f"contexts {smaller} are outside 1 to {context - 1}", "change --context")
    with artefact.new_folder(out) as folder:
        observed, by_gptq = Observed({}, {}), target.precision == "int4" and rounding == "gptq"
        if by_gptq or target.cache_in_int8:
            on_step("drawing calibration text")
            observed = observe(a, checkpoint.weights, moments_too=by_gptq)
        smooth = checkpoint
        if target.cache_in_int8:
            weights, reach = smoothed(a, checkpoint.weights, observed.reach, target.precision == "int8")
            smooth, observed = replace(checkpoint, weights=weights), observed._replace(reach=reach)
        Tokenizer.load(checkpoint.path)  # is one, before it is rewritten
        source, chat = checkpoint.path / "tokenizer.json", checkpoint.path / "chat.json"
        artefact.write_text(folder / source.name, compact(artefact.read_text(source), str(source)))
        artefact.write_bytes(folder / chat.name, chat.read_bytes())
        tokenizer = Tokenizer.load(folder)
        tokens = tokenizer.encode(parity.TEXT)
        if max(tokens, default=0) >= a.vocab_size:
            raise ArtefactError(
                f"the tokenizer gives id {max(tokens)}, the model has {a.vocab_size} tokens", "import the model again"
            )
        kept = None
        if keep_vocab is not None:
            on_step("reading the text to keep the vocabulary of")
            kept = kept_tokens(tokenizer, data.pieces(keep_vocab), a.vocab_size)
        half = target.compute_dtype == ir.DataType.FLOAT16
        wide = wide_ffns(a, checkpoint.weights, np.asarray(tokens)[: a.max_positions]) if half else frozenset[str]()
        on_step(f"rounding to {target.precision}")
        whole = store(a, smooth.weights, target, observed.moments)
        whole = replace(whole, wide=wide, cache_scales=cache_scales(observed.reach))
        stored = whole if kept is None else whole.keeping(kept)
        graph = folder / "model.onnx"
        model = build_stored(a, stored, target, context)
        require_parsed(model, target)
        save(model, graph)
        raised: dict[str, Quantized] = {}
        if max_kl is not None or max_bytes is not None:
            on_step("looking which matrices matter most")
            spare = None if max_bytes is None else max_bytes - MANIFEST_BYTES - _size_bytes(folder)
            raised = mixed.raised_matrices(smooth, stored, target, tokens, context, max_kl, spare, on_step)
            whole, stored = (replace(part, quantized=part.quantized | raised) for part in (whole, stored))
            _remove(graph)
            save(build_stored(a, stored, target, context), graph)
        on_step("comparing with PyTorch fp32")
        engine = open_engine(graph, context)
        checks = parity.compare(checkpoint, stored, engine, target.precision, tokens, max_kl)
        for places in smaller:
            on_step(f"comparing the cache of {places} places")
            beside = folder / bundle.smaller_graph(places)
            save_beside(build_stored(a, stored, target, context, places), beside, graph)
            other = open_engine(beside, places)
            checks.append(parity.compare_smaller(other, engine, target.precision, tokens))
            other.close()
        parity.require_passed(checks)
        vocabulary = None
        if kept is not None:
            on_step("timing the whole vocabulary")
            with_all = folder / "whole.onnx"
            save(build_stored(a, whole, target, context), with_all)
            other = open_engine(with_all, context)
            kept_ms, whole_ms = _decode_ms(engine, other)
            other.close()
            _remove(with_all)
            vocabulary = {"kept": len(kept), "of": a.vocab_size, "decode_ms": kept_ms, "whole_decode_ms": whole_ms}
        engine.close()
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
            "inputs": ["tokens", "positions", *([WANTED] if target.lowering == "ort" else [])],
            "output": "logits",
            "caches": cache_names(a, lowering(target.lowering).output_prefix),
            "cache": target.cache,
        }
        made_from = {"checkpoint_sha256": checkpoint.training["sha256"]}
        form = {"fast": target.fast, "block": target.block, "rounding": rounding}
        bundle.write_manifest(
            folder,
            a,
            target.precision,
            target.name,
            context,
            contexts=[*smaller, context],
            graph=graph_facts,
            int4=form if target.precision == "int4" else None,
            raised_to_int8=sorted(raised),
            vocabulary=vocabulary,
            float32_ffns=sorted(wide),
            made_from=made_from,
            parity=parity.report(checks),
            compiled=compiled,
        )
        written = bundle.load(folder, verify=False)  # once it stands at `out`, another export may replace it
    return replace(written, path=Path(out))


def _decode_ms(*engines: Any) -> list[float]:
    """Of a step at a quarter of the context, each engine's median over steps in turn."""
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(TIMED_STEPS):
        for engine, found in zip(engines, times, strict=True):
            engine.assume(start := engine.max_positions // 4)
            begun = time.perf_counter()
            engine.forward(np.zeros(1, np.int64), start)
            found.append(1000 * (time.perf_counter() - begun))
    return [statistics.median(found) for found in times]


def _remove(graph: Path) -> None:
    """With its weights."""
    for file in graph.parent.glob(f"{graph.name}*"):
        file.unlink()


def _size_bytes(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.iterdir())
