"""Calibration: fit the score's constants to trained models, and measure how much of the fit is chance.

A seed splits the models into halves. The models are ordered by decoder parameters, and of each two neighbours one goes
to either side. The training half selects a setting of a grid (`grid`): the one whose score has the highest mean of
Spearman's rho and Kendall's tau-b. Among equal ones, the setting with the fewest steps from the defaults is taken.

The fit is reported on the other half only, beside the default score and decoder parameters. Many other random halves
show how much the selected setting and its gain depend on the split.
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
from merino_edge.search.study.rank_correlation import MIN_MODELS, Agreement, agreement, difference
from merino_edge.search.study.sampling import decoder_parameters
from merino_edge.search.study.scores import Trained, like_size, losses
from merino_edge.statistics import Array, ratio

REPEATS = 50  # random halves; the standard error of the mean gain is a seventh of its spread
CHUNK = 2**20  # pairs of models times settings, compared at once to limit memory
Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Repeats:
    """One form fitted on many random halves."""

    settings: tuple[Setting, ...]  # selected on each training half
    training: Array  # [R]: objective minus the default score's, on the training half
    other: Array  # [R]: the same on the other half

    @property
    def better(self) -> float:
        """The share of halves where the fitted score agreed better than the default on models it had not seen."""
        return float((self.other > 0).mean())


@dataclass(frozen=True)
class Fit:
    """One form fitted on the training half.

    Agreements are measured on the other half. `over_*` are differences to another score.
    """

    setting: Setting
    training: float  # its objective on the training half
    training_default: float  # the default score's objective there
    fitted: Agreement
    over_default: Agreement
    over_parameters: Agreement
    unfitted: Agreement  # the form with the default constants; for `exit` with power 0
    on_all: Setting  # fitted on all models
    repeats: Repeats


@dataclass(frozen=True)
class Calibration:
    """The fits of all forms. `training` and `other` are indices into the list of models."""

    training: tuple[int, ...]
    other: tuple[int, ...]
    default: Agreement  # the default score's, on the other half
    fits: tuple[Fit, ...]
    settings_tried: int

    @property
    def best(self) -> Fit:
        """The fit with the highest objective on the training half; the first of equal ones."""
        return max(self.fits, key=lambda fit: fit.training)


def calibrate(
    trained: Sequence[Trained],
    grid: Grid | None = None,
    forms: Sequence[str] = FORMS,
    seed: int = 0,
    repeats: int = REPEATS,
) -> Calibration:
    """Fit every form. The same arguments give the same result. Raises InputError or MissingExtraError."""
    loss, models = losses(trained), [model.architecture for model in trained]
    grid = (grid or Grid()).of(models)
    if len(models) < 2 * MIN_MODELS:
        raise InputError(f"{len(models)} models make no two halves", f"train at least {2 * MIN_MODELS}")
    default = np.array([effective().total(a) for a in models])
    rng = np.random.default_rng(seed)
    training, other = halves(models, rng)
    more = [halves(models, rng) for _ in range(repeats)]
    fits, tried = [], 0
    for form in forms:
        scores = study_grid.scores(models, grid, form)
        fits.append(
            _fit(form, grid, scores, default, loss, models=models, split=(training, other), more_splits=more, seed=seed)
        )
        tried += len(scores)
    alike = like_size([models[i] for i in other])
    return Calibration(
        training=tuple(training.tolist()),
        other=tuple(other.tolist()),
        default=agreement(default[other], loss[other], alike, seed=seed),
        fits=tuple(fits),
        settings_tried=tried,
    )


def halves(models: Sequence[Architecture], rng: np.random.Generator) -> tuple[Indices, Indices]:
    """The indices of two halves, ascending. Of each two neighbours by decoder parameters, one is in either half."""
    order = np.array(sorted(range(len(models)), key=lambda i: (decoder_parameters(models[i]), models[i].id)), np.int64)
    # Draw which of two neighbours is in the first half. An unpaired last one goes to a random side.
    first = rng.integers(0, 2, (len(order) + 1) // 2)
    rank = np.arange(len(order))
    selected = rank % 2 == first[rank // 2]
    return np.sort(order[selected]), np.sort(order[~selected])


def objective(scores: Array, loss: Array) -> Array:
    """The objective [K] of `scores` [K, n]: the mean of Spearman's rho and Kendall's tau-b with -`loss` [n].

    It is 0 for a constant score.
    """
    first, second = np.triu_indices(len(loss), 1)
    better = np.sign(loss[second] - loss[first]).astype(np.float32)  # [pairs]: +1 where the first is the better
    # The sum of a model's signs against all others is twice its rank minus a constant.
    to_ranks = np.zeros((len(first), len(loss)), np.float32)  # [pairs, n]
    to_ranks[np.arange(len(first)), first], to_ranks[np.arange(len(first)), second] = 1, -1
    quality = better @ to_ranks
    values = np.empty(len(scores))
    columns = max(1, CHUNK // len(first))
    for start in range(0, len(scores), columns):
        part = np.ascontiguousarray(scores[start : start + columns].T)  # [n, columns]
        signs = np.sign(part[first] - part[second]).astype(np.float32, copy=False)  # [pairs, columns]
        ranks = to_ranks.T @ signs  # [n, columns]; whole numbers, and exact
        rho = ratio(quality @ ranks, np.einsum("nk,nk->k", ranks, ranks, dtype=np.float64) * float(quality @ quality))
        tau = ratio(better @ signs, np.count_nonzero(signs, axis=0) * float(np.count_nonzero(better)))
        values[start : start + columns] = (rho + tau) / 2
    return values


def choose(scores: Array, loss: Array, steps: Array) -> int:
    """The row of `scores` [K, n] with the highest objective; among equal ones the one with the fewest `steps` [K]."""
    values = objective(scores, loss)
    best = np.flatnonzero(values >= values.max() - 1e-9)
    return int(best[np.argmin(steps[best])])


def _fit(
    form: str,
    grid: Grid,
    scores: Array,
    default: Array,
    loss: Array,
    *,
    models: Sequence[Architecture],
    split: tuple[Indices, Indices],
    more_splits: Sequence[tuple[Indices, Indices]],
    seed: int,
) -> Fit:
    require("scipy", "study")
    from scipy import stats

    settings, steps, (training, other) = grid.settings(form), grid.steps(form), split
    # Only the order of scores counts, and ranks compare faster than the scores themselves.
    scores = stats.rankdata(scores, method="dense", axis=1).astype(np.float32)

    def value(score: Array, half: Indices) -> float:
        return float(objective(score[None, half], loss[half])[0])

    selected = choose(scores[:, training], loss[training], steps)
    on_other, default_on_other = scores[selected, other], default[other]
    parameters = np.array([decoder_parameters(models[i]) for i in other], np.float64)
    alike = like_size([models[i] for i in other])
    picks = [choose(scores[:, fitted], loss[fitted], steps) for fitted, _ in more_splits]
    gains = np.array(
        [
            [value(scores[pick], half) - value(default, half) for half in pair]
            for pick, pair in zip(picks, more_splits, strict=True)
        ]
    ).reshape(-1, 2)  # [R, 2]
    return Fit(
        setting=settings[selected],
        training=value(scores[selected], training),
        training_default=value(default, training),
        fitted=agreement(on_other, loss[other], alike, seed=seed),
        over_default=difference(on_other, default_on_other, loss[other], alike, seed=seed),
        over_parameters=difference(on_other, parameters, loss[other], alike, seed=seed),
        unfitted=agreement(scores[int(np.argmin(steps)), other], loss[other], alike, seed=seed),
        on_all=settings[choose(scores, loss, steps)],
        repeats=Repeats(tuple(settings[pick] for pick in picks), gains[:, 0], gains[:, 1]),
    )
