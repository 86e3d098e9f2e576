"""Costs measured on a rectangular grid, multilinear in between and refused outside. Knows no units and no models."""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence

Point = tuple[float, ...]


class Grid:
    """`points`: coordinates to cost. `axes` are the values that occur on each axis, ascending."""

    def __init__(self, points: Mapping[Point, float]) -> None:
        self.points = points
        self.axes = [sorted(set(axis)) for axis in zip(*points, strict=True)]

    @property
    def complete(self) -> bool:
        """Whether every combination of the axes' values was measured."""
        return len(self.points) == math.prod(map(len, self.axes))

    def outside(self, point: Sequence[float]) -> list[int]:
        """The axes on which `point` lies outside what was measured."""
        return [i for i, (axis, x) in enumerate(zip(self.axes, point, strict=True)) if not axis[0] <= x <= axis[-1]]

    def at(self, point: Sequence[float]) -> float:
        """The interpolated cost of a point that is not outside."""
        corners: list[tuple[float, Point]] = [(1.0, ())]
        for axis, x in zip(self.axes, point, strict=True):
            index = bisect.bisect_left(axis, x)
            high = axis[index]
            low = high if high == x else axis[index - 1]
            t = 1.0 if high == low else (x - low) / (high - low)
            ends = [(t, high)] if t == 1.0 else [(1 - t, low), (t, high)]
            corners = [(w * part, (*at, value)) for w, at in corners for part, value in ends]
        return sum(weight * self.points[corner] for weight, corner in corners)
