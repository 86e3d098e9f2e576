"""GPTQ (Frantar et al. 2023): round a matrix column by column; columns still to come make up for the error.

GPTQ minimises the error of the matrix's outputs on calibration text, |(W - Q) X|^2, not the error of its entries.
It picks the scales of a block when it reaches that block, for the weights as they are by then.
This module knows no graph and no text: `merino_edge.export.quantization.calibration` gives the second moments.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from merino_edge.export.quantization.rounding import int4_codes

DAMPING = 0.01  # share of the mean second moment that is added to each one, for inputs that the text never showed

# (index of the block, its weights [N, B] so far, importance of each input's error [B]) -> scales [N] as stored
ChooseScales = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


def inverse_hessian_factor(moments: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor U [K, K] float32 of the inverse of the damped moments [K, K]: inverse = U^T U."""
    h = moments.astype(np.float64)
    unseen = np.diag(h) == 0
    h[unseen, unseen] = 1.0
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    return np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)


def gptq(groups: np.ndarray, moments: np.ndarray, choose_scales: ChooseScales) -> tuple[np.ndarray, np.ndarray]:
    """Round weights `groups` [N, G, B] to int4: codes int8 [N, G, B] and scales float32 [N, G].

    `moments` [G * B, G * B] is the sum of x x^T over the matrix's inputs x.
    """
    outputs, blocks, block = groups.shape
    w = np.array(groups.reshape(outputs, -1), np.float32, order="F")  # columns are contiguous
    factor = inverse_hessian_factor(moments)
    importance = 1 / np.square(np.diag(factor))
    codes, scales = np.empty(groups.shape, np.int8), np.empty(groups.shape[:2], np.float32)
    for group in range(blocks):
        first, end = group * block, (group + 1) * block
        relative = importance[first:end] / importance[first:end].mean()
        scale = scales[:, group] = choose_scales(group, np.ascontiguousarray(w[:, first:end]), relative)
        errors = np.empty((outputs, block), np.float32, order="F")
        for j in range(first, end):
            code = int4_codes(w[:, j] / scale)
            error = (w[:, j] - code * scale) / factor[j, j]
            w[:, j + 1 : end] -= np.outer(error, factor[j, j + 1 : end])
            codes[:, group, j - first], errors[:, j - first] = code, error
        w[:, end:] -= errors @ factor[first:end, end:]  # one product for all later blocks, as in the paper
    return codes, scales
