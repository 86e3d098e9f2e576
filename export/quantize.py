"""Weights as a bundle stores them: rounded to the precision, or quantised with a searched scale.

Weight-only and symmetric, because TensorRT's DequantizeLinear accepts no other zero point than 0. `int4` has one
scale per 32 neighbouring inputs of an output, `int8` as many, or one per output for `rtx` (TensorRT knows blocks for
int4 only). No calibration data is used. Knows no graph; `restore` gives back what the stored weights stand for,
so that a graph can be compared with exactly what it holds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.counts import INT4_BLOCK
from merino_edge.errors import UnsupportedError
from merino_edge.export.targets import Target

# How far below the largest magnitude a scale may clip; 1.0 is plain round-to-nearest.
INT4_SHRINK = (np.arange(72, 112, 2) / 100).astype(np.float32)


TABLES = ("embedding.weight", "positions.weight")  # read row by row, never multiplied by


@dataclass(frozen=True)
class Quantized:
    """codes int8 [N, G, B], scales float32 [N, G]; the weight [N, G * B] is codes * scales."""

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
        """Whether the head is quantised, so that a tied embedding cannot serve as it."""
        return "head.weight" in self.quantized

    def restore(self) -> dict[str, np.ndarray]:
        """What the stored weights stand for, float32."""
        arrays = {name: array.astype(np.float32) for name, array in self.arrays.items()}
        return arrays | {name: matrix.restore() for name, matrix in self.quantized.items()}


def store(a: Architecture, weights: Mapping[str, np.ndarray], target: Target) -> StoredWeights:
    """The checkpoint's weights in the form `target` stores them.

    Quantised models keep a float16 embedding (one row of it is read per step) and an int8 head (all of it is), so a
    tied table becomes two entries. Raises UnsupportedError where a matrix cannot be cut into blocks.
    """
    quantize = target.precision in ("int8", "int4")
    wide: type = np.float32 if target.precision == "fp32" else np.float16
    stored = StoredWeights({}, {})
    for name, weight in weights.items():
        if weight.ndim == 1:
            stored.arrays[name] = weight.astype(np.float32)
        elif quantize and name not in TABLES:
            # At int4 the head would cost more accuracy than any ten layers.
            bits = 4 if target.precision == "int4" and name != "head.weight" else 8
            stored.quantized[name] = _quantize(name, weight, bits, target)
        else:
            stored.arrays[name] = weight.astype(wide)
    if quantize and a.tied_head:
        stored.quantized["head.weight"] = _quantize("head.weight", weights["embedding.weight"], 8, target)
    return stored


def _quantize(name: str, weight: np.ndarray, bits: int, target: Target) -> Quantized:
    per_output = bits == 8 and target.name == "rtx"
    if weight.shape[1] % INT4_BLOCK and not per_output:
        raise UnsupportedError(
            f"{name} has {weight.shape[1]} inputs, not a multiple of {INT4_BLOCK}", "export --precision fp16"
        )
    # Through the type that scales are stored in; one that rounds to 0 is refused by TensorRT.
    dtype = target.compute_dtype.numpy()
    quantized = int4_blocks(weight) if bits == 4 else int8_rows(weight, None if per_output else INT4_BLOCK)
    scales = np.maximum(quantized.scales.astype(dtype), np.finfo(dtype).smallest_subnormal)
    return Quantized(quantized.codes, scales.astype(np.float32), bits)


def int8_rows(weight: np.ndarray, block: int | None = None) -> Quantized:
    """weight [N, K] with one scale per `block` inputs (default: per output), codes within -127..127."""
    groups = weight.astype(np.float32).reshape(len(weight), -1, block or weight.shape[1])  # [N, G, B]
    scales = _nonzero(np.abs(groups).max(axis=-1) / 127)
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
        codes[part], scales[part] = _search_scales(groups[part])
    return Quantized(codes, scales, bits=4)


def _search_scales(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of the scales `INT4_SHRINK` x max|w| / 7.5, the one with the least squared error, group by group."""
    largest = np.abs(groups).max(axis=-1) / np.float32(7.5)
    best_codes = np.zeros(groups.shape, np.int8)
    best_scales = _nonzero(largest)
    best_error = np.full(largest.shape, np.inf, np.float32)
    for shrink in INT4_SHRINK:
        scales = _nonzero(largest * shrink)
        codes = np.clip(np.rint(groups / scales[..., None]), -8, 7)
        error = np.square(groups - codes * scales[..., None]).sum(axis=-1)
        better = error < best_error
        best_error[better], best_scales[better] = error[better], scales[better]
        best_codes[better] = codes[better].astype(np.int8)
    return best_codes, best_scales


def _nonzero(scales: np.ndarray) -> np.ndarray:
    """A group of zeros gets scale 1, so that nothing divides by zero."""
    return np.where(scales > np.finfo(np.float32).tiny, scales, np.float32(1.0)).astype(np.float32)
