"""Costs measured on a rectangular grid, multilinear in between and refused outside. Knows no units and no models.

More of anything never costs less: noise that says so is evened out, by the mean of the largest value towards the origin
and the smallest away from it, which leaves a grid that rises along every axis as it is.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

import numpy as np

Point = tuple[float, ...]


class Grid:
    """`points`: coordinates to cost. `axes` are the values that occur on each axis, ascending."""

    def __init__(self, points: Mapping[Point, float]) -> None:
        self.axes = [sorted(set(axis)) for axis in zip(*points, strict=True)]
        self.points = _monotone(points, self.axes) if len(points) == self._size else dict(points)

    @property
    def _size(self) -> int:
        return math.prod(map(len, self.axes))

    @property
    def complete(self) -> bool:
        """Whether every combination of the axes' values was measured."""
        return len(self.points) == self._size

    def outside(self, point: Sequence[float]) -> list[int]:
        """The axes on which `point` lies outside what was measured."""
        return [i for i, (axis, x) in enumerate(zip(self.axes, point, strict=True)) if not axis[0] <= x <= axis[-1]]

    def at(self, point: Sequence[float]) -> float | None:
        """The interpolated cost of a point that is not outside; None where a corner around it could not be measured."""
        corners: list[tuple[float, Point]] = [(1.0, ())]
        for axis, x in zip(self.axes, point, strict=True):
            index = bisect.bisect_left(axis, x)
            high = axis[index]
            low = high if high == x else axis[index - 1]
            t = 1.0 if high == low else (x - low) / (high - low)
            ends = [(t, high)] if t == 1.0 else [(1 - t, low), (t, high)]
            corners = [(w * part, (*at, value)) for w, at in corners for part, value in ends]
        if not all(corner in self.points for _, corner in corners):
            return None
        return sum(weight * self.points[corner] for weight, corner in corners)


def _monotone(points: Mapping[Point, float], axes: Sequence[Sequence[float]]) -> dict[Point, float]:
    shape = [len(axis) for axis in axes]
    values = np.array([points[point] for point in sorted(points)]).reshape(shape)
    above, below = values.copy(), values.copy()
    for axis in range(len(shape)):
        above = np.maximum.accumulate(above, axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
    return dict(zip(sorted(points), ((above + below) / 2).ravel().tolist(), strict=True))
