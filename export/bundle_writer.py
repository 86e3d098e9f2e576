"""From a checkpoint to a bundle: build the graph, save it, compare it, and only then let it be seen.

Everything happens in a hidden folder beside the target; a failed check, an interrupt or a full disk leave
nothing. Knows which engine runs the graph only through `open_engine`, so that export does not depend on a runtime.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from merino_edge import artefact, bundle, tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import ArtefactError
from merino_edge.export import mixed_precision, parity
from merino_edge.export.graph import build_stored, cache_names, lowering, save, save_beside
from merino_edge.export.prepare_weights import ExportOptions, OnStep, PreparedWeights, prepare_weights
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix
from merino_edge.export.quantization.stored_weights import StoredWeights
from merino_edge.export.targets import Target, require_parsed
from merino_edge.export.tensorrt import build_engine
from merino_edge.graph_io import NUM_LOGITS
from merino_edge.tokenizer import Tokenizer, compact

COMPILED_FOR = "SM86"  # what an export for `rtx` is compiled for, to see that it can be

TIMED_STEPS = 31
MANIFEST_BYTES = 1 << 14  # about, of the file that comes last

OpenEngine = Callable[[Path, int], Any]  # (path of model.onnx, context) -> Engine


def write_bundle(
    checkpoint: Checkpoint,
    out: Path | str,
    options: ExportOptions,
    open_engine: OpenEngine,
    on_step: OnStep = lambda step: None,
) -> bundle.Bundle:
    """Export `checkpoint` to the folder `out`; its manifest holds the parity report.

    A graph for TensorRT is refused where its parser is known not to take an operator. It is compiled where TensorRT for
    RTX is installed and the target is `rtx`. `on_step` is told what happens now. Raises ParityError, OutputError,
    UnsupportedError, InputError.
    """
    a, target = checkpoint.architecture, options.target
    options.check(a)
    with artefact.atomic_directory(out) as folder:
        tokenizer = _copy_tokenizer(checkpoint, folder)
        tokens = _parity_tokens(tokenizer, a)
        prepared = prepare_weights(checkpoint, options, tokenizer, tokens, on_step)
        draft = _Draft(folder, checkpoint, options, prepared, tokens, open_engine, on_step)
        draft.save_graph()
        upgraded = draft.upgrade()
        engine = draft.open()
        checks = draft.compare(engine)
        vocabulary = draft.vocabulary_facts(engine)
        engine.close()
        compiled = draft.compile()
        on_step("hashing")
        form = {"fast": target.fast, "block": target.block, "rounding": options.rounding}
        bundle.write_manifest(
            folder,
            a,
            target.precision,
            target.name,
            options.context,
            contexts=options.contexts,
            graph=_graph_facts(a, target),
            int4=form if target.precision == "int4" else None,
            raised_to_int8=sorted(upgraded),
            vocabulary=vocabulary,
            float32_ffns=sorted(prepared.whole.fp32_ffns),
            made_from={"checkpoint_sha256": checkpoint.training["sha256"]},
            parity=parity.report(checks),
            compiled=compiled,
        )
        written = bundle.load(folder, verify=False)  # once it stands at `out`, another export may replace it
    return replace(written, path=Path(out))


@dataclass
class _Draft:
    """A bundle before its manifest: the graphs in `folder`, and the steps that write and judge them."""

    folder: Path
    checkpoint: Checkpoint
    options: ExportOptions
    prepared: PreparedWeights
    tokens: Sequence[int]  # of the text that is compared on
    open_engine: OpenEngine
    on_step: OnStep

    @property
    def graph(self) -> Path:
        """The graph of the largest context."""
        return self.folder / "model.onnx"

    def open(self) -> Any:
        """The engine that runs `graph`."""
        return self.open_engine(self.graph, self.options.context)

    def build(self, stored: StoredWeights, capacity: int | None = None) -> ir.Model:
        a, options = self.checkpoint.architecture, self.options
        return build_stored(a, stored, options.target, options.context, capacity)

    def save_graph(self) -> None:
        """Raises UnsupportedError where the target's parser would refuse the graph."""
        model = self.build(self.prepared.stored)
        require_parsed(model, self.options.target)
        save(model, self.graph)

    def upgrade(self) -> dict[str, QuantizedMatrix]:
        """Write the graph again with the int4 matrices that are worth int8, and return these. Raises UnsupportedError."""
        options, prepared = self.options, self.prepared
        if not options.is_mixed:
            return {}
        self.on_step("looking which matrices matter most")
        max_bytes, size_bytes = options.max_bytes, sum(file.stat().st_size for file in self.folder.iterdir())
        upgraded = mixed_precision.upgraded_matrices(
            prepared.smooth,
            prepared.stored,
            options.target,
            self.tokens,
            options.context,
            options.max_kl,
            None if max_bytes is None else max_bytes - MANIFEST_BYTES - size_bytes,
            self.on_step,
        )
        self.prepared = prepared.upgraded(upgraded)
        _remove(self.graph)
        save(self.build(self.prepared.stored), self.graph)
        return upgraded

    def compare(self, engine: Any) -> list[parity.Check]:
        """Every check of every graph; those of smaller contexts are written here. Raises ParityError."""
        options, precision = self.options, self.options.target.precision
        self.on_step("comparing with PyTorch fp32")
        stored = self.prepared.stored
        checks = parity.compare(self.checkpoint, stored, engine, precision, self.tokens, options.max_kl)
        for capacity in options.contexts[:-1]:
            self.on_step(f"comparing the cache of {capacity} places")
            beside = self.folder / bundle.smaller_graph(capacity)
            save_beside(self.build(stored, capacity), beside, self.graph)
            other = self.open_engine(beside, capacity)
            checks.append(parity.compare_capacity(other, engine, precision, self.tokens))
            other.close()
        parity.require_passed(checks)
        return checks

    def vocabulary_facts(self, engine: Any) -> dict[str, Any] | None:
        """What a pruned vocabulary saves, timed beside the whole one; None where nothing was pruned."""
        kept = self.prepared.stored.pruned_vocab
        if kept is None:
            return None
        self.on_step("timing the whole vocabulary")
        whole_graph = self.folder / "whole.onnx"
        save(self.build(self.prepared.whole), whole_graph)
        whole_engine = self.open_engine(whole_graph, self.options.context)
        kept_ms, whole_ms = _decode_ms(engine, whole_engine)
        whole_engine.close()
        _remove(whole_graph)
        vocab_size = self.checkpoint.architecture.vocab_size
        return {"kept": len(kept), "of": vocab_size, "decode_ms": kept_ms, "whole_decode_ms": whole_ms}

    def compile(self) -> dict[str, Any] | None:
        """What TensorRT for RTX says of the graph; None where that is not the target, or not installed."""
        if self.options.target.name != "rtx" or not find_spec(tensorrt_library.RTX):
            return None
        self.on_step("compiling with TensorRT for RTX")
        made = build_engine(tensorrt_library.RTX, self.graph, self.options.context, COMPILED_FOR)
        return {
            "capability": made.capability,
            "engine_bytes": len(made.plan),
            "seconds": made.seconds,
            "version": made.version,
            "layers": dict(sorted(made.layers.items())),
        }


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> Tokenizer:
    """The bundle's tokenizer and chat format. Raises ArtefactError."""
    Tokenizer.load(checkpoint.path)  # is one, before it is rewritten
    source, chat = checkpoint.path / "tokenizer.json", checkpoint.path / "chat.json"
    artefact.write_text(folder / source.name, compact(artefact.read_text(source), str(source)))
    artefact.write_bytes(folder / chat.name, chat.read_bytes())
    return Tokenizer.load(folder)


def _parity_tokens(tokenizer: Tokenizer, a: Architecture) -> list[int]:
    """The text that is compared on. Raises ArtefactError where the model lacks one of its ids."""
    tokens = tokenizer.encode(parity.TEXT)
    if max(tokens, default=0) >= a.vocab_size:
        raise ArtefactError(
            f"the tokenizer gives id {max(tokens)}, the model has {a.vocab_size} tokens", "import the model again"
        )
    return tokens


def _graph_facts(a: Architecture, target: Target) -> dict[str, Any]:
    return {
        "opset": target.opset,
        "lowering": target.lowering,
        "inputs": ["tokens", "positions", *([NUM_LOGITS] if target.lowering == "ort" else [])],
        "output": "logits",
        "caches": cache_names(a, lowering(target.lowering).output_prefix),
        "cache": target.cache,
    }


def _decode_ms(*engines: Any) -> list[float]:
    """Of a step at a quarter of the context, each engine's median over steps in turn."""
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(TIMED_STEPS):
        for engine, found in zip(engines, times, strict=True):
            engine.mark_filled(start := engine.max_positions // 4)
            begun = time.perf_counter()
            engine.forward(np.zeros(1, np.int64), start)
            found.append(1000 * (time.perf_counter() - begun))
    return [statistics.median(found) for found in times]


def _remove(graph: Path) -> None:
    """With its weights."""
    for file in graph.parent.glob(f"{graph.name}*"):
        file.unlink()
