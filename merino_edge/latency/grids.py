"""From a table's lines to grids that can be asked anywhere between them.

Layers are measured on a star, not on every combination: attention's cost (key-value heads, length) does not depend on
the FFN, so both are varied around one reference, `{"ffn", "ratio", "decode": lengths, "prefill": tokens}` in the table's
header. What was left out is filled in: the reference's cost there, and what this FFN costs beyond the reference's. In a
prefill that difference grows with the tokens.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from merino_edge.errors import InputError
from merino_edge.latency.measurement import MODES, WHOLE, Measurement
from merino_edge.latency.step import Step
from merino_edge.latency.step_time import rounded

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


UNITS = ("ms", "mj")
# The axes of each grid, as people call them; of a decode step only layers depend on the length.
_LAYER_AXES = ("length", "width", "ffn_width / width", "key-value heads")
AXES = {
    "layer": _LAYER_AXES,
    "repeat": _LAYER_AXES,
    "width_change": ("length", "before * after"),
    "end": ("length", "vocab_size", "embedding_width"),
}
AGAIN = "measure it: merino-edge profile --space SPACE --out T.jsonl"

Key = tuple[str, ...]  # unit, what, mode, ffn ("" of parts without one), cache


class LatencyGrids:
    """All grids of the table at `path`, and what they answer. `cold_share`, everywhere: how much of what a step costs
    more with cold caches is counted."""

    def __init__(self, path: Path, measurements: Sequence[Measurement], reference: Mapping[str, Any] | None) -> None:
        self._path = path
        self._failed = [m for m in measurements if m.failed]
        self._grids = build_grids(measurements, reference)

    @property
    def complete(self) -> bool:
        return all(grid.complete for grid in self._grids.values())

    @property
    def only_cold(self) -> bool:
        """Whether decode steps were timed, and all of them with cold caches."""
        return {key[4] for key in self._grids if key[2] == "decode"} == {"cold"}

    def cost(self, what: str, ffn: str, step: Step, cold_share: float, point: Point) -> float:
        """Of one part. Raises InputError outside what was measured, and where it could not be."""
        if gaps := self.gaps(what, ffn, step, cold_share, [point]):
            raise InputError(f"{self._path} does not cover {gaps[0]}", AGAIN)
        found = [grid.at(point) for grid in self._pair(what, ffn, step, cold_share) if grid is not None]
        values = [value for value in found if value is not None]
        if len(values) < len(found):
            raise InputError(f"{self._path}: {self._failure(what, ffn, step)}", "choose other shapes, or another --out")
        if len(values) == 2:  # warm, cold: where noise says that cold is faster, it is not
            values = [values[0] + cold_share * max(0.0, values[1] - values[0])]
        return rounded(values[0])

    def gaps(self, what: str, ffn: str, step: Step, cold_share: float, points: Sequence[Point]) -> list[str]:
        """What is missing to answer for all `points` of one grid: a line for each axis, [] where nothing."""
        name = f"{step.mode} of {what}{f' ({ffn})' if ffn else ''}"
        found = []
        for grid in self._pair(what, ffn, step, cold_share):
            if grid is None:
                return [f"{'energy of ' if step.unit == 'mj' else ''}{name} (no measurement)"]
            labels = AXES[what][-len(grid.axes) :]
            for axis in sorted({axis for point in points for axis in grid.outside(point)}):
                needed, measured = sorted(point[axis] for point in points), grid.axes[axis]
                if labels[axis] == "key-value heads":  # an axis from one head to all of them
                    share = "fewer" if measured[0] > 0 else "as many"
                    found.append(f"{name}: {share} key-value heads than query heads")
                    continue
                width = labels[axis] == "width"
                spelled = [_span(math.sqrt(x) if width else x for x in xs) for xs in (needed, measured)]
                found.append(f"{name}: {labels[axis]} {spelled[0]} (measured {spelled[1]})")
        return list(dict.fromkeys(found))

    def axes(self, what: str, ffn: str, step: Step) -> list[list[float]]:
        """The values measured on each axis of a grid (AXES). Raises InputError where there is none."""
        grid = self._pair(what, ffn, step, 0.0)[0]
        if grid is None:
            raise InputError(f"{self._path} has no {what} in {step.mode}", AGAIN)
        return grid.axes

    def ffns(self, step: Step) -> list[str]:
        """The FFN kinds that layers were measured with."""
        return sorted({key[3] for key in self._grids if key[:3] == (step.unit, "layer", step.mode)})

    def _pair(self, what: str, ffn: str, step: Step, cold_share: float) -> list[Grid | None]:
        """The grids that answer: warm, cold, or both where a share of either is asked; [None] where there is none."""
        if what == "repeat" and step.mode == "prefill" and not self._any("repeat", step):
            what = "layer"
        warm, cold = (self._grids.get((step.unit, what, step.mode, ffn, cache)) for cache in ("warm", "cold"))
        return [warm, cold] if cold_share and warm and cold else [warm or cold]

    def _any(self, what: str, step: Step) -> bool:
        return any(key[:3] == (step.unit, what, step.mode) for key in self._grids)

    def _failure(self, what: str, ffn: str, step: Step) -> str:
        """Why there is no cost where there should be one."""
        for m in self._failed:
            if (m.what, m.mode, m.shape.get("ffn", "")) == (what, step.mode, ffn):
                return f"{m.mode} of {m.what} {dict(m.shape)} could not be measured: {m.failed}"
        return f"{step.mode} of {what} has a hole"


def build_grids(measurements: Iterable[Measurement], reference: Mapping[str, Any] | None) -> dict[Key, Grid]:
    """Every grid; of energy only those that are whole, since rails may be readable for a while only."""
    points: dict[Key, dict[Point, float]] = {}
    lines = sorted((m for m in measurements if m.what not in WHOLE and not m.failed), key=lambda m: m.length)
    for m in lines:
        key = (m.what, m.mode, m.shape.get("ffn", ""), m.cache)
        points.setdefault(("ms", *key), {})[m.point] = m.median_ms
        if m.energy_mj is not None:
            points.setdefault(("mj", *key), {})[m.point] = m.energy_mj
    _stand_for_every_share(lines, points)
    if reference is not None:
        for unit, what, mode, cache in itertools.product(UNITS, ("layer", "repeat"), MODES, ("warm", "cold")):
            by_ffn = {key[3]: points[key] for key in points if (*key[:3], key[4]) == (unit, what, mode, cache)}
            if reference["ffn"] in by_ffn:
                _fill(by_ffn, reference["ffn"], float(reference["ratio"]), float(reference[mode]), mode == "prefill")
    grids = {key: Grid(values) for key, values in points.items()}
    return {key: grid for key, grid in grids.items() if key[0] == "ms" or grid.complete}


def _stand_for_every_share(lines: Sequence[Measurement], points: dict[Key, dict[Point, float]]) -> None:
    """Of a layer with a single head no key-value heads can be taken away: it stands for every share of them."""
    shares = {m.point[-1] for m in lines if m.shape.get("heads", 1) > 1}
    for m in lines:
        if m.shape.get("heads") == 1:
            for unit in UNITS:
                grid = points.get((unit, m.what, m.mode, m.shape["ffn"], m.cache), {})
                if m.point in grid:
                    grid.update({(*m.point[:-1], share): grid[m.point] for share in shares})


def _fill(by_ffn: Mapping[str, dict[Point, float]], ffn: str, ratio: float, place: float, per_token: bool) -> None:
    """Complete the layer grids of one mode around the reference; points are (place, width squared, ratio, share)."""
    core = dict(by_ffn[ffn])  # as measured
    for points in by_ffn.values():
        measured = dict(points)
        lengths, widths, ratios, shares = (
            sorted({point[axis] for grid in (core, points) for point in grid}) for axis in range(4)
        )
        for at, width, r, share in itertools.product(lengths, widths, ratios, shares):
            beyond = _beyond(measured, core, (width, r), ratio, (at, place))
            base = core.get((at, width, ratio, share))
            if (at, width, r, share) not in points and base is not None and beyond is not None:
                extra, measured_at = beyond
                points[at, width, r, share] = max(0.0, base + extra * (at / measured_at if per_token else 1.0))


def _beyond(
    measured: Mapping[Point, float], core: Mapping[Point, float], shape: tuple[float, float], ratio: float,
    lengths: tuple[float, float],
) -> tuple[float, float] | None:  # fmt: skip
    """What this FFN costs beyond the reference's with all key-value heads, and the place where both were measured."""
    width, r = shape
    for at in lengths:
        mine, reference = measured.get((at, width, r, 1.0)), core.get((at, width, ratio, 1.0))
        if mine is not None and reference is not None:
            return mine - reference, at
    return None


def _span(values: Iterable[float]) -> str:
    low, *_, high = (*(ordered := sorted(values)), ordered[-1])
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
