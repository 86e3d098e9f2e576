"""Scales and offsets for blocks of int4 weights: a search for those with the least squared error.

It also stores scales as bytes, and reads them back. It knows no matrix names, no target and no graph.
"""

from __future__ import annotations

import numpy as np

# Where the scale clips, relative to the block's largest magnitude. 1.0 is plain round-to-nearest.
CLIP_RATIOS = (np.arange(72, 112, 2) / 100).astype(np.float32)
SEARCHED_AT_ONCE = 1 << 16  # weights: what is worked on stays in the cache of a core


def search_scales(groups: np.ndarray, importance: np.ndarray | None = None, *, signed: bool = False) -> np.ndarray:
    """Scales [N, G] of int4 groups [N, G, B] that leave the least squared error.

    Each group tries `CLIP_RATIOS` x max|w| / 7.5. A least-squares fit to the codes of the best one follows.
    `importance` [G, B] weighs the errors. With `signed` a scale may be negative: then the larger end of a group gets
    the longer side of the codes, which reach from -8 to 7.
    """
    scales = np.empty(groups.shape[:2], np.float32)
    rows = max(1, SEARCHED_AT_ONCE // max(1, groups[0].size))
    weights = None if importance is None else importance.astype(np.float32)
    for start in range(0, len(groups), rows):
        part = slice(start, start + rows)
        scales[part] = _search(groups[part], weights, signed=signed)
    return scales


def _search(groups: np.ndarray, importance: np.ndarray | None, *, signed: bool) -> np.ndarray:
    full_scales = np.abs(groups).max(axis=-1) / np.float32(7.5)  # [N, G]
    if signed:
        full_scales = np.where(groups.max(axis=-1) > -groups.min(axis=-1), -full_scales, full_scales)
    best, least = nonzero(full_scales), np.full(full_scales.shape, np.inf, np.float32)
    work = np.empty(groups.shape, np.float32)  # new memory for each step would take a third longer
    for ratio in CLIP_RATIOS:
        scales = nonzero(full_scales * ratio)
        int4_codes(np.divide(groups, scales[..., None], out=work), out=work)
        work *= scales[..., None]
        np.square(np.subtract(groups, work, out=work), out=work)
        error = _weighed(work, importance).sum(axis=-1)
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(best, scales, where=better)
    codes = int4_codes(groups / best[..., None])
    squares = _weighed(np.square(codes), importance).sum(axis=-1)
    fitted = (_weighed(codes, importance) * groups).sum(axis=-1) / np.where(squares > 0, squares, 1)  # least squares
    return np.where(fitted * best > 0, nonzero(fitted), best)


def _weighed(values: np.ndarray, importance: np.ndarray | None) -> np.ndarray:
    return values if importance is None else values * importance


def int4_codes(values: np.ndarray, out: np.ndarray | None = None) -> np.ndarray:
    """The nearest of -8..7 for each value, still in floating point; in the array `out` where it is given."""
    rounded = np.rint(values, out=out)
    return np.asarray(np.clip(rounded, -8, 7, out=rounded))


def round_to_nearest(groups: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """int4 codes int8 [N, G, B] of groups [N, G, B] in steps of scales [N, G]."""
    return int4_codes(groups / scales[..., None]).astype(np.int8)


def block_offsets(groups: np.ndarray) -> np.ndarray:
    """The value that code 0 stands for [N, G], where -8 and 7 stand for the ends of each of `groups` [N, G, B]."""
    least, most = groups.min(axis=-1), groups.max(axis=-1)
    return np.asarray(least + 8 * (most - least) / 15)


def scales_to_bytes(scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Scales [N, G] as codes uint8 [N, G] in 1..255, and the largest scale of every row, float16 [N, 1]."""
    most = np.maximum(scales.max(axis=-1, keepdims=True).astype(np.float16), np.finfo(np.float16).smallest_subnormal)
    codes = np.clip(np.rint(scales * (np.float32(255) / most.astype(np.float32))), 1, 255)
    codes[scales == scales.max(axis=-1, keepdims=True)] = 255  # also where `most` was rounded up by more than a code
    return codes.astype(np.uint8), most


def scales_from_bytes(codes: np.ndarray, most: np.ndarray) -> np.ndarray:
    """The scales [N, G] float32 that `scales_to_bytes` wrote. Written again they give the same bytes."""
    return np.asarray(codes * (most.astype(np.float32) * np.float32(1 / 255)))


def nonzero(scales: np.ndarray) -> np.ndarray:
    """The scales float32, with 1 in place of 0, so that nothing divides by zero."""
    return np.where(np.abs(scales) > np.finfo(np.float32).tiny, scales, np.float32(1.0)).astype(np.float32)
