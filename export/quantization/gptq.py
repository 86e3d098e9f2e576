"""GPTQ (Frantar et al. 2023): round a matrix column by column, and let the columns still to come make up for it.

What is minimised is the error of the matrix's outputs over the inputs of calibration text, |(W - Q) X|^2, not that of
its entries. A block's scales are chosen when its turn has come, for the weights as they are by then. Knows no graph and
no text: the inputs' second moments come from `merino_edge.export.quantization.calibration`.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from merino_edge.export.quantization.rounding import int4_codes

DAMPING = 0.01  # of the mean second moment, added to each: inputs that text never showed


def inverse_hessian_factor(moments: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor U [K, K] of the inverse of the damped moments [K, K]: inverse = U^T U, float32."""
    h = moments.astype(np.float64)
    unseen = np.diag(h) == 0
    h[unseen, unseen] = 1.0
    h[np.diag_indices_from(h)] += DAMPING * np.diag(h).mean()
    return np.linalg.cholesky(np.linalg.inv(h)).T.astype(np.float32)


# (a block's number, its weights [N, B] so far, how much the error of each input matters [B]) -> scales [N] as stored
Choose = Callable[[int, np.ndarray, np.ndarray], np.ndarray]


def gptq(groups: np.ndarray, moments: np.ndarray, choose: Choose) -> tuple[np.ndarray, np.ndarray]:
    """int4 codes int8 [N, G, B] of weights `groups` [N, G, B], and their scales [N, G], which `choose` gives.

    `moments` [G * B, G * B]: sum of x x^T over inputs x.
    """
    outputs, blocks, block = groups.shape
    w = np.array(groups.reshape(outputs, -1), np.float32, order="F")  # columns are contiguous
    factor = inverse_hessian_factor(moments)
    importance = 1 / np.square(np.diag(factor))
    codes, scales = np.empty(groups.shape, np.int8), np.empty(groups.shape[:2], np.float32)
    for group in range(blocks):
        first, end = group * block, (group + 1) * block
        mean = importance[first:end].mean()
        scale = scales[:, group] = choose(group, np.ascontiguousarray(w[:, first:end]), importance[first:end] / mean)
        errors = np.empty((outputs, block), np.float32, order="F")
        for j in range(first, end):
            code = int4_codes(w[:, j] / scale)
            error = (w[:, j] - code * scale) / factor[j, j]
            w[:, j + 1 : end] -= np.outer(error, factor[j, j + 1 : end])
            codes[:, group, j - first], errors[:, j - first] = code, error
        w[:, end:] -= errors @ factor[first:end, end:]
    return codes, scales
