"""Symmetric scales for blocks of int4 weights: the one with the least squared error of those tried."""

from __future__ import annotations

import numpy as np

# How far below the largest magnitude a scale may clip; 1.0 is plain round-to-nearest.
SHRINK = (np.arange(72, 112, 2) / 100).astype(np.float32)


def search_scales(groups: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, G, B] and scales [N, G] of groups [N, G, B]: of the scales `SHRINK` x max|w| / 7.5, the one with the
    least squared error, group by group."""
    largest = np.abs(groups).max(axis=-1) / np.float32(7.5)
    best_codes = np.zeros(groups.shape, np.int8)
    best_scales = nonzero(largest)
    best_error = np.full(largest.shape, np.inf, np.float32)
    for shrink in SHRINK:
        scales = nonzero(largest * shrink)
        codes = int4_codes(groups / scales[..., None])
        error = np.square(groups - codes * scales[..., None]).sum(axis=-1)
        better = error < best_error
        best_error[better], best_scales[better] = error[better], scales[better]
        best_codes[better] = codes[better].astype(np.int8)
    return best_codes, best_scales


def int4_codes(values: np.ndarray) -> np.ndarray:
    """To the nearest of -8..7, still in floating point."""
    return np.asarray(np.clip(np.rint(values), -8, 7))


def nonzero(scales: np.ndarray) -> np.ndarray:
    """A group of zeros gets scale 1, so that nothing divides by zero."""
    return np.where(scales > np.finfo(np.float32).tiny, scales, np.float32(1.0)).astype(np.float32)
