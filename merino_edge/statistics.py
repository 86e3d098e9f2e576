"""Bootstrap draws and rank correlations, shared by latency tables, studies and evaluations.

The same seed and number of items give the same draws. So the difference of two figures over the same items has an
interval too. This module knows numbers only: no architecture, no metric by name, no file. It needs NumPy alone.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]

MEDIAN_DRAWS = 400
MANY = 5_000  # samples of which a bootstrap would take long
NORMAL_QUANTILE = 1.96  # of 95 %

# --- bootstrap -------------------------------------------------------------------------------------


def resampled_indices(items: int, draws: int, seed: int = 0) -> npt.NDArray[np.int64]:
    """The indices [draws, items] of `items` things drawn with replacement."""
    return np.random.default_rng(seed).integers(items, size=(draws, items))


@functools.lru_cache(maxsize=4)  # the entries of a table have equally many samples
def _median_indices(items: int) -> npt.NDArray[np.int64]:
    return resampled_indices(items, MEDIAN_DRAWS)


def resampled_counts(items: int, draws: int, seed: int = 0) -> Array:
    """How often each draw with replacement holds each of `items` things: [draws, items]."""
    return np.random.default_rng(seed).multinomial(items, np.full(items, 1 / items), draws).astype(np.float64)


def percentile_interval(drawn: npt.NDArray[Any], confidence: float = 0.95) -> tuple[Any, Any]:
    """The percentile interval of bootstrap values [draws] or [draws, ...], along their first axis."""
    tail = round((1 - confidence) / 2, 9)
    low, high = np.quantile(drawn, (tail, 1 - tail), axis=0)
    return low, high


def median_interval(samples: Sequence[float]) -> tuple[float, float]:
    """The 95 % bootstrap interval of the samples' median; the same samples give the same interval.

    Of MANY samples it is what the bootstrap tends to: the order statistics at a binomial distribution's quantiles.
    """
    if (count := len(samples)) > MANY:
        reach, ordered = NORMAL_QUANTILE * math.sqrt(count) / 2, np.sort(np.asarray(samples, np.float64))
        return float(ordered[math.floor(count / 2 - reach)]), float(ordered[math.ceil(count / 2 + reach)])
    medians = np.median(np.asarray(samples)[_median_indices(count)], axis=1)
    low, high = percentile_interval(medians)
    return float(low), float(high)


# --- rank correlation of many draws at once; a draw is the number of times that it holds each item ------------------


def signs(values: Array) -> Array:
    """The signs [N, N]: +1 where the row's value is above the column's, -1 where below, 0 where equal."""
    return np.sign(values[:, None] - values[None, :])


def spearman(sign_a: Array, sign_b: Array, counts: Array) -> Array:
    """Spearman's rho [D] of draws `counts` [D, N]: Pearson's correlation of mean ranks.

    A rank is a constant plus half the sum of signs against all items of the draw. Such sums have the mean 0.
    """
    ranks_a, ranks_b = counts @ sign_a.T, counts @ sign_b.T  # [D, N]
    product = (counts * ranks_a * ranks_b).sum(1)
    return ratio(product, (counts * ranks_a**2).sum(1) * (counts * ranks_b**2).sum(1))


def kendall(sign_a: Array, sign_b: Array, counts: Array, pairs: Mask | None = None) -> Array:
    """Kendall's tau-b [D] of draws `counts` [D, N]; `pairs` [N, N] restricts it to some pairs of items.

    An item that is drawn twice is tied with itself.
    """
    mask = 1.0 if pairs is None else pairs.astype(np.float64)

    def over_pairs(values: Array) -> Array:
        total: Array = np.einsum("dn,dn->d", counts @ (values * mask), counts)
        return total

    return ratio(over_pairs(sign_a * sign_b), over_pairs(sign_a**2) * over_pairs(sign_b**2))


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-b of pairs (first value, second value); None where all first or all second values are equal."""
    first, second = (np.array(values, np.float64) for values in zip(*pairs, strict=True))
    if np.ptp(first) == 0 or np.ptp(second) == 0:
        return None
    return float(kendall(signs(first), signs(second), np.ones((1, len(first))))[0])


def ratio(product: npt.NDArray[Any], squares: npt.NDArray[Any]) -> Array:
    """product / sqrt(squares) [K], and 0 where `squares` is 0."""
    result: Array = np.divide(product, np.sqrt(squares), out=np.zeros(len(product)), where=squares > 0)
    return result
