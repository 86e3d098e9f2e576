"""A neighbour on the core is felt by a loop, and what it adds to a step is taken out."""

from __future__ import annotations

import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from merino_edge.jetson.profiler import contention
from merino_edge.jetson.profiler.contention import ContentionProbe, without_contention

SLOWNESS = st.floats(1, contention.MAX_SLOWNESS)


@given(st.floats(1e-6, 10), SLOWNESS, SLOWNESS)
def test_what_a_neighbour_adds_is_taken_out(seconds: float, before: float, after: float) -> None:
    slower = 1 + contention.STEP_SHARE * ((before + after) / 2 - 1)
    assert without_contention(slower * seconds, before, after) == pytest.approx(seconds)
    assert without_contention(seconds, 1, 1) == seconds


def test_the_loop_is_as_slow_as_the_machine() -> None:
    felt = ContentionProbe()
    felt.quiet_s /= 2  # twice as slow as it was when quiet
    assert statistics.median(felt.slowness() for _ in range(100)) >= 1.9
    felt.quiet_s /= 1000  # interrupted, rather
    assert felt.slowness() == contention.MAX_SLOWNESS


def test_what_a_step_leaves_cold_is_not_taken_for_a_neighbour(monkeypatch: pytest.MonkeyPatch) -> None:
    felt, loops = ContentionProbe(), []
    usual = contention._loop

    def loop(turns: int = contention.LOOP_TURNS) -> float:
        loops.append(turns)
        return usual(turns)

    monkeypatch.setattr(contention, "_loop", loop)
    felt.slowness()
    assert loops == [contention.WARM_UP_TURNS, contention.LOOP_TURNS]
