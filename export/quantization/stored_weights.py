"""Weights as a bundle stores them: rounded to the precision, or quantised with a searched scale.

Weight-only and symmetric, because TensorRT's DequantizeLinear accepts no other zero point than 0. `int4` has one
scale per block of 32, 64 or 128 neighbouring inputs of an output, `int8` as many, or one per output for TensorRT (which
knows blocks for int4 only), embedding and head one per token. int4 matrices whose blocks lie between two ends rather
than around zero (of a Q4_1 file, for one) get an offset per block as well (merino_edge.export.quantization.quantized_matrix). Knows no
graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.counts import INT4_BLOCK
from merino_edge.errors import UnsupportedError
from merino_edge.export.quantization.gptq import gptq
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix
from merino_edge.export.quantization.rounding import (
    block_offsets,
    nonzero,
    round_to_nearest,
    scales_from_bytes,
    scales_to_bytes,
    search_scales,
)
from merino_edge.export.targets import Target
from merino_edge.weights import weight_shapes

EMBEDDING, POSITIONS, HEAD = "embedding.weight", "positions.weight", "head.weight"
RANDOM_STD = 0.02
# Offsets are kept where they leave less than this of the squared error: they cost a little time. Of normally
# distributed weights they leave 0.80, of the matrices of SmolLM2's Q4_1 file 0.13 to 0.31 (docs/lab-notes.md).
WORTH_OFFSETS = 0.5
LOOKED_AT = 64  # rows of a matrix, to see whether it wants them

Scales = Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class StoredWeights:
    """A model's weights in the form a target stores them, by the names of merino_edge.weights."""

    arrays: dict[str, np.ndarray]
    quantized: dict[str, QuantizedMatrix]
    # Prefixes of the FFNs that compute in float32 (merino_edge.export.quantization.fp16_overflow).
    fp32_ffns: frozenset[str] = frozenset()
    pruned_vocab: np.ndarray | None = None  # ids of the tokens that the head gives logits of [V'], rising; None: all
    cache_scales: Mapping[str, np.ndarray] = field(default_factory=dict)  # of int8 caches, by their names: [] each

    @property
    def own_head(self) -> bool:
        """Whether the head is a matrix of its own, of a tied embedding in another form too."""
        return HEAD in self.quantized

    def with_pruned_vocab(self, kept: np.ndarray) -> StoredWeights:
        """These, with a head for the tokens `kept` [V'] alone; a tied table stays whole, its rows are taken later."""
        arrays = self.arrays | {HEAD: self.arrays[HEAD][kept]} if HEAD in self.arrays else self.arrays
        quantized = self.quantized | {HEAD: self.quantized[HEAD].rows(kept)} if self.own_head else self.quantized
        return replace(self, arrays=arrays, quantized=quantized, pruned_vocab=kept)

    def dequantize(self) -> dict[str, np.ndarray]:
        """What the stored weights stand for, float32."""
        arrays = {name: array.astype(np.float32) for name, array in self.arrays.items()}
        arrays |= {name: matrix.dequantize() for name, matrix in self.quantized.items()}
        if self.pruned_vocab is not None and HEAD in arrays:
            whole = np.zeros_like(arrays[EMBEDDING])  # what it says of other tokens is not asked
            whole[self.pruned_vocab] = arrays[HEAD]
            arrays[HEAD] = whole
        return arrays


def store(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    target: Target,
    moments: Mapping[str, np.ndarray] | None = None,
) -> StoredWeights:
    """The checkpoint's weights in the form `target` stores them. int4 matrices whose inputs' `moments` are given
    (merino_edge.export.quantization.calibration) are rounded by GPTQ, others to the nearest code.

    Quantised models keep embedding and head at int8, one scale per token (`target.fast`: at int4); a tied table stays
    one. TensorRT looks up floating point only: there the embedding is float16, and a tied table two. Raises
    UnsupportedError where a matrix cannot be cut into blocks, or float16 is too small for it.
    """
    stored = StoredWeights({}, {})
    for name, weight in weights.items():
        if bits := _bits(name, weight.shape, target):
            stored.quantized[name] = quantize_matrix(name, weight, bits, target, (moments or {}).get(name))
        else:
            stored.arrays[name] = _rounded(name, weight, _float_type(weight.shape, target))
    if _splits_table(a, target):
        stored.quantized[HEAD] = quantize_matrix(HEAD, weights[EMBEDDING], 8, target)
    return stored


def cache_scales(reach: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Of int8 caches whose channels [Hkv, D] reach so far (merino_edge.export.quantization.calibration, smoothing): [] each."""
    return {name: nonzero(channels.max() / 127) for name, channels in reach.items()}


def quantize_matrix(
    name: str, weight: np.ndarray, bits: int, target: Target, moments: np.ndarray | None = None
) -> QuantizedMatrix:
    """weight [N, K] as codes of 8 or 4 bits, these by GPTQ where `moments` of its inputs are given."""
    block = _block(name, weight.shape[1], bits, target)
    groups = weight.astype(np.float32).reshape(len(weight), -1, block)  # [N, G, B]
    if bits == 8:
        scales = _half_scales(name, nonzero(np.abs(groups).max(axis=-1) / 127))
        return QuantizedMatrix(np.clip(np.rint(groups / scales[..., None]), -127, 127).astype(np.int8), scales, bits)
    if not target.fast and _wants_offsets(groups):
        in_bytes = not target.on_tensorrt
        return _with_offsets(groups, _byte_scales if in_bytes else partial(_half_scales, name), moments)
    signed = not target.on_tensorrt  # TensorRT takes positive scales only

    def choose(group: int, w: np.ndarray, importance: np.ndarray) -> np.ndarray:
        return _half_scales(name, search_scales(w[:, None], importance[None], signed))[:, 0]

    if moments is not None:
        return QuantizedMatrix(*gptq(groups, moments, choose), 4)
    scales = _half_scales(name, search_scales(groups, signed=signed))
    return QuantizedMatrix(round_to_nearest(groups, scales), scales, 4)


def _with_offsets(groups: np.ndarray, as_stored: Scales, moments: np.ndarray | None = None) -> QuantizedMatrix:
    """int4 groups [N, G, B] with an offset for each; `as_stored`: scales [N, G] as they will be read."""
    between = block_offsets(groups)  # [N, G]
    offset_groups = _whole_blocks(between, groups.shape[2])
    both = [search_scales(groups - between[..., None]), search_scales(offset_groups)]
    scales, offset_scales = np.split(as_stored(np.concatenate(both, axis=1)), [groups.shape[1]], axis=1)
    offsets = QuantizedMatrix(round_to_nearest(offset_groups, offset_scales), offset_scales, 4)
    groups = groups - offsets.dequantize()[:, : groups.shape[1], None]
    if moments is None:
        codes = round_to_nearest(groups, scales)
    else:
        codes, scales = gptq(groups, moments, lambda group, w, importance: scales[:, group])
    return QuantizedMatrix(codes, scales, 4, offsets)


def _rounded(name: str, values: np.ndarray, dtype: type) -> np.ndarray:
    """As `dtype`. Raises UnsupportedError where that makes a finite number infinite."""
    with np.errstate(over="ignore"):
        found: np.ndarray = np.asarray(values).astype(dtype)
    if (np.isinf(found) & np.isfinite(values)).any():
        largest = float(np.abs(values).max())
        raise UnsupportedError(
            f"{name} reaches {largest:.3g}, {np.dtype(dtype).name} ends at {np.finfo(dtype).max:.0f}",
            "export --precision fp32",
        )
    return found


def random_stored(a: Architecture, target: Target, seed: int = 0) -> StoredWeights:
    """What `store` makes of weights of mean 0 and deviation 0.02, norms 1 and biases 0, without quantising any.

    Names, shapes and types are those of `store`, so that a graph of it takes as long to run; that is all it is for.
    """
    rng = np.random.default_rng(seed)
    stored = StoredWeights({}, {})
    shapes = weight_shapes(a)
    if _splits_table(a, target):
        shapes[HEAD] = shapes[EMBEDDING]
    for name, shape in shapes.items():
        if bits := _bits(name, shape, target):
            stored.quantized[name] = _random_codes(rng, name, shape, bits, target)
        elif len(shape) == 1:
            stored.arrays[name] = np.full(shape, float(name.endswith("norm.weight")), np.float32)
        else:
            uniform = rng.random(shape, np.float32)  # much faster than normal ones
            uniform -= np.float32(0.5)
            uniform *= np.float32(RANDOM_STD * math.sqrt(12))
            stored.arrays[name] = uniform.astype(_float_type(shape, target), copy=False)
    return stored


def _quantizes(target: Target) -> bool:
    return target.precision in ("int8", "int4")


def _splits_table(a: Architecture, target: Target) -> bool:
    """Whether a tied table becomes an embedding and a head."""
    return a.tied_head and _quantizes(target) and target.on_tensorrt


def _bits(name: str, shape: tuple[int, ...], target: Target) -> int:
    """Of the codes a weight is stored as; 0 where it stays floating point."""
    if len(shape) == 1 or name == POSITIONS or (name == EMBEDDING and target.on_tensorrt) or not _quantizes(target):
        return 0
    # At int4 the head costs more accuracy than any ten layers.
    return 4 if target.precision == "int4" and (target.fast or name not in (EMBEDDING, HEAD)) else 8


def _float_type(shape: tuple[int, ...], target: Target) -> type:
    return np.float32 if len(shape) == 1 or target.precision == "fp32" else np.float16


def _block(name: str, inputs: int, bits: int, target: Target) -> int:
    """Inputs that share a scale: the target's block, or the largest part of it that divides the matrix.

    Raises UnsupportedError where none from INT4_BLOCK on does.
    """
    if bits == 8 and not target.blocks_int8:
        return inputs
    if inputs % INT4_BLOCK:
        raise UnsupportedError(f"{name} has {inputs} inputs, not a multiple of {INT4_BLOCK}", "export --precision fp16")
    if bits == 8 and name in (EMBEDDING, HEAD):
        return inputs
    return math.gcd(inputs, target.block)


def _wants_offsets(groups: np.ndarray) -> bool:
    """Whether int4 groups [N, G, B] are much closer to 16 steps from end to end than to 16 around zero."""
    some = groups[:: -(-len(groups) // LOOKED_AT)]
    plain_scales = search_scales(some)
    plain = some - round_to_nearest(some, plain_scales) * plain_scales[..., None]
    offset = some.reshape(len(some), -1) - _with_offsets(some, lambda scales: scales).dequantize()
    return bool(np.square(offset).sum() < WORTH_OFFSETS * np.square(plain).sum())


def _whole_blocks(values: np.ndarray, block: int) -> np.ndarray:
    """values [N, G] with zeros up to whole blocks: [N, ceil(G / block), block]."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % block)))
    return np.asarray(padded.reshape(len(values), -1, block))


def _byte_scales(scales: np.ndarray) -> np.ndarray:
    """As bytes of each row's largest store them."""
    return scales_from_bytes(*scales_to_bytes(scales))


def _half_scales(name: str, scales: np.ndarray) -> np.ndarray:
    """As float16 stores them. One that rounds to 0 is refused by TensorRT."""
    least = np.finfo(np.float16).smallest_subnormal
    stored = _rounded(name, scales, np.float16)
    return np.asarray(np.copysign(np.maximum(np.abs(stored), least), scales), np.float32)


def _random_codes(rng: np.random.Generator, name: str, shape: tuple[int, ...], bits: int, target: Target) -> QuantizedMatrix:
    outputs, inputs = shape
    block = _block(name, inputs, bits, target)
    largest = (1 << (bits - 1)) - 1
    codes = rng.integers(-largest, largest + 1, (outputs, inputs // block, block), np.int8)  # [N, G, B]
    scale = np.float16(RANDOM_STD / math.sqrt(largest * (largest + 1) / 3))
    return QuantizedMatrix(codes, np.full(codes.shape[:2], scale, np.float32), bits)
