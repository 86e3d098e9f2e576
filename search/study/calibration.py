"""Fitting the score's constants to trained models, and how much of the fit is chance.

Models are split into halves by a seed: ordered by decoder parameters, of each two neighbours one goes to either side.
On the training half the setting of a grid (`study_grid`) is taken whose score agrees best, by the mean of Spearman's
rho and Kendall's tau-b; of several that agree equally, the one fewest steps from the defaults. It is reported on the
other half only, beside the default score and beside decoder parameters. The same over many other halves says how much
of the choice, and of the gain, the halves decide.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError, require
from merino_edge.search.score import effective
from merino_edge.search.study import grid as study_grid
from merino_edge.search.study.grid import FORMS, Grid, Setting
from merino_edge.search.study.rank_correlation import LEAST, Agreement, agreement, difference
from merino_edge.search.study.sampling import decoder_parameters
from merino_edge.search.study.scores import Trained, like_size, losses
from merino_edge.statistics import Array, ratio

REPEATS = 50  # random halves; the mean gain is then known to a seventh of its spread
CHUNK = 2**20  # pairs of models times settings that are compared at once
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Repeats:
    """One form fitted on many random halves."""

    settings: tuple[Setting, ...]  # chosen on each
    training: Array  # [R]: objective above the default score's, on the half fitted to
    other: Array  # [R]: the same on the other half

    @property
    def better(self) -> float:
        """The share of halves where the fitted score agreed better than the default on models it had not seen."""
        return float((self.other > 0).mean())


@dataclass(frozen=True)
class Fit:
    """One form fitted on the training half. Agreements are on the other half, `over_*` differences to another score."""

    setting: Setting
    training: float  # objective on the training half
    training_default: float  # of the default score there
    fitted: Agreement
    over_default: Agreement
    over_parameters: Agreement
    unfitted: Agreement  # the form with the default constants, `exit` with none
    on_all: Setting  # fitted on every model
    repeats: Repeats


@dataclass(frozen=True)
class Calibration:
    """Every form's fit. `training` and `other` are places in the list of models."""

    training: tuple[int, ...]
    other: tuple[int, ...]
    default: Agreement  # of the default score, on the other half
    fits: tuple[Fit, ...]
    settings_tried: int

    @property
    def best(self) -> Fit:
        """The form that the training half prefers; the first of equal ones."""
        return max(self.fits, key=lambda fit: fit.training)


def calibrate(
    trained: Sequence[Trained],
    grid: Grid | None = None,
    forms: Sequence[str] = FORMS,
    seed: int = 0,
    repeats: int = REPEATS,
) -> Calibration:
    """Fit every form. The same arguments give the same result. Raises InputError, MissingExtraError."""
    loss, models = losses(trained), [model.architecture for model in trained]
    grid = (grid or Grid()).of(models)
    if len(models) < 2 * LEAST:
        raise InputError(f"{len(models)} models make no two halves", f"train at least {2 * LEAST}")
    default = np.array([effective().total(a) for a in models])
    rng = np.random.default_rng(seed)
    training, other = halves(models, rng)
    more = [halves(models, rng) for _ in range(repeats)]
    fits, tried = [], 0
    for form in forms:
        scores = study_grid.scores(models, grid, form)
        fits.append(_fit(form, grid, scores, default, loss, models, (training, other), more, seed))
        tried += len(scores)
    alike = like_size([models[i] for i in other])
    found = agreement(default[other], loss[other], alike, seed)
    return Calibration(tuple(training.tolist()), tuple(other.tolist()), found, tuple(fits), tried)


def halves(models: Sequence[Architecture], rng: np.random.Generator) -> tuple[Indices, Indices]:
    """Places of two halves, ascending, of like sizes of models: one of each two neighbours by decoder parameters."""
    order = np.array(sorted(range(len(models)), key=lambda i: (decoder_parameters(models[i]), models[i].id)), np.int64)
    first = rng.integers(0, 2, (len(order) + 1) // 2)  # which of two neighbours; a last one alone goes either way
    place = np.arange(len(order))
    chosen = place % 2 == first[place // 2]
    return np.sort(order[chosen]), np.sort(order[~chosen])


def objective(scores: Array, loss: Array) -> Array:
    """[K] of scores [K, n]: the mean of Spearman's rho and Kendall's tau-b with -`loss` [n]; of a constant score, 0."""
    first, second = np.triu_indices(len(loss), 1)
    better = np.sign(loss[second] - loss[first]).astype(np.float32)  # [pairs]: +1 where the first is the better
    # Twice a model's rank, less a constant, is the sum of its signs against all others.
    to_ranks = np.zeros((len(first), len(loss)), np.float32)  # [pairs, n]
    to_ranks[np.arange(len(first)), first], to_ranks[np.arange(len(first)), second] = 1, -1
    quality = better @ to_ranks
    found = np.empty(len(scores))
    columns = max(1, CHUNK // len(first))
    for start in range(0, len(scores), columns):
        part = np.ascontiguousarray(scores[start : start + columns].T)  # [n, columns]
        signs = np.sign(part[first] - part[second]).astype(np.float32, copy=False)  # [pairs, columns]
        ranks = to_ranks.T @ signs  # [n, columns]; whole numbers, and exact
        rho = ratio(quality @ ranks, np.einsum("nk,nk->k", ranks, ranks, dtype=np.float64) * float(quality @ quality))
        tau = ratio(better @ signs, np.count_nonzero(signs, axis=0) * float(np.count_nonzero(better)))
        found[start : start + columns] = (rho + tau) / 2
    return found


def choose(scores: Array, loss: Array, steps: Array) -> int:
    """The row of `scores` [K, n] that agrees best; of equal ones the fewest `steps` [K] from the defaults."""
    found = objective(scores, loss)
    best = np.flatnonzero(found >= found.max() - 1e-9)
    return int(best[np.argmin(steps[best])])


def _fit(
    form: str,
    grid: Grid,
    scores: Array,
    default: Array,
    loss: Array,
    models: Sequence[Architecture],
    split: tuple[Indices, Indices],
    more: Sequence[tuple[Indices, Indices]],
    seed: int,
) -> Fit:
    require("scipy", "study")
    from scipy import stats

    settings, steps, (training, other) = grid.settings(form), grid.steps(form), split
    # Only their order counts, and places in it are compared faster than what they are places of.
    scores = stats.rankdata(scores, method="dense", axis=1).astype(np.float32)

    def value(score: Array, places: Indices) -> float:
        return float(objective(score[None, places], loss[places])[0])

    chosen = choose(scores[:, training], loss[training], steps)
    on_other, default_on_other = scores[chosen, other], default[other]
    parameters = np.array([decoder_parameters(models[i]) for i in other], np.float64)
    alike = like_size([models[i] for i in other])
    picks = [choose(scores[:, fitted], loss[fitted], steps) for fitted, _ in more]
    gains = np.array(
        [
            [value(scores[pick], places) - value(default, places) for places in pair]
            for pick, pair in zip(picks, more, strict=True)
        ]
    ).reshape(-1, 2)  # [R, 2]
    return Fit(
        setting=settings[chosen],
        training=value(scores[chosen], training),
        training_default=value(default, training),
        fitted=agreement(on_other, loss[other], alike, seed),
        over_default=difference(on_other, default_on_other, loss[other], alike, seed),
        over_parameters=difference(on_other, parameters, loss[other], alike, seed),
        unfitted=agreement(scores[int(np.argmin(steps)), other], loss[other], alike, seed),
        on_all=settings[choose(scores, loss, steps)],
        repeats=Repeats(tuple(settings[pick] for pick in picks), gains[:, 0], gains[:, 1]),
    )
