"""Interpolation grids of a latency table: one for each kind of entry, mode, FFN kind, window, cache state and unit.

Layers are measured on a star around one reference, not in every combination. The reference stands in the table's
header: {"ffn", "ratio", "decode": cache positions, "prefill": tokens}. This works because attention's cost (key-value
heads, length) does not depend on the FFN. What was not measured is filled in: the reference's cost there, plus what
the FFN costs beyond the reference's. In a prefill that difference grows with the tokens. Layers with a window have the
reference's FFN, and what other FFNs cost beyond it is that of layers without. This module knows no file.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from merino_edge import limits
from merino_edge.errors import ArtefactError, InputError
from merino_edge.latency.measurement import EMBEDDING_AND_HEAD, MODES, SHARED_LAYER, WHOLE, Measurement
from merino_edge.latency.step import Step
from merino_edge.latency.step_time import rounded

Point = tuple[float, ...]


class Grid:
    """Costs by coordinates. `axes` holds the values of each axis, ascending.

    A grid without holes is made monotone: more of anything never costs less.
    """

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
        """The multilinear interpolation at a point within the axes; None where a corner around it was not measured."""
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
    """The mean of the least rising grid above the points and the largest rising grid below them."""
    shape = [len(axis) for axis in axes]
    values = np.array([points[point] for point in sorted(points)]).reshape(shape)
    above, below = values.copy(), values.copy()
    for axis in range(len(shape)):
        above = np.maximum.accumulate(above, axis)
        below = np.flip(np.minimum.accumulate(np.flip(below, axis), axis), axis)
    return dict(zip(sorted(points), ((above + below) / 2).ravel().tolist(), strict=True))


UNITS = ("ms", "mj")
# The names of each grid's axes. In decode only layers have the axis of lengths.
_LAYER_AXES = ("length", "width", "ffn_width / width", "key-value heads")
AXES = {
    "layer": _LAYER_AXES,
    SHARED_LAYER: _LAYER_AXES,
    "width_change": ("length", "before * after"),
    EMBEDDING_AND_HEAD: ("length", "vocab_size", "embedding_width"),
}
MEASURE_IT = "measure it: merino-edge profile --space SPACE --out T.jsonl"


class Key(NamedTuple):
    """What tells one grid from another."""

    unit: str
    what: str
    mode: str
    ffn: str  # "" of parts without one
    cache: str
    window: int = 0


class LatencyGrids:
    """All grids of the table at `path`.

    A `cold_share` says how much of the difference between cold and warm entries is added to the warm ones.
    """

    def __init__(self, path: Path, measurements: Sequence[Measurement], reference: Mapping[str, Any] | None) -> None:
        self._path = path
        self._failed = [m for m in measurements if m.failed]
        self._grids = build_grids(measurements, reference)
        self._costs: dict[tuple[object, ...], float] = {}  # a search asks for the same parts again and again

    @property
    def complete(self) -> bool:
        """Whether no grid has a hole."""
        return all(grid.complete for grid in self._grids.values())

    @property
    def only_cold(self) -> bool:
        """Whether all entries of decode were measured with cold caches."""
        return {key.cache for key in self._grids if key.mode == "decode"} == {"cold"}

    def cost(self, what: str, ffn: str, step: Step, cold_share: float, point: Point, *, window: int = 0) -> float:
        """One part's cost. Raises InputError outside what was measured, and where the shape could not be run."""
        key = (what, ffn, step, cold_share, point, window)
        if key not in self._costs:
            self._costs[key] = self._interpolated(what, ffn, step, cold_share, point, window=window)
        return self._costs[key]

    def has_window(self, window: int) -> bool:
        """Whether layers with this window were measured."""
        return any(key.window == window for key in self._grids)

    def _interpolated(self, what: str, ffn: str, step: Step, cold_share: float, point: Point, *, window: int) -> float:
        if gaps := self.gaps(what, ffn, step, cold_share, [point], window=window):
            raise InputError(f"{self._path} does not cover {gaps[0]}", MEASURE_IT)
        costs = [grid.at(point) for grid in self._pair(what, ffn, step, cold_share, window) if grid is not None]
        values = [value for value in costs if value is not None]
        if len(values) < len(costs):
            raise InputError(
                f"{self._path}: {self._failure(what, ffn, step, window)}", "choose other shapes, or another --out"
            )
        if len(values) == 2:  # warm, cold: only noise can say that cold is faster
            values = [values[0] + cold_share * max(0.0, values[1] - values[0])]
        return rounded(values[0])

    def gaps(
        self, what: str, ffn: str, step: Step, cold_share: float, points: Sequence[Point], *, window: int = 0
    ) -> list[str]:
        """What one grid lacks to cover all `points`: a line for each axis, [] where it lacks nothing."""
        kind = ", ".join(filter(None, (ffn, f"window {window}" if window else "")))
        name = f"{step.mode} of {what}{f' ({kind})' if kind else ''}"
        missing = []
        for grid in self._pair(what, ffn, step, cold_share, window):
            if grid is None:
                return [f"{'energy of ' if step.unit == 'mj' else ''}{name} (no measurement)"]
            labels = AXES[what][-len(grid.axes) :]
            for axis in sorted({axis for point in points for axis in grid.outside(point)}):
                needed, measured = sorted(point[axis] for point in points), grid.axes[axis]
                if labels[axis] == "key-value heads":  # an axis from one head to all of them
                    share = "fewer" if measured[0] > 0 else "as many"
                    missing.append(f"{name}: {share} key-value heads than query heads")
                    continue
                width = labels[axis] == "width"
                spelled = [_span(math.sqrt(x) if width else x for x in xs) for xs in (needed, measured)]
                missing.append(f"{name}: {labels[axis]} {spelled[0]} (measured {spelled[1]})")
        return list(dict.fromkeys(missing))

    def axes(self, what: str, ffn: str, step: Step) -> list[list[float]]:
        """The values measured on each axis of a grid (AXES). Raises InputError where the table has no such grid."""
        grid = self._pair(what, ffn, step, 0.0, 0)[0]
        if grid is None:
            raise InputError(f"{self._path} has no {what} in {step.mode}", MEASURE_IT)
        return grid.axes

    def ffns(self, step: Step) -> list[str]:
        """The FFN kinds that layers were measured with."""
        return sorted({key.ffn for key in self._grids if key[:3] == (step.unit, "layer", step.mode)})

    def _pair(self, what: str, ffn: str, step: Step, cold_share: float, window: int) -> list[Grid | None]:
        """The grids to use: [warm], [cold], both where both count, or [None] where nothing was measured."""
        if what == SHARED_LAYER and step.mode == "prefill" and not self._any(SHARED_LAYER, step):
            what = "layer"
        warm, cold = (
            self._grids.get(Key(step.unit, what, step.mode, ffn, cache, window)) for cache in ("warm", "cold")
        )
        return [warm, cold] if cold_share and warm and cold else [warm or cold]

    def _any(self, what: str, step: Step) -> bool:
        return any(key[:3] == (step.unit, what, step.mode) for key in self._grids)

    def _failure(self, what: str, ffn: str, step: Step, window: int) -> str:
        """Why a grid has a hole."""
        for m in self._failed:
            if (m.what, m.mode, m.shape.get("ffn", ""), m.window) == (what, step.mode, ffn, window):
                return f"{m.mode} of {m.what} {dict(m.shape)} could not be measured: {m.failed}"
        return f"{step.mode} of {what} has a hole"


def build_grids(measurements: Iterable[Measurement], reference: Mapping[str, Any] | None) -> dict[Key, Grid]:
    """Every grid of times, and the complete grids of energy: a power rail may be readable for a while only."""
    points: dict[Key, dict[Point, float]] = {}
    lines = sorted((m for m in measurements if m.what not in WHOLE and not m.failed), key=lambda m: m.length)
    for m in lines:
        of = Key("ms", m.what, m.mode, m.shape.get("ffn", ""), m.cache, m.window)
        points.setdefault(of, {})[m.point] = m.median_ms
        if m.energy_mj is not None:
            points.setdefault(of._replace(unit="mj"), {})[m.point] = m.energy_mj
    _stand_for_every_share(lines, points)
    if reference is not None:
        for unit, what, mode, cache in itertools.product(UNITS, ("layer", SHARED_LAYER), MODES, ("warm", "cold")):
            part = {key: points[key] for key in points if (*key[:3], key.cache) == (unit, what, mode, cache)}
            by_ffn = {key.ffn: values for key, values in part.items() if not key.window}
            if reference["ffn"] in by_ffn:
                at = float(reference["ratio"]), float(reference[mode]), mode == "prefill"
                measured = {ffn: dict(values) for ffn, values in by_ffn.items()}
                core = measured[reference["ffn"]]
                for ffn, values in by_ffn.items():
                    _fill(values, core, measured[ffn], core, at)
                for key in [key for key in part if key.window and key.ffn == reference["ffn"]]:
                    of_window = dict(part[key])
                    for ffn in by_ffn:
                        values = points.setdefault(key._replace(ffn=ffn), {})
                        _fill(values, of_window, measured[ffn], core, at)
    grids = {key: Grid(values) for key, values in points.items()}
    return {key: grid for key, grid in grids.items() if key.unit == "ms" or grid.complete}


def _stand_for_every_share(lines: Sequence[Measurement], points: dict[Key, dict[Point, float]]) -> None:
    """Copy a layer with a single head to every share of key-value heads, since it has only one."""
    shares = {m.point[-1] for m in lines if m.shape.get("heads", 1) > 1}
    _check_size(len(shares) * sum(m.shape.get("heads") == 1 for m in lines))
    for m in lines:
        if m.shape.get("heads") == 1:
            for unit in UNITS:
                grid = points.get(Key(unit, m.what, m.mode, m.shape["ffn"], m.cache, m.window), {})
                if m.point in grid:
                    grid.update({(*m.point[:-1], share): grid[m.point] for share in shares})


def _fill(
    points: dict[Point, float], base: Mapping[Point, float], measured: Mapping[Point, float],
    core: Mapping[Point, float], reference: tuple[float, float, bool],
) -> None:  # fmt: skip
    """Complete the grid of a kind of layer; points are (length, width squared, ratio, share).

    `base` are layers with the reference's FFN and this kind's window. `measured` and `core` have no window: this kind's
    FFN and the reference's. `reference`: its ratio, its length, whether what FFNs differ by grows with the length.
    """
    ratio, length, per_token = reference
    axes = [sorted({point[axis] for grid in (base, measured) for point in grid}) for axis in range(4)]
    _check_size(math.prod(map(len, axes)))
    for at, width, r, share in itertools.product(*axes):
        beyond = _beyond(measured, core, (width, r), ratio, (at, length))
        usual = base.get((at, width, ratio, share))
        if (at, width, r, share) not in points and usual is not None and beyond is not None:
            extra, measured_at = beyond
            points[at, width, r, share] = max(0.0, usual + extra * (at / measured_at if per_token else 1.0))


def _check_size(points: int) -> None:
    """Raise ArtefactError where filling a grid in would take minutes: no profile measures so many different values."""
    if points > limits.MAX_GRID_POINTS:
        what = f"the latency table has a grid of {points} points, the limit is {limits.MAX_GRID_POINTS}"
        raise ArtefactError(what, "see merino_edge/limits.py")


def _beyond(
    measured: Mapping[Point, float], core: Mapping[Point, float], shape: tuple[float, float], ratio: float,
    lengths: tuple[float, float],
) -> tuple[float, float] | None:  # fmt: skip
    """What this FFN costs beyond the reference's with all key-value heads, and the length where both were measured."""
    width, r = shape
    for at in lengths:
        this, reference = measured.get((at, width, r, 1.0)), core.get((at, width, ratio, 1.0))
        if this is not None and reference is not None:
            return this - reference, at
    return None


def _span(values: Iterable[float]) -> str:
    low, *_, high = (*(ordered := sorted(values)), ordered[-1])
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"
