"""How a step's time comes of sums over a model's parts: of warm entries, of cold ones, and of bytes.

A model whose weights fit the processor's caches costs the sum of its warm entries. A far larger one costs nearly the
sum of its cold entries. In between the caches fail faster than that: as soon as what a step reads exceeds them, every
further byte also drives out others. So, with warm(a), cold(a) [ms] and mb(a) summed over the parts,

    t(a) = least over alternatives of the greatest over their faces of
           warm(a) + cold_share * (cold(a) - warm(a)) + ms_per_mb * mb(a) + offset_ms

with the alternatives {warm, steep} and {far}. Where the last cache holds every model but the one before it does not,
one face between warm and cold is enough. Every face is a sum over parts, so an exact search can still use it. The
faces are fitted to whole models that are measured for it and for nothing else, by as few constants as will do (more of
them fitted noise: docs/lab-notes.md). A device without a cold entry has one face, the warm sum and a constant: what a
whole model costs beyond its parts, each of which is measured in smaller company.
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
# And of models that all fit the last cache but not the one before it: between warm and cold from the smallest on.
NEAR_SHARES = (0.0, 0.025, 0.05, 0.1, 0.2, 0.4, 0.6)
STEEP = (1.0, 0.5)  # cold share of the piece in between, and what a byte costs beyond, as a share of its cold penalty
WORTH = 0.003  # mean relative error that a third face must save
LEAST_MODELS = 6  # to fit a third face to
LEAST_OFFSET = -0.5  # of the smallest model's warm sum: a smaller one must not come out at nothing

Floats = NDArray[np.float64]


class Face(NamedTuple):
    """One sum. `cold_share` 0: of warm entries, 1: of cold ones."""

    cold_share: float
    ms_per_mb: float
    offset_ms: float


WARM, COLD = Face(0.0, 0.0, 0.0), Face(1.0, 0.0, 0.0)


class Sums(NamedTuple):
    """A model's parts, summed: warm and cold entries [ms], and what a step reads [MB]."""

    warm_ms: float
    cold_ms: float
    mb: float


@dataclass(frozen=True)
class Faces:
    """`alternatives`: indices into `faces`."""

    faces: tuple[Face, ...]
    alternatives: tuple[tuple[int, ...], ...]

    def value(self, sums: Sums) -> float:
        """The time of a model whose parts sum to these [ms]."""
        return float(self.values(np.array([sums]))[0])

    def values(self, models: Floats) -> Floats:
        """[N, 3] sums -> [N] ms."""
        warm, cold, mb = models.T
        faces = [
            warm + face.cold_share * np.maximum(cold - warm, 0.0) + face.ms_per_mb * mb + face.offset_ms
            for face in self.faces
        ]
        largest = [np.maximum.reduce([faces[i] for i in indices]) for indices in self.alternatives]
        return np.asarray(np.minimum.reduce(largest))

    def to_dict(self) -> dict[str, Any]:
        return {"faces": [list(face) for face in self.faces], "alternatives": [list(x) for x in self.alternatives]}

    @staticmethod
    def from_dict(value: Any) -> Faces:
        """Raises KeyError, TypeError or ValueError where `value` is not of `to_dict`'s form."""
        faces = tuple(Face(float(share), float(per_mb), float(offset)) for share, per_mb, offset in value["faces"])
        alternatives = tuple(tuple(int(i) for i in indices) for indices in value["alternatives"])
        known = all(alternative and set(alternative) <= set(range(len(faces))) for alternative in alternatives)
        if not (alternatives and known and all(math.isfinite(x) for face in faces for x in face)):
            raise ValueError
        return Faces(faces, alternatives)


def single(face: Face) -> Faces:
    return Faces((face,), ((0,),))


def fit(models: Sequence[tuple[Sums, float]], warm: bool, cold: bool = True) -> Faces:
    """The faces that come closest to whole models, each with its measured time [ms]. `warm`, `cold`: which entries
    there are. Few models fit no third face."""
    sums = np.array([parts for parts, _ in models])  # [N, 3]
    measured = np.array([time for _, time in models])

    def through(shares: Iterable[float]) -> list[Face]:
        return [face for share in shares for face in _through(share, 0.0, sums, measured)]

    least_ms = LEAST_OFFSET * float(sums[:, 0].min())
    if not cold:  # no sum is larger than another, but a whole model may cost more than all its parts
        alone = [face for face in through((0.0,)) if face.offset_ms >= least_ms]
        return _best(map(single, (WARM, *alone)), sums, measured)
    far = through(FAR_SHARES)
    if not warm:
        return _best(map(single, far), sums, measured)
    near = [face for face in through(NEAR_SHARES) if face.offset_ms >= least_ms]
    pairs = (Faces((WARM, face), ((0, 1),)) for face in (*near, *far))
    two = _best([single(WARM), *map(single, near), *pairs], sums, measured)
    if len(models) < LEAST_MODELS:
        return two
    per_mb = float(np.median(np.maximum(sums[:, 1] - sums[:, 0], 0.0) / sums[:, 2]))  # ms
    steep = _through(STEEP[0], rounded(STEEP[1] * per_mb), sums, measured)
    three = (
        Faces((WARM, face, Face(share, 0.0, 0.0)), ((0, 1), (2,)))
        for share, face in itertools.product(FAR_SHARES, steep)
    )
    best = _best(three, sums, measured)
    return best if _error(best, sums, measured) < _error(two, sums, measured) - WORTH else two


def _through(share: float, ms_per_mb: float, sums: Floats, measured: Floats) -> list[Face]:
    """The faces of this slope that meet one of the models exactly."""
    at = single(Face(share, ms_per_mb, 0.0)).values(sums)
    return [Face(share, ms_per_mb, rounded(float(offset))) for offset in np.unique(measured - at)]


def rounded(value: float) -> float:
    """To a multiple of RESOLUTION, so that sums are exact in any order."""
    return round(value / RESOLUTION) * RESOLUTION


def _best(candidates: Iterable[Faces], sums: Floats, measured: Floats) -> Faces:
    return min(candidates, key=lambda faces: _error(faces, sums, measured))


def _error(faces: Faces, sums: Floats, measured: Floats) -> float:
    """Mean of the logarithmic error: twice too much weighs as half."""
    return float(np.abs(np.log(np.maximum(faces.values(sums), RESOLUTION) / measured)).mean())
