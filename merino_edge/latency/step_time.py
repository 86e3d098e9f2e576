"""How a step's time comes of sums over a model's parts: of warm entries, of cold ones, and of bytes.

A model whose weights fit the processor's caches costs the sum of its warm entries. A far larger one costs nearly the
sum of its cold entries. In between every further byte costs more than the last: first some of it, then all of it, and
then what it drives out as well comes from memory. So, with warm(a), cold(a) [ms] and mb(a) summed over the parts,

    t(a) = least over alternatives of the greatest over their pieces of
           warm(a) + cold_share * (cold(a) - warm(a)) + ms_per_mb * mb(a) + offset_ms

with the alternatives {bent} and {far}: the warm sum and a convex function of the bytes and the cold penalty, of up to
BENDS bends, and at most what cold entries say. Every piece is a sum over parts, so an exact search can still use it.
The pieces are fitted to whole models that are measured for it and for nothing else; a constant more must be worth it.
A device without a cold entry has one piece, the warm sum and a constant: what a whole model costs beyond its parts,
each of which is measured in smaller eviction_head_vocab_size.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

RESOLUTION = 2.0**-30  # of every answer, in ms or mJ
FAR_SHARES = (0.8, 0.85, 0.9, 0.95, 1.0, 1.05)  # cold shares tried, of large models
BENDS = 2
PENALTY_SHARE = 1 / 3  # of the bytes' part in what is bent; see _bent
HINGE_CANDIDATES = 16  # tried for a bend
NEAR = 0.99  # of a cold sum: what takes longer is beyond the reach of bends
LEAST_BEYOND = 4  # models behind a bend
WORTH = 0.002  # mean relative error that a level with more constants must save; the first taken, for each level so far
MODELS_PER_BEND = 8  # at least
STEPS = 6  # of reweighting: least absolute errors by least squares
LEAST_OFFSET = -0.5  # of the smallest model's warm sum: a smaller one must not come out at nothing

Floats = NDArray[np.float64]


class Piece(NamedTuple):
    """One sum. `cold_share` 0: of warm entries, 1: of cold ones."""

    cold_share: float
    ms_per_mb: float
    offset_ms: float


WARM, COLD = Piece(0.0, 0.0, 0.0), Piece(1.0, 0.0, 0.0)


class Sums(NamedTuple):
    """A model's parts, summed: warm and cold entries [ms], and what a step reads [MB]."""

    warm_ms: float
    cold_ms: float
    mb: float


@dataclass(frozen=True)
class StepTimeModel:
    """`alternatives`: indices into `pieces`."""

    pieces: tuple[Piece, ...]
    alternatives: tuple[tuple[int, ...], ...]

    def value(self, sums: Sums) -> float:
        """The time of a model whose parts sum to these [ms]."""
        return float(self.values(np.array([sums]))[0])

    def values(self, models: Floats) -> Floats:
        """[N, 3] sums -> [N] ms."""
        warm, cold, mb = models.T
        pieces = [
            warm + piece.cold_share * np.maximum(cold - warm, 0.0) + piece.ms_per_mb * mb + piece.offset_ms
            for piece in self.pieces
        ]
        largest = [np.maximum.reduce([pieces[i] for i in indices]) for indices in self.alternatives]
        return np.asarray(np.minimum.reduce(largest))

    def to_dict(self) -> dict[str, Any]:
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
    return StepTimeModel((piece,), ((0,),))


def fit(models: Sequence[tuple[Sums, float]], warm: bool, cold: bool = True) -> StepTimeModel:
    """The pieces that come closest to whole models, each with its measured time [ms]. `warm`, `cold`: which entries
    there are. Few models fit no third piece."""
    sums = np.array([parts for parts, _ in models])  # [N, 3]
    measured = np.array([time for _, time in models])

    def through(shares: Iterable[float]) -> list[Piece]:
        return [piece for share in shares for piece in _through(share, sums, measured)]

    least_ms = LEAST_OFFSET * float(sums[:, 0].min())
    if not cold:  # no sum is larger than another, but a whole model may cost more than all its parts
        alone = [piece for piece in through((0.0,)) if piece.offset_ms >= least_ms]
        return _best(map(single, (WARM, *alone)), sums, measured)
    far = through(FAR_SHARES)
    if not warm:
        return _best(map(single, far), sums, measured)
    everything = np.ones(len(models), bool)
    levels: list[list[StepTimeModel]] = []  # from few constants to many
    for bends in range(min(BENDS, len(models) // MODELS_PER_BEND) + 1):
        bent = _bent(bends, sums, measured, everything, least_ms)
        levels.append([StepTimeModel(pieces, (tuple(range(len(pieces))),)) for pieces in bent])
        capped: list[StepTimeModel] = []
        for share in FAR_SHARES if bends else ():
            far_ms = single(Piece(share, 0.0, 0.0)).values(sums)
            bent = _bent(bends, sums, measured, measured < NEAR * far_ms, least_ms)
            capped += [_capped(pieces, share) for pieces in bent]
        levels.append(capped)
    plain = chosen = single(WARM)
    for number, level in enumerate(levels, 1):
        if level:
            better = _best(level, sums, measured)
            gain = _error(chosen, sums, measured) - _error(better, sums, measured)
            chosen = better if gain > WORTH * (number if chosen == plain else 1) else chosen
    return chosen


def _capped(pieces: tuple[Piece, ...], share: float) -> StepTimeModel:
    return StepTimeModel((*pieces, Piece(share, 0.0, 0.0)), (tuple(range(len(pieces))), (len(pieces),)))


def _bent(
    bends: int, sums: Floats, measured: Floats, within: NDArray[np.bool_], least_ms: float
) -> list[tuple[Piece, ...]]:
    """The warm sum and a convex function of the burden with so many bends, for every choice of their hinges; each as
    its pieces, with the least relative errors of the models `within` its reach."""
    if within.sum() < LEAST_BEYOND + 2:
        return []
    (warm, cold, mb), measured = sums[within].T, measured[within]
    penalty = np.maximum(cold - warm, 0.0)
    # What is bent: megabytes, and PENALTY_SHARE as much of what cold entries cost more, as a typical model has both.
    typical_ms = float(np.median(penalty))
    mb_per_ms = PENALTY_SHARE * float(np.median(mb)) / typical_ms if typical_ms > 0 else 0.0
    burden = mb + mb_per_ms * penalty  # MB
    # The first is a slope from the start on; behind the last stand some models, lest one slow one make a slope.
    hinges = np.unique(np.quantile(np.sort(burden)[:-LEAST_BEYOND], np.linspace(0, 1, HINGE_CANDIDATES)) if bends else [])
    found = []
    for chosen in itertools.combinations(hinges, bends):
        beyond = [np.maximum(burden - place, 0.0) for place in chosen]
        columns = np.stack([np.ones_like(burden), *beyond], axis=1)  # [N, P]
        weights = 1 / measured
        for _ in range(STEPS):
            solved = _rising(columns * weights[:, None], (measured - warm) * weights)
            error = np.abs(columns @ solved + warm - measured) / measured
            weights = 1 / measured / np.sqrt(np.maximum(error, 0.002))
        offset, slope = max(least_ms, float(solved[0])), 0.0
        pieces = [Piece(0.0, 0.0, rounded(offset))]
        for place, steeper in zip(chosen, solved[1:], strict=True):
            slope, offset = slope + float(steeper), offset - float(steeper) * float(place)
            pieces.append(Piece(slope * mb_per_ms, rounded(slope), rounded(offset)))
        found.append(tuple(pieces))
    return found


def _rising(columns: Floats, values: Floats) -> Floats:
    """Least squares with no negative coefficient but the first, by trying which of them are 0."""
    count = columns.shape[1]
    best, least = np.zeros(count), math.inf
    for kept in itertools.product((False, True), repeat=count - 1):
        chosen = np.array([True, *kept])
        solved = np.zeros(count)
        solved[chosen] = np.linalg.lstsq(columns[:, chosen], values, rcond=None)[0]
        error = float(np.square(columns @ solved - values).sum())
        if (solved[1:] >= 0).all() and error < least:
            best, least = solved, error
    return best


def _through(share: float, sums: Floats, measured: Floats) -> list[Piece]:
    """The pieces of this share that meet one of the models exactly."""
    at = single(Piece(share, 0.0, 0.0)).values(sums)
    return [Piece(share, 0.0, rounded(float(offset))) for offset in np.unique(measured - at)]


def rounded(value: float) -> float:
    """To a multiple of RESOLUTION, so that sums are exact in any order."""
    return round(value / RESOLUTION) * RESOLUTION


def _best(candidates: Iterable[StepTimeModel], sums: Floats, measured: Floats) -> StepTimeModel:
    return min(candidates, key=lambda pieces: _error(pieces, sums, measured))


def _error(pieces: StepTimeModel, sums: Floats, measured: Floats) -> float:
    """Mean of the logarithmic error: twice too much weighs as half."""
    return float(np.abs(np.log(np.maximum(pieces.values(sums), RESOLUTION) / measured)).mean())
