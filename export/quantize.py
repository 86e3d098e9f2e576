"""Weights as a bundle stores them: rounded to the precision, or quantised with a searched scale.

Weight-only and symmetric, because TensorRT's DequantizeLinear accepts no other zero point than 0. `int4` has one
scale per 32 neighbouring inputs of an output, `int8` as many, or one per output for TensorRT (which knows blocks for
int4 only), embedding and head one per token. Scales are float16. No calibration data is used. Knows no graph; `restore`
gives back what the stored weights stand for, so that a graph can be compared with exactly what it holds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.counts import INT4_BLOCK
from merino_edge.errors import UnsupportedError
from merino_edge.export.gptq import gptq
from merino_edge.export.rounding import nonzero, search_scales
from merino_edge.export.targets import Target
from merino_edge.weights import weight_shapes

EMBEDDING, POSITIONS, HEAD = "embedding.weight", "positions.weight", "head.weight"
RANDOM_STD = 0.02


@dataclass(frozen=True)
class Quantized:
    """codes int8 [N, G, B], scales float32 [N, G], each a float16; the weight [N, G * B] is codes * scales."""

    codes: np.ndarray
    scales: np.ndarray
    bits: int

    def restore(self) -> np.ndarray:
        """float32 [N, G * B]"""
        values = self.codes.astype(np.float32) * self.scales[..., None]
        return np.asarray(values.reshape(len(self.codes), -1))


@dataclass(frozen=True)
class StoredWeights:
    """A model's weights in the form a target stores them, by the names of merino_edge.weights."""

    arrays: dict[str, np.ndarray]
    quantized: dict[str, Quantized]

    @property
    def own_head(self) -> bool:
        """Whether the head is a matrix of its own, of a tied embedding in another form too."""
        return HEAD in self.quantized

    def restore(self) -> dict[str, np.ndarray]:
        """What the stored weights stand for, float32."""
        arrays = {name: array.astype(np.float32) for name, array in self.arrays.items()}
        return arrays | {name: matrix.restore() for name, matrix in self.quantized.items()}


def store(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    target: Target,
    moments: Mapping[str, np.ndarray] | None = None,
) -> StoredWeights:
    """The checkpoint's weights in the form `target` stores them. int4 matrices whose inputs' `moments` are given
    (merino_edge.export.calibration) are rounded by GPTQ, others to the nearest code.

    Quantised models keep embedding and head at int8, one scale per token; a tied table stays one. TensorRT looks up
    floating point only: there the embedding is float16, and a tied table two. Raises UnsupportedError where a matrix
    cannot be cut into blocks, or float16 is too small for it.
    """
    stored = StoredWeights({}, {})
    for name, weight in weights.items():
        if bits := _bits(name, weight.shape, target):
            stored.quantized[name] = _quantize(name, weight, bits, target, (moments or {}).get(name))
        else:
            stored.arrays[name] = _rounded(name, weight, _float_type(weight.shape, target))
    if _splits_table(a, target):
        stored.quantized[HEAD] = _quantize(HEAD, weights[EMBEDDING], 8, target)
    return stored


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
    # At int4 the head would cost more accuracy than any ten layers.
    return 4 if target.precision == "int4" and name not in (EMBEDDING, HEAD) else 8


def _float_type(shape: tuple[int, ...], target: Target) -> type:
    return np.float32 if len(shape) == 1 or target.precision == "fp32" else np.float16


def _block(name: str, inputs: int, bits: int, target: Target) -> int:
    """Inputs that share a scale. Raises UnsupportedError where they do not divide the matrix."""
    if bits == 8 and not target.blocks_int8:
        return inputs
    if inputs % INT4_BLOCK:
        raise UnsupportedError(f"{name} has {inputs} inputs, not a multiple of {INT4_BLOCK}", "export --precision fp16")
    return inputs if name in (EMBEDDING, HEAD) else INT4_BLOCK


def _quantize(name: str, weight: np.ndarray, bits: int, target: Target, moments: np.ndarray | None = None) -> Quantized:
    block = _block(name, weight.shape[1], bits, target)
    # Through the type that scales are stored in; one that rounds to 0 is refused by TensorRT.
    if bits == 4 and moments is not None:
        quantized = Quantized(*gptq(weight, moments, block), bits)
    else:
        quantized = int4_blocks(weight) if bits == 4 else int8_rows(weight, block)
    scales = np.maximum(_rounded(name, quantized.scales, np.float16), np.finfo(np.float16).smallest_subnormal)
    return Quantized(quantized.codes, scales.astype(np.float32), bits)


def _random_codes(rng: np.random.Generator, name: str, shape: tuple[int, ...], bits: int, target: Target) -> Quantized:
    outputs, inputs = shape
    block = _block(name, inputs, bits, target)
    largest = (1 << (bits - 1)) - 1
    codes = rng.integers(-largest, largest + 1, (outputs, inputs // block, block), np.int8)  # [N, G, B]
    scale = np.float16(RANDOM_STD / math.sqrt(largest * (largest + 1) / 3))
    return Quantized(codes, np.full(codes.shape[:2], scale, np.float32), bits)


def int8_rows(weight: np.ndarray, block: int | None = None) -> Quantized:
    """weight [N, K] with one scale per `block` inputs (default: per output), codes within -127..127."""
    groups = weight.astype(np.float32).reshape(len(weight), -1, block or weight.shape[1])  # [N, G, B]
    scales = nonzero(np.abs(groups).max(axis=-1) / 127)
    codes = np.clip(np.rint(groups / scales[..., None]), -127, 127).astype(np.int8)
    return Quantized(codes, scales, bits=8)


def int4_blocks(weight: np.ndarray, block: int = INT4_BLOCK) -> Quantized:
    """weight [N, K] (K a multiple of `block`) with one scale per block, codes within -8..7."""
    groups = weight.astype(np.float32).reshape(len(weight), -1, block)  # [N, G, B]
    codes = np.empty(groups.shape, np.int8)
    scales = np.empty(groups.shape[:2], np.float32)
    rows = max(1, (1 << 22) // (groups.shape[1] * block))  # bound the working set
    for start in range(0, len(groups), rows):
        part = slice(start, start + rows)
        codes[part], scales[part] = search_scales(groups[part])
    return Quantized(codes, scales, bits=4)
