"""How well a score ranks models by quality: Spearman's rho, Kendall's tau-b, and bootstrap intervals of both.

Quality is -loss, so a good score has a positive correlation. The bootstrap draws architectures with replacement. The
same `seed` and the same number of architectures give the same draws for every score. So the difference of two scores
has an interval too. This module knows only numbers: no architecture, no score by name, no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from merino_edge.errors import InputError, require
from merino_edge.statistics import Array, Mask, kendall, percentile_interval, resampled_counts, signs, spearman

DRAWS = 2000  # bootstrap draws; 50 of them lie beyond each end of a 95 % interval
MIN_MODELS = 4  # with fewer models an interval has no meaning


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Rank correlations of a score with -loss over the same models, or the difference of two scores' correlations."""

    spearman: Estimate
    kendall: Estimate
    alike: Estimate | None = None  # Kendall's tau-b over pairs of like size, if the pairs were given


def agreement(
    scores: npt.ArrayLike, losses: npt.ArrayLike, alike: Mask | None = None, *, seed: int = 0, draws: int = DRAWS
) -> Agreement:
    """The rank correlation of `scores` [N] (larger is better) with -`losses` [N].

    `alike` [N, N] says which pairs of models are of like size. A score that is the same for all models has a
    correlation of 0. Raises InputError or MissingExtraError.
    """
    a, quality = _checked(scores, losses)
    value, drawn = _values(a, quality, alike), _drawn(a, quality, alike, seed, draws)
    return _estimates(value, drawn)


def difference(
    score_a: npt.ArrayLike,
    score_b: npt.ArrayLike,
    losses: npt.ArrayLike,
    alike: Mask | None = None,
    *,
    seed: int = 0,
    draws: int = DRAWS,
) -> Agreement:
    """The correlation of `score_a` [N] minus that of `score_b` [N], over the same draws of architectures."""
    (a, quality), (b, _) = _checked(score_a, losses), _checked(score_b, losses)
    value = _values(a, quality, alike) - _values(b, quality, alike)
    drawn = _drawn(a, quality, alike, seed, draws) - _drawn(b, quality, alike, seed, draws)
    return _estimates(value, drawn)


def _estimates(value: Array, drawn: Array) -> Agreement:
    """Estimates from values [2 or 3], with percentile intervals from bootstrap draws [draws, 2 or 3]."""
    low, high = percentile_interval(drawn)
    return Agreement(*(Estimate(float(v), float(x), float(y)) for v, x, y in zip(value, low, high, strict=True)))


def _checked(scores: npt.ArrayLike, losses: npt.ArrayLike) -> tuple[Array, Array]:
    a, quality = np.asarray(scores, np.float64), -np.asarray(losses, np.float64)
    if a.ndim != 1 or a.shape != quality.shape:
        raise InputError(f"scores {a.shape} do not go with losses {quality.shape}", "give one score per model")
    if len(a) < MIN_MODELS:
        raise InputError(
            f"{len(a)} models are too few to rank", f"train at least {MIN_MODELS}: merino-edge study --help"
        )
    if not (np.isfinite(a).all() and np.isfinite(quality).all()):
        raise InputError("a score or a loss is not finite", "leave such models out, and say so")
    return a, quality


def _values(a: Array, quality: Array, alike: Mask | None) -> Array:
    """An array [2 or 3] of rho, tau-b and, with `alike`, tau-b over its pairs."""
    require("scipy", "study")
    from scipy import stats

    if np.ptp(a) == 0 or np.ptp(quality) == 0:
        whole = [0.0, 0.0]
    else:
        whole = [stats.spearmanr(a, quality).statistic, stats.kendalltau(a, quality).statistic]
    if alike is not None:
        once = np.ones((1, len(a)))
        whole.append(kendall(signs(a), signs(quality), once, alike)[0])
    return np.array(whole, np.float64)


def _drawn(a: Array, quality: Array, alike: Mask | None, seed: int, draws: int) -> Array:
    """The same values for each draw of architectures, [draws, 2 or 3]."""
    counts = resampled_counts(len(a), draws, seed)  # [draws, N]
    sign_a, sign_q = signs(a), signs(quality)
    columns = [spearman(sign_a, sign_q, counts), kendall(sign_a, sign_q, counts)]
    if alike is not None:
        columns.append(kendall(sign_a, sign_q, counts, alike))
    return np.stack(columns, axis=1)
