"""Symmetric scales for blocks of weights: the one with the least squared error of those tried."""

from __future__ import annotations

import numpy as np

# How far below the largest magnitude a scale may clip; 1.0 is plain round-to-nearest.
SHRINK = (np.arange(72, 112, 2) / 100).astype(np.float32)


def search_scales(groups: np.ndarray, bits: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """Codes [N, G, B] and scales [N, G] of groups [N, G, B]: of the scales `SHRINK` x max|w| over the middle of the
    largest codes (7.5 at 4 bits), the one with the least squared error, group by group."""
    least, most = -(1 << (bits - 1)), (1 << (bits - 1)) - 1
    largest = np.abs(groups).max(axis=-1) / np.float32(most + 0.5)
    best_codes = np.zeros(groups.shape, np.int8)
    best_scales = nonzero(largest)
    best_error = np.full(largest.shape, np.inf, np.float32)
    for shrink in SHRINK:
        scales = nonzero(largest * shrink)
        codes = np.clip(np.rint(groups / scales[..., None]), least, most)
        error = np.square(groups - codes * scales[..., None]).sum(axis=-1)
        better = error < best_error
        best_error[better], best_scales[better] = error[better], scales[better]
        best_codes[better] = codes[better].astype(np.int8)
    return best_codes, best_scales


def nonzero(scales: np.ndarray) -> np.ndarray:
    """A group of zeros gets scale 1, so that nothing divides by zero."""
    return np.where(scales > np.finfo(np.float32).tiny, scales, np.float32(1.0)).astype(np.float32)
