"""The weights of a checkpoint in the form that one bundle stores them: the part of an export before there is a graph.

The steps, in order:

    1. collect statistics on calibration text, for GPTQ and for an int8 KV cache
    2. smooth keys and values, for an int8 KV cache
    3. find the FFNs that overflow float16, for a target that computes in float16
    4. round or quantise every weight
    5. prune the vocabulary of the head, where a text says which tokens to keep

This module knows no graph, no engine and no bundle.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from merino_edge import artefact
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.corpus import pieces
from merino_edge.errors import InputError
from merino_edge.export.quantization.calibration import (
    CalibrationStatistics,
    collect_statistics,
    load_statistics,
    save_statistics,
)
from merino_edge.export.quantization.fp16_overflow import find_fp32_ffns
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix
from merino_edge.export.quantization.smoothing import smooth_attention
from merino_edge.export.quantization.stored_weights import StoredWeights, cache_scales, store
from merino_edge.export.targets import Target
from merino_edge.export.vocabulary_pruning import pruned_vocab
from merino_edge.tokenizer import Tokenizer
from merino_edge.unfinished import Unfinished

OnStep = Callable[[str], None]  # is told what the export does now


@dataclass(frozen=True)
class ExportOptions:
    """What a bundle shall be like.

    `context`: positions of the KV cache.
    `smaller_contexts`: for TensorRT, whose graphs fix the cache's capacity, one more graph for each, over the same
    weights.
    `rounding` of int4: "nearest", or "gptq" with calibration text that the model draws itself.
    `max_kl`, `max_bytes`: at int4 the matrices that matter most are upgraded to int8. `max_kl` upgrades as few as keep
    the check `mean_kl` within it [nats]; `max_bytes` as many as a bundle of that size has room for.
    `keep_vocab`: a text file, or a folder of them. The head keeps the tokens of this text and never says another.
    `genai`: the bundle runs with onnxruntime-genai too.
    """

    target: Target
    context: int
    _: KW_ONLY
    smaller_contexts: Sequence[int] = ()
    rounding: str = "nearest"
    max_kl: float | None = None
    max_bytes: int | None = None
    keep_vocab: Path | None = None
    genai: bool = False

    @property
    def is_mixed(self) -> bool:
        """Whether some int4 matrices may become int8."""
        return self.max_kl is not None or self.max_bytes is not None

    @property
    def contexts(self) -> list[int]:
        """The cache capacity of every graph, ascending."""
        return [*sorted(set(self.smaller_contexts)), self.context]

    def check(self, a: Architecture) -> None:
        """Raise InputError where the options do not fit the target or the architecture."""
        if self.target.precision != "int4" and self.is_mixed:
            raise InputError(f"only int4 can be mixed with a higher precision, not {self.target.precision}", "use int4")
        if (own := self.target.block_precisions) and len(own) != len(a.blocks):
            raise InputError(
                f"precisions for {len(own)} blocks, the model has {len(a.blocks)}", "give one for each block"
            )
        if own and (self.is_mixed or self.target.fast):
            raise InputError(
                "every block has its precision already", "leave out --max-kl, --max-mb and --fast, or --bits-of"
            )
        if not 1 <= self.context <= a.max_positions:
            raise InputError(
                f"context {self.context} is outside 1 to the model's {a.max_positions} positions", "change --context"
            )
        *smaller, _ = self.contexts
        if smaller and not self.target.on_tensorrt:
            raise InputError(f"a bundle for {self.target.name} has one context", "give the largest --context alone")
        if smaller and not 1 <= smaller[0] <= smaller[-1] < self.context:
            raise InputError(f"contexts {smaller} are outside 1 to {self.context - 1}", "change --context")


@dataclass(frozen=True)
class PreparedWeights:
    """The weights that the graphs of a bundle are built from.

    `smoothed`: the checkpoint; for an int8 KV cache with smoothed weights. `full_vocab`: its weights as stored, with
    every token in the head. `stored`: those of the bundle, whose head may be pruned.
    """

    smoothed: Checkpoint
    full_vocab: StoredWeights
    stored: StoredWeights

    def upgraded(self, matrices: Mapping[str, QuantizedMatrix]) -> PreparedWeights:
        """The same weights with `matrices` in place of those by the same names."""
        full_vocab, stored = (
            replace(weights, quantized=weights.quantized | dict(matrices)) for weights in (self.full_vocab, self.stored)
        )
        return replace(self, full_vocab=full_vocab, stored=stored)


def prepare_weights(
    checkpoint: Checkpoint,
    options: ExportOptions,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    on_step: OnStep,
    *,
    unfinished: Unfinished | None = None,
) -> PreparedWeights:
    """The weights of `checkpoint` as `options` ask for them. `unfinished` keeps the calibration.

    `tokens` are those of the text that is searched for overflows of float16. `on_step` is told each step.
    Raises UnsupportedError where the precision cannot hold a matrix, InputError or ArtefactError where the text of
    `keep_vocab` is empty or cannot be read.
    """
    a, target = checkpoint.architecture, options.target
    smoothed, statistics = _calibrated(checkpoint, options, on_step, unfinished)
    token_ids = None
    if options.keep_vocab is not None:
        on_step("reading the text whose tokens the head keeps")
        token_ids = pruned_vocab(tokenizer, pieces(options.keep_vocab), a.vocab_size)
    fp32_ffns = frozenset[str]()
    if target.compute_dtype == ir.DataType.FLOAT16:
        fp32_ffns = find_fp32_ffns(a, checkpoint.weights, np.asarray(tokens)[: a.max_positions])
    on_step(f"rounding to {', '.join(target.all_precisions)}")
    full_vocab = replace(
        store(a, smoothed.weights, target, statistics.moments),
        fp32_ffns=fp32_ffns,
        cache_scales=cache_scales(statistics.absmax),
    )
    stored = full_vocab if token_ids is None else full_vocab.with_pruned_vocab(token_ids)
    return PreparedWeights(smoothed, full_vocab, stored)


def _kept(unfinished: Unfinished, collect: Callable[[], CalibrationStatistics]) -> CalibrationStatistics:
    """The statistics that the interrupted export collected, or else what `collect` returns."""
    file = unfinished.folder / "calibration.npz"
    if (sha256 := unfinished.parts.get("calibration")) is not None:
        with contextlib.suppress(OSError):
            if artefact.sha256_file(file) == sha256:
                return load_statistics(file)
    statistics = collect()
    save_statistics(file, statistics)
    unfinished.add("calibration", artefact.sha256_file(file))
    return statistics


def _calibrated(
    checkpoint: Checkpoint, options: ExportOptions, on_step: OnStep, unfinished: Unfinished | None
) -> tuple[Checkpoint, CalibrationStatistics]:
    """The checkpoint, smoothed for an int8 KV cache, and the statistics that rounding needs, which may be none."""
    target = options.target
    by_gptq = "int4" in target.all_precisions and options.rounding == "gptq"
    if not (by_gptq or target.int8_cache):
        return checkpoint, CalibrationStatistics({}, {})
    on_step("drawing calibration text")

    def collect() -> CalibrationStatistics:
        return collect_statistics(checkpoint.architecture, checkpoint.weights, with_moments=by_gptq)

    statistics = collect() if unfinished is None else _kept(unfinished, collect)
    if not target.int8_cache:
        return checkpoint, statistics
    weights, absmax = smooth_attention(
        checkpoint.architecture, checkpoint.weights, statistics.absmax, smooth_values=target.precision == "int8"
    )
    return replace(checkpoint, weights=weights), statistics._replace(absmax=absmax)
