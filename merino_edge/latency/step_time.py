"""The step-time model: a piecewise-linear function from sums over a model's parts to the time of a decode step.

A model whose weights fit the processor's caches costs the sum of its warm entries. A far larger model costs nearly the
sum of its cold entries. In between each further byte costs more than the last, because more of the weights come from
memory. With warm(a), cold(a) [ms] and mb(a) summed over the parts of a model a:

    t(a) = min over alternatives of the max over their pieces of
           warm(a) + cold_share * (cold(a) - warm(a)) + ms_per_mb * mb(a) + offset_ms

One alternative is a convex function with up to MAX_HINGES hinges, the other caps it at a share of the cold entries.
Every piece is a sum over parts, so an exact search can use it. Pieces are fitted to whole models that serve nothing
else. A table without cold entries has one piece: the warm sum and a constant.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESOLUTION = 2.0**-30  # every answer is a multiple of it, in ms or mJ
CAP_COLD_SHARES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)  # tried for the piece of large models
MAX_HINGES = 2
PENALTY_SHARE = 1 / 3  # weight of the cold penalty beside the bytes in the burden (_hinged)
HINGE_CANDIDATES = 16  # quantiles of the burden that are tried for a hinge
NEAR = 0.99  # models slower than this share of the cap are left to the cap
MIN_MODELS_BEYOND = 4  # a hinge has at least as many models behind it
MIN_GAIN = 0.002  # mean log error that a level with more constants must save (the first one taken: for each level)
MODELS_PER_HINGE = 8  # at least
REWEIGHTINGS = 6  # of least squares, which so find the least absolute errors
MIN_OFFSET = -0.5  # of the smallest model's warm sum, so that no model comes out at 0 ms

Floats = NDArray[np.float64]


class Piece(NamedTuple):
    """One linear piece. `cold_share` is 0 for warm entries and 1 for cold entries."""

    cold_share: float
    ms_per_mb: float
    offset_ms: float


WARM, COLD = Piece(0.0, 0.0, 0.0), Piece(1.0, 0.0, 0.0)


class Sums(NamedTuple):
    """Sums over a model's parts: warm and cold entries [ms], and the bytes that a step reads [MB]."""

    warm_ms: float
    cold_ms: float
    mb: float


@dataclass(frozen=True)
class StepTimeModel:
    """The min over `alternatives` of the max over their pieces; an alternative holds indices into `pieces`."""

    pieces: tuple[Piece, ...]
    alternatives: tuple[tuple[int, ...], ...]

    def value(self, sums: Sums) -> float:
        """The time of a model whose parts sum to these [ms]."""
        return float(self.values(np.array([sums]))[0])

    def values(self, models: Floats) -> Floats:
        """The times [N] in ms of models with the sums [N, 3]."""
        warm, cold, mb = models.T
        pieces = [
            warm + piece.cold_share * np.maximum(cold - warm, 0.0) + piece.ms_per_mb * mb + piece.offset_ms
            for piece in self.pieces
        ]
        largest = [np.maximum.reduce([pieces[i] for i in indices]) for indices in self.alternatives]
        return np.asarray(np.minimum.reduce(largest))

    def to_dict(self) -> dict[str, Any]:
        """{"faces": [[cold_share, ms_per_mb, offset_ms], ...], "alternatives": [[index into "faces", ...], ...]}."""
        return {"faces": [list(piece) for piece in self.pieces], "alternatives": [list(x) for x in self.alternatives]}

    @staticmethod
    def from_dict(value: Any) -> StepTimeModel:
        """Raises KeyError, TypeError or ValueError where `value` is not of `to_dict`'s form."""
        pieces = tuple(Piece(float(share), float(per_mb), float(offset)) for share, per_mb, offset in value["faces"])
        alternatives = tuple(tuple(int(i) for i in indices) for indices in value["alternatives"])
        known = all(alternative and set(alternative) <= set(range(len(pieces))) for alternative in alternatives)
        if not (alternatives and known and all(math.isfinite(x) for piece in pieces for x in piece)):
            raise ValueError
        return StepTimeModel(pieces, alternatives)


def single(piece: Piece) -> StepTimeModel:
    """The model of one piece."""
    return StepTimeModel((piece,), ((0,),))


def fit(models: Sequence[tuple[Sums, float]], *, warm: bool, cold: bool = True) -> StepTimeModel:
    """The step-time model with the least error on whole models, each with its measured time [ms].

    `warm` and `cold` say which entries the table has. There is a hinge for every MODELS_PER_HINGE models at most.
    """
    sums = np.array([parts for parts, _ in models])  # [N, 3]
    measured = np.array([time for _, time in models])

    def through(cold_shares: Iterable[float]) -> list[Piece]:
        return [piece for share in cold_shares for piece in _through(share, sums, measured)]

    min_offset_ms = MIN_OFFSET * float(sums[:, 0].min())
    if not cold:  # a whole model may still cost more than all its parts
        with_offset = [piece for piece in through((0.0,)) if piece.offset_ms >= min_offset_ms]
        return _best(map(single, (WARM, *with_offset)), sums, measured)
    if not warm:
        return _best(map(single, through(CAP_COLD_SHARES)), sums, measured)
    everything = np.ones(len(models), bool)
    levels: list[list[StepTimeModel]] = []  # from few constants to many
    for hinges in range(min(MAX_HINGES, len(models) // MODELS_PER_HINGE) + 1):
        convex = _hinged(hinges, sums, measured, everything, min_offset_ms)
        levels.append([StepTimeModel(pieces, (tuple(range(len(pieces))),)) for pieces in convex])
        capped: list[StepTimeModel] = []
        for share in CAP_COLD_SHARES if hinges else ():
            cap_ms = single(Piece(share, 0.0, 0.0)).values(sums)
            convex = _hinged(hinges, sums, measured, measured < NEAR * cap_ms, min_offset_ms)
            capped += [_capped(pieces, share) for pieces in convex]
        levels.append(capped)
    plain = best = single(WARM)
    for number, level in enumerate(levels, 1):
        if level:
            better = _best(level, sums, measured)
            gain = _error(best, sums, measured) - _error(better, sums, measured)
            best = better if gain > MIN_GAIN * (number if best == plain else 1) else best
    return best


def _capped(pieces: tuple[Piece, ...], share: float) -> StepTimeModel:
    """The convex function of `pieces`, and at most the cold entries' sum with this share."""
    return StepTimeModel((*pieces, Piece(share, 0.0, 0.0)), (tuple(range(len(pieces))), (len(pieces),)))


def _hinged(
    count: int, sums: Floats, measured: Floats, within: NDArray[np.bool_], min_offset_ms: float
) -> list[tuple[Piece, ...]]:
    """The pieces of the warm sum plus a convex function of the burden with `count` hinges, for each choice of hinges.

    Each is fitted to the models `within` its reach, by relative error.
    """
    if within.sum() < MIN_MODELS_BEYOND + 2:
        return []
    (warm, cold, mb), measured = sums[within].T, measured[within]
    penalty = np.maximum(cold - warm, 0.0)
    # The burden is megabytes plus the cold penalty, scaled so that in a typical model it weighs PENALTY_SHARE as much.
    typical_ms = float(np.median(penalty))
    mb_per_ms = PENALTY_SHARE * float(np.median(mb)) / typical_ms if typical_ms > 0 else 0.0
    burden = mb + mb_per_ms * penalty  # MB
    # The first candidate is a slope from the start. Some models stand behind the last, lest a slow one make a slope.
    candidates = np.unique(
        np.quantile(np.sort(burden)[:-MIN_MODELS_BEYOND], np.linspace(0, 1, HINGE_CANDIDATES)) if count else []
    )
    fits = []
    for hinges in itertools.combinations(candidates, count):
        beyond = [np.maximum(burden - hinge, 0.0) for hinge in hinges]
        columns = np.stack([np.ones_like(burden), *beyond], axis=1)  # [N, P]
        weights = 1 / measured
        for _ in range(REWEIGHTINGS):
            solved = _rising(columns * weights[:, None], (measured - warm) * weights)
            error = np.abs(columns @ solved + warm - measured) / measured
            weights = 1 / measured / np.sqrt(np.maximum(error, 0.002))
        offset, slope = max(min_offset_ms, float(solved[0])), 0.0
        pieces = [Piece(0.0, 0.0, rounded(offset))]
        for hinge, steeper in zip(hinges, solved[1:], strict=True):
            slope, offset = slope + float(steeper), offset - float(steeper) * float(hinge)
            pieces.append(Piece(slope * mb_per_ms, rounded(slope), rounded(offset)))
        fits.append(tuple(pieces))
    return fits


def _rising(columns: Floats, values: Floats) -> Floats:
    """Least squares whose coefficients, but for the first, are not negative: tries which of them are 0."""
    everything = np.linalg.lstsq(columns, values, rcond=None)[0]
    if (everything[1:] >= 0).all():
        return np.asarray(everything)  # no choice of zeros has a smaller error
    count = columns.shape[1]
    best, least = np.zeros(count), math.inf
    for kept in list(itertools.product((False, True), repeat=count - 1))[:-1]:
        free = np.array([True, *kept])
        solved = np.zeros(count)
        solved[free] = np.linalg.lstsq(columns[:, free], values, rcond=None)[0]
        error = float(np.square(columns @ solved - values).sum())
        if (solved[1:] >= 0).all() and error < least:
            best, least = solved, error
    return best


def _through(share: float, sums: Floats, measured: Floats) -> list[Piece]:
    """The pieces with this cold share, each with the offset that meets one of the models exactly."""
    at = single(Piece(share, 0.0, 0.0)).values(sums)
    return [Piece(share, 0.0, rounded(float(offset))) for offset in np.unique(measured - at)]


def rounded(value: float) -> float:
    """`value` rounded to a multiple of RESOLUTION, so that sums are exact in any order."""
    return round(value / RESOLUTION) * RESOLUTION


def _best(candidates: Iterable[StepTimeModel], sums: Floats, measured: Floats) -> StepTimeModel:
    return min(candidates, key=lambda pieces: _error(pieces, sums, measured))


def _error(pieces: StepTimeModel, sums: Floats, measured: Floats) -> float:
    """The mean absolute log error: a factor of two too much weighs as much as a factor of two too little."""
    return float(np.abs(np.log(np.maximum(pieces.values(sums), RESOLUTION) / measured)).mean())
