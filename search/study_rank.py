"""How well a score orders models by quality: Spearman's rho, Kendall's tau-b, and intervals of both by the bootstrap.

Quality is -loss, so a good score agrees positively. Intervals come from drawing architectures with replacement; the
same `seed` and number of architectures give the same draws for every score, so that the difference of two scores has an
interval too. It knows numbers only: no architecture, no score by name, no file.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from merino_edge.errors import InputError, require

DRAWS = 2000  # bootstrap draws: an end of a 95 % interval then has 50 draws beyond it
LEAST = 4  # models: fewer have no interval worth the name

Array = npt.NDArray[np.float64]
Mask = npt.NDArray[np.bool_]


class Estimate(NamedTuple):
    """A value and the ends of its 95 % interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Agreement:
    """Of a score with -loss over the same models; of two scores' difference likewise."""

    spearman: Estimate
    kendall: Estimate
    alike: Estimate | None = None  # Kendall's tau-b over pairs of models of like size only, where those were named


def agreement(
    scores: npt.ArrayLike, losses: npt.ArrayLike, alike: Mask | None = None, seed: int = 0, draws: int = DRAWS
) -> Agreement:
    """How `scores` [N] (larger is better) agree with -`losses` [N]; `alike` [N, N] says which pairs are of like size.

    A score that is the same for all models orders nothing and agrees by 0. Raises InputError, MissingExtraError.
    """
    a, quality = _checked(scores, losses)
    value, drawn = _values(a, quality, alike), _drawn(a, quality, alike, seed, draws)
    return _estimates(value, drawn)


def difference(
    score_a: npt.ArrayLike,
    score_b: npt.ArrayLike,
    losses: npt.ArrayLike,
    alike: Mask | None = None,
    seed: int = 0,
    draws: int = DRAWS,
) -> Agreement:
    """How much better `score_a` [N] agrees than `score_b` [N], over the same draws of architectures."""
    (a, quality), (b, _) = _checked(score_a, losses), _checked(score_b, losses)
    value = _values(a, quality, alike) - _values(b, quality, alike)
    drawn = _drawn(a, quality, alike, seed, draws) - _drawn(b, quality, alike, seed, draws)
    return _estimates(value, drawn)


def _estimates(value: Array, drawn: Array) -> Agreement:
    """[2 or 3] values and [draws, 2 or 3] of them as percentile intervals."""
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return Agreement(*(Estimate(float(v), float(x), float(y)) for v, x, y in zip(value, low, high, strict=True)))


def _checked(scores: npt.ArrayLike, losses: npt.ArrayLike) -> tuple[Array, Array]:
    a, quality = np.asarray(scores, np.float64), -np.asarray(losses, np.float64)
    if a.ndim != 1 or a.shape != quality.shape:
        raise InputError(f"scores {a.shape} do not go with losses {quality.shape}", "give one score per model")
    if len(a) < LEAST:
        raise InputError(f"{len(a)} models are too few to rank", f"train at least {LEAST}: merino-edge study --help")
    if not (np.isfinite(a).all() and np.isfinite(quality).all()):
        raise InputError("a score or a loss is not finite", "leave such models out, and say so")
    return a, quality


def _values(a: Array, quality: Array, alike: Mask | None) -> Array:
    """[2 or 3]: rho, tau-b and, with `alike`, tau-b over its pairs."""
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
    """[draws, 2 or 3]: the same of each draw of architectures."""
    n = len(a)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), draws).astype(np.float64)  # [draws, N]
    sign_a, sign_q = signs(a), signs(quality)
    columns = [spearman(sign_a, sign_q, counts), kendall(sign_a, sign_q, counts)]
    if alike is not None:
        columns.append(kendall(sign_a, sign_q, counts, alike))
    return np.stack(columns, axis=1)


# --- both correlations of many draws at once; a draw is how often it holds every model -----------------------------


def signs(values: Array) -> Array:
    """[N, N]: +1 where the row's value is above the column's, -1 where below, 0 where equal."""
    return np.sign(values[:, None] - values[None, :])


def spearman(sign_a: Array, sign_b: Array, counts: Array) -> Array:
    """[D] of draws `counts` [D, N]: Pearson's correlation of mean ranks. Less a constant, a rank is half the sum of
    signs against all that were drawn, and such sums have a mean of 0 over the draw."""
    ranks_a, ranks_b = counts @ sign_a.T, counts @ sign_b.T  # [D, N]
    product = (counts * ranks_a * ranks_b).sum(1)
    return ratio(product, (counts * ranks_a**2).sum(1) * (counts * ranks_b**2).sum(1))


def kendall(sign_a: Array, sign_b: Array, counts: Array, pairs: Mask | None = None) -> Array:
    """[D] of draws `counts` [D, N]: tau-b, over `pairs` [N, N] alone where given. A model drawn twice ties itself."""
    mask = 1.0 if pairs is None else pairs.astype(np.float64)

    def over_pairs(values: Array) -> Array:
        found: Array = np.einsum("dn,dn->d", counts @ (values * mask), counts)
        return found

    return ratio(over_pairs(sign_a * sign_b), over_pairs(sign_a**2) * over_pairs(sign_b**2))


def ratio(product: npt.NDArray[Any], squares: npt.NDArray[Any]) -> Array:
    """[K] product / sqrt(squares), and 0 where nothing differs."""
    found: Array = np.divide(product, np.sqrt(squares), out=np.zeros(len(product)), where=squares > 0)
    return found
