"""From a table's lines to grids that can be asked anywhere between them.

Layers are measured on a star, not on every combination: attention's cost (key-value heads, length) does not depend on
the FFN, so both are varied around one reference, `{"ffn", "ratio", "decode": places, "prefill": tokens}` in the table's
header. What was left out is filled in: the reference's cost there, and what this FFN costs beyond the reference's. In a
prefill that difference grows with the tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from merino_edge.grid import Grid, Point
from merino_edge.measurement import MODES, WHOLE, Measurement

UNITS = ("ms", "mj")
Key = tuple[str, ...]  # unit, what, mode, ffn ("" of parts without one), cache


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
        places, widths, ratios, shares = (
            sorted({point[axis] for grid in (core, points) for point in grid}) for axis in range(4)
        )
        for at, width, r, share in itertools.product(places, widths, ratios, shares):
            beyond = _beyond(measured, core, (width, r), ratio, (at, place))
            base = core.get((at, width, ratio, share))
            if (at, width, r, share) not in points and base is not None and beyond is not None:
                extra, measured_at = beyond
                points[at, width, r, share] = max(0.0, base + extra * (at / measured_at if per_token else 1.0))


def _beyond(
    measured: Mapping[Point, float], core: Mapping[Point, float], shape: tuple[float, float], ratio: float,
    places: tuple[float, float],
) -> tuple[float, float] | None:  # fmt: skip
    """What this FFN costs beyond the reference's with all key-value heads, and the place where both were measured."""
    width, r = shape
    for at in places:
        mine, reference = measured.get((at, width, r, 1.0)), core.get((at, width, ratio, 1.0))
        if mine is not None and reference is not None:
            return mine - reference, at
    return None
