"""Weight-only quantisation: symmetric, one scale per group, the scale searched for the least squared error.

Symmetric because TensorRT's DequantizeLinear accepts no other zero point than 0. `int4` has one scale per 32
neighbouring inputs of an output, `int8` one per output. No calibration data is used.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from merino_edge.counts import INT4_BLOCK

# How far below the largest magnitude a scale may clip; 1.0 is plain round-to-nearest.
INT4_SHRINK = (np.arange(72, 112, 2) / 100).astype(np.float32)


@dataclass(frozen=True)
class Quantized:
    """codes int8 [N, G, B], scales float32 [N, G]; weight [N, G * B] is codes * scales."""

    codes: np.ndarray
    scales: np.ndarray

    def dequantize(self) -> np.ndarray:
        """float32 [N, G * B]"""
        values = self.codes.astype(np.float32) * self.scales[..., None]
        return values.reshape(len(self.codes), -1)


def int8_rows(weight: np.ndarray, block: int | None = None) -> Quantized:
    """weight [N, K] with one scale per `block` inputs (default: per output), codes within -127..127."""
    groups = weight.astype(np.float32).reshape(len(weight), -1, block or weight.shape[1])  # [N, G, B]
    scales = _nonzero(np.abs(groups).max(axis=-1) / 127)
    codes = np.clip(np.rint(groups / scales[..., None]), -127, 127).astype(np.int8)
    return Quantized(codes, scales)


def int4_blocks(weight: np.ndarray, block: int = INT4_BLOCK) -> Quantized:
    """weight [N, K] (K a multiple of `block`) with one scale per block, codes within -8..7."""
    groups = weight.astype(np.float32).reshape(len(weight), -1, block)  # [N, G, B]
    codes = np.empty(groups.shape, np.int8)
    scales = np.empty(groups.shape[:2], np.float32)
    rows = max(1, (1 << 22) // (groups.shape[1] * block))  # bound the working set
    for start in range(0, len(groups), rows):
        part = slice(start, start + rows)
        codes[part], scales[part] = _search_scales(groups[part])
    return Quantized(codes, scales)


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
    """A group of zeros gets scale 1: a scale of 0 divides by zero here and is refused by TensorRT."""
    return np.where(scales > np.finfo(np.float32).tiny, scales, np.float32(1.0)).astype(np.float32)
