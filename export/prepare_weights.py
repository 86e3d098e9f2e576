"""A checkpoint's weights as one bundle will store them: what export does before there is a graph.

The steps are observing the model on text (GPTQ, the int8 KV cache), smoothing, finding the FFNs that overflow float16,
rounding, and pruning the vocabulary. Knows no graph, no engine and no bundle.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir

from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint
from merino_edge.data.corpus import pieces
from merino_edge.errors import InputError
from merino_edge.export.quantization.calibration import CalibrationStatistics, collect_statistics
from merino_edge.export.quantization.fp16_overflow import find_fp32_ffns
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix
from merino_edge.export.quantization.smoothing import smooth_attention
from merino_edge.export.quantization.stored_weights import StoredWeights, cache_scales, store
from merino_edge.export.targets import Target
from merino_edge.export.vocabulary_pruning import pruned_vocab
from merino_edge.tokenizer import Tokenizer

OnStep = Callable[[str], None]


@dataclass(frozen=True)
class ExportOptions:
    """What a bundle shall be.

    `context`: positions of the KV cache. `smaller`: for TensorRT, whose graphs fix the capacity of the cache, one more
    graph for each of these, over the same weights.
    `rounding` of int4: "nearest", or "gptq" on text that the model draws itself.
    At int4 the matrices that matter most are int8: as few as keep `mean_kl` within `max_kl` [nats], or as many as a
    bundle of `max_bytes` has room for.
    `keep_vocab`: a text file, or a folder of them; the head keeps its tokens, and others are never generated.
    """

    target: Target
    context: int
    smaller: Sequence[int] = ()
    rounding: str = "nearest"
    max_kl: float | None = None
    max_bytes: int | None = None
    keep_vocab: Path | None = None

    @property
    def is_mixed(self) -> bool:
        """Whether some int4 matrices may become int8."""
        return self.max_kl is not None or self.max_bytes is not None

    @property
    def contexts(self) -> list[int]:
        """The capacity of every graph's cache, ascending."""
        return [*sorted(set(self.smaller)), self.context]

    def check(self, a: Architecture) -> None:
        """Raise InputError where `a` or the target does not go with these options."""
        if self.target.precision != "int4" and self.is_mixed:
            raise InputError(f"only int4 can be mixed with a higher precision, not {self.target.precision}", "use int4")
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
    """What the graph is built from."""

    smooth: Checkpoint  # the checkpoint, its weights smoothed for an int8 cache where the target has one
    whole: StoredWeights  # with every token in the head
    stored: StoredWeights  # with the tokens that are kept

    def upgraded(self, high: Mapping[str, QuantizedMatrix]) -> PreparedWeights:
        """These, with the matrices `high` in place of theirs."""
        whole, stored = (replace(part, quantized=part.quantized | dict(high)) for part in (self.whole, self.stored))
        return replace(self, whole=whole, stored=stored)


def prepare_weights(
    checkpoint: Checkpoint, options: ExportOptions, tokenizer: Tokenizer, tokens: Sequence[int], on_step: OnStep
) -> PreparedWeights:
    """Round `checkpoint` as `options` say; `tokens` are of the text on which an overflow of float16 is looked for.

    `on_step` is told what happens now. Raises UnsupportedError (a matrix that the precision cannot hold), InputError
    and ArtefactError (the text of `keep_vocab`).
    """
    a, target = checkpoint.architecture, options.target
    smooth, observed = _observed(checkpoint, options, on_step)
    kept = None
    if options.keep_vocab is not None:
        on_step("reading the text to keep the vocabulary of")
        kept = pruned_vocab(tokenizer, pieces(options.keep_vocab), a.vocab_size)
    half = target.compute_dtype == ir.DataType.FLOAT16
    wide = find_fp32_ffns(a, checkpoint.weights, np.asarray(tokens)[: a.max_positions]) if half else frozenset[str]()
    on_step(f"rounding to {target.precision}")
    whole = store(a, smooth.weights, target, observed.moments)
    whole = replace(whole, fp32_ffns=wide, cache_scales=cache_scales(observed.reach))
    return PreparedWeights(smooth, whole, whole if kept is None else whole.with_pruned_vocab(kept))


def _observed(checkpoint: Checkpoint, options: ExportOptions, on_step: OnStep) -> tuple[Checkpoint, CalibrationStatistics]:
    """The checkpoint, smoothed where the cache is int8, and what rounding needs to know of it."""
    target = options.target
    by_gptq = target.precision == "int4" and options.rounding == "gptq"
    if not (by_gptq or target.int8_cache):
        return checkpoint, CalibrationStatistics({}, {})
    on_step("drawing calibration text")
    observed = collect_statistics(checkpoint.architecture, checkpoint.weights, with_moments=by_gptq)
    if not target.int8_cache:
        return checkpoint, observed
    smooth_values = target.precision == "int8"
    weights, reach = smooth_attention(checkpoint.architecture, checkpoint.weights, observed.reach, smooth_values)
    return replace(checkpoint, weights=weights), observed._replace(reach=reach)
