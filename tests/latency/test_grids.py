"""Interpolation that rises along every axis, whatever noise the points hold."""

from __future__ import annotations

import itertools

from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge.latency.grids import Grid

AXES = [(1.0, 2.0, 4.0), (0.0, 1.0), (10.0, 30.0, 31.0)]
CORNERS = list(itertools.product(*AXES))
VALUES = st.lists(st.floats(0, 100), min_size=len(CORNERS), max_size=len(CORNERS))
INSIDE = st.tuples(*(st.floats(axis[0], axis[-1]) for axis in AXES))


@given(VALUES, INSIDE, st.integers(0, 2), st.floats(0, 1))
@settings(max_examples=120, deadline=None)
def test_more_never_costs_less(values: list[float], point: tuple[float, ...], axis: int, further: float) -> None:
    grid = Grid(dict(zip(CORNERS, values, strict=True)))
    more = list(point)
    more[axis] += further * (AXES[axis][-1] - more[axis])
    low, high = grid.at(point), grid.at(more)
    assert low is not None and high is not None and low <= high + 1e-9
    assert min(values) - 1e-9 <= low and high <= max(values) + 1e-9


@given(VALUES, INSIDE)
@settings(max_examples=80, deadline=None)
def test_a_grid_that_rises_is_left_as_it_is(values: list[float], point: tuple[float, ...]) -> None:
    steps = iter(values)
    rising: dict[tuple[float, ...], float] = {}
    for corner in CORNERS:  # each is at least every corner before it
        before = [v for other, v in rising.items() if all(x <= y for x, y in zip(other, corner, strict=True))]
        rising[corner] = max(before, default=0.0) + next(steps)
    grid = Grid(rising)
    assert all(abs(grid.points[corner] - value) < 1e-9 for corner, value in rising.items())
    assert grid.at(CORNERS[5]) == grid.points[CORNERS[5]]


def test_a_hole_is_answered_around_but_not_beside() -> None:
    points = {corner: sum(corner) for corner in CORNERS if corner != (4.0, 1.0, 31.0)}
    grid = Grid(points)
    assert not grid.complete and grid.outside((4.0, 1.0, 31.0)) == []
    assert grid.at((4.0, 1.0, 30.5)) is None and grid.at((1.5, 0.5, 20.0)) == 22.0
    assert grid.outside((0.5, 0.5, 40.0)) == [0, 2]
