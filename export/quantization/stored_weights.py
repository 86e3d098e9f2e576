"""Weights as a bundle stores them: rounded to the precision, or quantised with searched scales.

Quantisation is weight-only and symmetric, because TensorRT's DequantizeLinear accepts no zero point other than 0.

| precision | scales |
|---|---|
| int4 | one per block of 32, 64 or 128 neighbouring inputs of an output |
| int8 for ONNX Runtime | the same |
| int8 for TensorRT, which knows blocks for int4 only | one per output |
| int8 embedding and head | one per token |

Some int4 matrices have blocks that lie between two ends rather than around zero, such as those of a Q4_1 file. These
get an offset per block as well (`merino_edge.export.quantization.quantized_matrix`). This module knows no graph.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np

from merino_edge.architecture import Architecture
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
from merino_edge.storage import Form, stored_as
from merino_edge.weights import is_matrix, weight_shapes

EMBEDDING, POSITIONS, HEAD = "embedding.weight", "positions.weight", "head.weight"
RANDOM_STD = 0.02
# Offsets cost a little time, so a matrix gets them where they leave less than this share of its squared error. They
# leave 0.80 for normally distributed weights, 0.13 to 0.31 for the matrices of SmolLM2's Q4_1 file (docs/lab-notes.md).
WORTH_OFFSETS = 0.5
LAYER = re.compile(r"blocks\.([0-9]+)\.layers\.")  # how the name of a layer's weight begins
SAMPLED_ROWS = 64  # of a matrix, to decide whether it gets offsets

StoreScales = Callable[[np.ndarray], np.ndarray]  # scales [N, G] -> the scales that are read back


@dataclass(frozen=True)
class StoredWeights:
    """A model's weights in the form a target stores them, by the names of merino_edge.weights.

    `fp32_ffns`: prefixes of the FFNs that compute in float32 (merino_edge.export.quantization.fp16_overflow).
    `pruned_vocab` [V']: ascending ids of the tokens that a pruned head gives logits for; None: the head has all.
    `cache_scales`: one scale [] for each int8 cache, by its name in the graph.
    """

    arrays: dict[str, np.ndarray]
    quantized: dict[str, QuantizedMatrix]
    fp32_ffns: frozenset[str] = frozenset()
    pruned_vocab: np.ndarray | None = None
    cache_scales: Mapping[str, np.ndarray] = field(default_factory=dict)

    @property
    def own_head(self) -> bool:
        """Whether the head is stored apart from the embedding, even if the two are tied."""
        return HEAD in self.quantized

    def with_pruned_vocab(self, token_ids: np.ndarray) -> StoredWeights:
        """These weights with a head for the tokens `token_ids` [V'] only.

        A tied table stays whole: the graph takes the rows of the tokens when it is loaded.
        """
        arrays = self.arrays | {HEAD: self.arrays[HEAD][token_ids]} if HEAD in self.arrays else self.arrays
        quantized = self.quantized | {HEAD: self.quantized[HEAD].rows(token_ids)} if self.own_head else self.quantized
        return replace(self, arrays=arrays, quantized=quantized, pruned_vocab=token_ids)

    def dequantize(self) -> dict[str, np.ndarray]:
        """The weights that the stored ones stand for, float32. Head rows of tokens that were pruned are zeros."""
        arrays = {name: array.astype(np.float32) for name, array in self.arrays.items()}
        arrays |= {name: matrix.dequantize() for name, matrix in self.quantized.items()}
        if self.pruned_vocab is not None and HEAD in arrays:
            full = np.zeros_like(arrays[EMBEDDING])
            full[self.pruned_vocab] = arrays[HEAD]
            arrays[HEAD] = full
        return arrays


def store(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    target: Target,
    moments: Mapping[str, np.ndarray] | None = None,
) -> StoredWeights:
    """The checkpoint's weights in the form `target` stores them.

    An int4 matrix is rounded by GPTQ if `moments` (merino_edge.export.quantization.calibration) has its inputs'
    second moments, and to the nearest codes otherwise.
    Quantised models keep embedding and head at int8, with one scale per token (at int4 with `target.fast`). A tied
    table is stored once. TensorRT looks up floating point only, so there it becomes a float16 embedding and a head.
    Matrices whose inputs blocks do not divide have another form (`merino_edge.storage.Form`).
    Raises UnsupportedError where a matrix overflows float16.
    """
    stored = StoredWeights({}, {})
    for name, weight in weights.items():
        own = _own_target(name, target)
        if bits := _bits(name, weight.shape, own):
            stored.quantized[name] = quantize_matrix(name, weight, bits, own, (moments or {}).get(name))
        else:
            stored.arrays[name] = _rounded(name, weight, _float_type(name, weight.shape, own))
    if _splits_table(a, target):
        stored.quantized[HEAD] = quantize_matrix(HEAD, weights[EMBEDDING], 8, target)
    return stored


def cache_scales(absmax: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The scale [] of each int8 cache, from the largest magnitudes of its channels [Hkv, D]."""
    return {name: nonzero(channels.max() / 127) for name, channels in absmax.items()}


def quantize_matrix(
    name: str, weight: np.ndarray, bits: int, target: Target, moments: np.ndarray | None = None
) -> QuantizedMatrix:
    """The matrix `weight` [N, K] at 8 or 4 `bits`; at 4 by GPTQ where the `moments` [K, K] of its inputs are given.

    At 4 bits, and at 8 for ONNX Runtime, K must be a multiple of INT4_BLOCK. Raises UnsupportedError where its scales
    overflow float16.
    """
    block = _block(name, weight.shape[1], bits, target)
    groups = weight.astype(np.float32).reshape(len(weight), -1, block)  # [N, G, B]
    if bits == 8:
        scales = _half_scales(name, nonzero(np.abs(groups).max(axis=-1) / 127))
        return QuantizedMatrix(np.clip(np.rint(groups / scales[..., None]), -127, 127).astype(np.int8), scales, bits)
    if not target.fast and _wants_offsets(groups):
        store_scales = partial(_half_scales, name) if target.on_tensorrt else _byte_scales
        return _with_offsets(groups, store_scales, moments)
    signed = not target.on_tensorrt  # TensorRT takes positive scales only

    def choose_scales(group: int, w: np.ndarray, importance: np.ndarray) -> np.ndarray:
        return _half_scales(name, search_scales(w[:, None], importance[None], signed=signed))[:, 0]

    if moments is not None:
        return QuantizedMatrix(*gptq(groups, moments, choose_scales), 4)
    scales = _half_scales(name, search_scales(groups, signed=signed))
    return QuantizedMatrix(round_to_nearest(groups, scales), scales, 4)


def _with_offsets(groups: np.ndarray, store_scales: StoreScales, moments: np.ndarray | None = None) -> QuantizedMatrix:
    """int4 groups [N, G, B] with an offset for each."""
    centres = block_offsets(groups)  # [N, G]
    offset_groups = _whole_blocks(centres, groups.shape[2])
    both = [search_scales(groups - centres[..., None]), search_scales(offset_groups)]
    scales, offset_scales = np.split(store_scales(np.concatenate(both, axis=1)), [groups.shape[1]], axis=1)
    offsets = QuantizedMatrix(round_to_nearest(offset_groups, offset_scales), offset_scales, 4)
    groups = groups - offsets.dequantize()[:, : groups.shape[1], None]
    if moments is None:
        codes = round_to_nearest(groups, scales)
    else:
        codes, scales = gptq(groups, moments, lambda group, w, importance: scales[:, group])
    return QuantizedMatrix(codes, scales, 4, offsets)


def _rounded(name: str, values: np.ndarray, dtype: type) -> np.ndarray:
    """The values as `dtype`. Raises UnsupportedError where a finite number becomes infinite."""
    with np.errstate(over="ignore"):
        rounded: np.ndarray = np.asarray(values).astype(dtype)
    if (np.isinf(rounded) & np.isfinite(values)).any():
        largest = float(np.abs(values).max())
        raise UnsupportedError(
            f"{name} reaches {largest:.3g}, {np.dtype(dtype).name} ends at {np.finfo(dtype).max:.0f}",
            "export --precision fp32",
        )
    return rounded


def random_stored(a: Architecture, target: Target, seed: int = 0) -> StoredWeights:
    """Random weights in the form `target` stores them, for timing: nothing is quantised, so they are made fast.

    Names, shapes and types are those that `store` gives, so that a graph takes as long to run. Matrices have mean 0
    and standard deviation 0.02; norms are 1 and biases 0.
    """
    rng = np.random.default_rng(seed)
    stored = StoredWeights({}, {})
    shapes = weight_shapes(a)
    if _splits_table(a, target):
        shapes[HEAD] = shapes[EMBEDDING]
    for name, shape in shapes.items():
        own = _own_target(name, target)
        if bits := _bits(name, shape, own):
            stored.quantized[name] = _random_codes(rng, name, shape, bits, own)
        elif len(shape) == 1:
            stored.arrays[name] = np.full(shape, float(name.endswith("norm.weight")), np.float32)
        else:
            uniform = rng.random(shape, np.float32)  # much faster than normal numbers
            uniform -= np.float32(0.5)
            uniform *= np.float32(RANDOM_STD * math.sqrt(12))
            stored.arrays[name] = uniform.astype(_float_type(name, shape, own), copy=False)
    return stored


def _own_target(name: str, target: Target) -> Target:
    """`target` at the precision of the block whose layers the weight `name` belongs to; itself for any other weight."""
    layer = LAYER.match(name)
    return target.of_block(int(layer[1])) if layer else target


def _splits_table(a: Architecture, target: Target) -> bool:
    """Whether a tied table is stored twice, as an embedding and a head."""
    return a.tied_head and target.storage.splits_table


def odd_matrices(a: Architecture, target: Target) -> dict[str, str]:
    """The precision of every matrix that has another than its kind, since blocks do not divide its inputs."""
    odd = {}
    for name, shape in weight_shapes(a).items():
        usual = _form(name, _own_target(name, target))
        if is_matrix(name, shape) and (form := usual.for_inputs(shape[-1])) != usual:
            odd[name] = f"int{form.bits}" if form.block is not None else f"fp{form.bits}"
    return odd


def _form(name: str, target: Target) -> Form:
    """How a matrix such as `name` is stored where blocks divide its inputs."""
    storage = target.storage
    forms = {POSITIONS: storage.positions, EMBEDDING: storage.embedding, HEAD: storage.head}
    return storage.matrix if target.fast and name != POSITIONS else forms.get(name, storage.matrix)


def _bits(name: str, shape: tuple[int, ...], target: Target) -> int:
    """Bits of the codes that a weight is stored as; 0 where it stays floating point."""
    form = _form(name, target).for_inputs(shape[-1])
    return 0 if not is_matrix(name, shape) or form.block is None else form.bits


def _float_type(name: str, shape: tuple[int, ...], target: Target) -> type:
    if not is_matrix(name, shape):
        return np.float32
    return np.float32 if _form(name, target).for_inputs(shape[-1]).bits == 32 else np.float16


def _block(name: str, inputs: int, bits: int, target: Target) -> int:
    """How many inputs share a scale: the largest divisor of the target's block that divides the matrix."""
    if not stored_as(f"int{bits}", target.name).needs_blocks:
        return inputs
    if bits == 8 and name in (EMBEDDING, HEAD):
        return inputs
    return math.gcd(inputs, target.block)


def _wants_offsets(groups: np.ndarray) -> bool:
    """Whether offsets leave less than `WORTH_OFFSETS` of the squared error of int4 groups [N, G, B], by a sample."""
    sample = groups[:: -(-len(groups) // SAMPLED_ROWS)]
    scales = search_scales(sample)
    error = sample - round_to_nearest(sample, scales) * scales[..., None]
    error_with_offsets = sample.reshape(len(sample), -1) - _with_offsets(sample, lambda scales: scales).dequantize()
    return bool(np.square(error_with_offsets).sum() < WORTH_OFFSETS * np.square(error).sum())


def _whole_blocks(values: np.ndarray, block: int) -> np.ndarray:
    """The values [N, G] filled up with zeros to whole blocks: [N, ceil(G / block), block]."""
    padded = np.pad(values, ((0, 0), (0, -values.shape[1] % block)))
    return np.asarray(padded.reshape(len(values), -1, block))


def _byte_scales(scales: np.ndarray) -> np.ndarray:
    """The scales as they are read back from bytes times each row's largest."""
    return scales_from_bytes(*scales_to_bytes(scales))


def _half_scales(name: str, scales: np.ndarray) -> np.ndarray:
    """The scales as they are read back from float16. None becomes 0, which TensorRT would refuse."""
    least = np.finfo(np.float16).smallest_subnormal
    stored = _rounded(name, scales, np.float16)
    return np.asarray(np.copysign(np.maximum(np.abs(stored), least), scales), np.float32)


def _random_codes(
    rng: np.random.Generator, name: str, shape: tuple[int, ...], bits: int, target: Target
) -> QuantizedMatrix:
    outputs, inputs = shape
    block = _block(name, inputs, bits, target)
    largest = (1 << (bits - 1)) - 1
    codes = rng.integers(-largest, largest + 1, (outputs, inputs // block, block), np.int8)  # [N, G, B]
    scale = np.float16(RANDOM_STD / math.sqrt(largest * (largest + 1) / 3))
    return QuantizedMatrix(codes, np.full(codes.shape[:2], scale, np.float32), bits)
