"""From a checkpoint to a bundle: build the graphs, save them, prove that they are right, then write the manifest.

All files are written to a hidden folder beside the target, which is renamed at the end. So a failed check, an interrupt
or a full disk leaves nothing behind. `open_engine` gives the engine that runs a graph, so that export knows no runtime.
The form of a bundle is told in `merino_edge.bundle`.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from merino_edge import artefact, atomic, bundle, tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.export import genai, mixed_precision, parity
from merino_edge.export.graph import build_stored, cache_names, lowering, save, save_beside, state_names
from merino_edge.export.prepare_weights import ExportOptions, OnStep, PreparedWeights, prepare_weights
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix
from merino_edge.export.quantization.stored_weights import StoredWeights, odd_matrices
from merino_edge.export.targets import Target, require_parsed
from merino_edge.export.tensorrt import build_engine
from merino_edge.graph_io import LOGIT_ROWS, NUM_LOGITS
from merino_edge.storage import Lowering
from merino_edge.tokenizer import Tokenizer, compact
from merino_edge.unfinished import Unfinished

CHECKED_CAPABILITY = "SM86"  # an export for `rtx` is compiled for it, to check that TensorRT for RTX takes the graph
TIMED_STEPS = 31
MANIFEST_BYTES = 1 << 14  # about the size of the manifest, which is written last

OpenEngine = Callable[[Path, int], Any]  # (path of a graph, capacity of its cache) -> merino_edge.runtime.engine.Engine


def write_bundle(
    checkpoint: Checkpoint,
    out: Path | str,
    options: ExportOptions,
    open_engine: OpenEngine,
    on_step: OnStep = lambda step: None,
    *,
    unfinished: Unfinished | None = None,
) -> bundle.Bundle:
    """Export `checkpoint` to the folder `out` and return the bundle; its manifest holds the parity report.

    `unfinished` keeps the calibration of an export that is interrupted.

    For the target `rtx` the graph is also compiled, where TensorRT for RTX is installed. `on_step` is told each step.

    Raises:
        InputError where the options do not fit the model
        UnsupportedError where the target cannot hold a weight or parse the graph
        ArtefactError where the tokenizer is damaged, or belongs to another model
        ParityError where the graph differs from the checkpoint
        OutputError where `out` cannot be written
    """
    a, target = checkpoint.architecture, options.target
    options.check(a)
    if options.genai:
        genai.check(a, target)
    with atomic.new_folder(out, bundle.KIND) as folder:
        tokenizer = _copy_tokenizer(checkpoint, folder)
        tokens = _parity_tokens(tokenizer, a)
        prepared = prepare_weights(checkpoint, options, tokenizer, tokens, on_step, unfinished=unfinished)
        draft = _Draft(folder, checkpoint, options, prepared, tokens, open_engine, on_step)
        draft.save_graph()
        upgraded = draft.upgrade()
        with closing(draft.open()) as engine:
            checks = draft.compare(engine)
            vocabulary = draft.vocabulary_facts(engine)
        if options.genai:
            genai.write(folder, draft.build(draft.prepared.stored), a, options.context, tokenizer)
        compiled = draft.compile()
        on_step("hashing")
        odd = odd_matrices(a, target)
        int4 = {"fast": target.fast, "block": target.block, "rounding": options.rounding}
        bundle.write_manifest(
            folder,
            a,
            target.precision,
            target.name,
            options.context,
            contexts=options.contexts,
            graph=_graph_facts(a, target),
            block_precisions=list(target.block_precisions) or None,
            int4=int4 if "int4" in target.all_precisions else None,
            raised_to_int8=sorted(upgraded),
            vocabulary=vocabulary,
            float32_ffns=sorted(prepared.full_vocab.fp32_ffns),
            made_from={"checkpoint_sha256": checkpoint.training["sha256"]},
            parity=parity.report(checks),
            compiled=compiled,
            **({"odd_matrices": odd} if odd else {}),
        )
        # It is read before the folder gets its name, since another export may replace `out` right afterwards.
        written = bundle.load(folder, verify=False)
    return replace(written, path=Path(out))


@dataclass
class _Draft:
    """A bundle before its manifest: the steps that write its graphs into `folder` and compare them.

    `tokens` are those of the text that the comparison runs. `upgrade` replaces `prepared`.
    """

    folder: Path
    checkpoint: Checkpoint
    options: ExportOptions
    prepared: PreparedWeights
    tokens: Sequence[int]
    open_engine: OpenEngine
    on_step: OnStep

    @property
    def graph(self) -> Path:
        """The file of the graph with the largest cache."""
        return self.folder / "model.onnx"

    def open(self) -> Any:
        """The engine that runs `graph`."""
        return self.open_engine(self.graph, self.options.context)

    def build(self, stored: StoredWeights, capacity: int | None = None, lowering: Lowering | None = None) -> ir.Model:
        """The graph over `stored`; `capacity`: positions of its cache, those of `context` if None."""
        a, options = self.checkpoint.architecture, self.options
        target = options.target if lowering is None else replace(options.target, lowering=lowering)
        return build_stored(a, stored, target, options.context, capacity)

    def save_graph(self) -> None:
        """Write `graph`. Raises UnsupportedError where the target's parser is known to refuse it."""
        model = self.build(self.prepared.stored)
        require_parsed(model, self.options.target)
        save(model, self.graph)

    def upgrade(self) -> dict[str, QuantizedMatrix]:
        """Upgrade int4 matrices to int8 as the options ask, write `graph` again and return the upgraded matrices.

        Raises UnsupportedError where the limits cannot be met.
        """
        options, prepared = self.options, self.prepared
        if not options.is_mixed:
            return {}
        self.on_step("looking which matrices matter most")
        spare_bytes = None
        if options.max_bytes is not None:
            spare_bytes = (
                options.max_bytes - MANIFEST_BYTES - sum(file.stat().st_size for file in self.folder.iterdir())
            )
        upgraded = mixed_precision.upgraded_matrices(
            prepared.smoothed,
            prepared.stored,
            options.target,
            self.tokens,
            options.context,
            max_kl=options.max_kl,
            spare_bytes=spare_bytes,
            on_step=self.on_step,
        )
        self.prepared = prepared.upgraded(upgraded)
        _remove(self.graph)
        save(self.build(self.prepared.stored), self.graph)
        return upgraded

    def compare(self, engine: Any) -> list[parity.Check]:
        """Compare every graph, after writing those of the smaller contexts. Raises ParityError where a check fails."""
        options, precision = self.options, self.options.target.all_precisions[-1]
        self.on_step("comparing with PyTorch fp32")
        stored = self.prepared.stored
        checks = parity.compare(
            self.checkpoint, stored, engine, precision=precision, tokens=self.tokens, max_kl=options.max_kl
        )
        for capacity in options.contexts[:-1]:
            self.on_step(f"comparing the cache of {capacity} positions")
            checks.append(self.compare_other(bundle.smaller_graph(capacity), capacity, engine))
        if options.target.has_fallback:
            for capacity in options.contexts:
                self.on_step(f"comparing the primitive graph of {capacity} positions")
                name = bundle.primitive_graph(None if capacity == options.context else capacity)
                checks.append(self.compare_other(name, capacity, engine, "primitive"))
        parity.require_passed(checks)
        return checks

    def compare_other(self, name: str, capacity: int, engine: Any, lowering: Lowering | None = None) -> parity.Check:
        """Write another graph beside `graph`, over the same weights, and compare it with the `engine` of `graph`."""
        graph, precision = self.folder / name, self.options.target.all_precisions[-1]
        save_beside(self.build(self.prepared.stored, capacity, lowering), graph, self.graph)
        with closing(self.open_engine(graph, capacity)) as other:
            return parity.compare_capacity(other, engine, precision, self.tokens, lowering or "")

    def vocabulary_facts(self, engine: Any) -> dict[str, Any] | None:
        """How many tokens a pruned head keeps, and decode times beside the full head [ms]; None if none were pruned."""
        token_ids = self.prepared.stored.pruned_vocab
        if token_ids is None:
            return None
        self.on_step("timing the whole vocabulary")
        full_graph = self.folder / "whole.onnx"
        save(self.build(self.prepared.full_vocab), full_graph)
        with closing(self.open_engine(full_graph, self.options.context)) as full_engine:
            pruned_ms, full_ms = _decode_ms(engine, full_engine)
        _remove(full_graph)
        return {
            "kept": len(token_ids),
            "of": self.checkpoint.architecture.vocab_size,
            "decode_ms": pruned_ms,
            "whole_decode_ms": full_ms,
        }

    def compile(self) -> dict[str, Any] | None:
        """Facts about the engine that TensorRT for RTX compiles; None for other targets, or where it is not installed.

        Raises UnsupportedError where it refuses the graph.
        """
        if self.options.target.name != "rtx" or not find_spec(tensorrt_library.RTX):
            return None
        self.on_step("compiling with TensorRT for RTX")
        compiled = partial(
            build_engine, tensorrt_library.RTX, context=self.options.context, capability=CHECKED_CAPABILITY
        )
        lowering = self.options.target.lowering
        try:
            engine = compiled(self.graph)
        except UnsupportedError:
            if not self.options.target.has_fallback:
                raise
            engine, lowering = compiled(self.folder / bundle.primitive_graph()), "primitive"
        return {
            "lowering": lowering,
            "capability": engine.capability,
            "engine_bytes": len(engine.plan),
            "seconds": engine.seconds,
            "version": engine.version,
            "layers": dict(sorted(engine.layers.items())),
        }


def _copy_tokenizer(checkpoint: Checkpoint, folder: Path) -> Tokenizer:
    """Copy the checkpoint's tokenizer and chat format, and load the copy. Raises ArtefactError where one is damaged."""
    Tokenizer.load(checkpoint.path)  # checked before `compact` rewrites the file
    source, chat = checkpoint.path / "tokenizer.json", checkpoint.path / "chat.json"
    artefact.write_text(folder / source.name, compact(artefact.read_text(source), str(source)))
    artefact.write_bytes(folder / chat.name, chat.read_bytes())
    return Tokenizer.load(folder)


def _parity_tokens(tokenizer: Tokenizer, a: Architecture) -> list[int]:
    """Token ids of the text that the comparison runs. Raises ArtefactError where the model lacks one of them."""
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
        "inputs": ["tokens", "positions", NUM_LOGITS if target.lowering == "ort" else LOGIT_ROWS],
        "output": "logits",
        "caches": cache_names(a, lowering(target.lowering).output_prefix),
        "cache": target.cache,
        **({"states": state_names(a)} if a.convolves else {}),
    }


def _decode_ms(*engines: Any) -> list[float]:
    """Median ms of a decode step at a quarter of the context, for each engine; the engines take turns."""
    times: list[list[float]] = [[] for _ in engines]
    for _ in range(TIMED_STEPS):
        for engine, engine_times in zip(engines, times, strict=True):
            engine.mark_filled(start := engine.max_positions // 4)
            began = time.perf_counter()
            engine.forward(np.zeros(1, np.int64), start)
            engine_times.append(1000 * (time.perf_counter() - began))
    return [statistics.median(engine_times) for engine_times in times]


def _remove(graph: Path) -> None:
    """Delete a graph and its file of weights."""
    for file in graph.parent.glob(f"{graph.name}*"):
        file.unlink()
