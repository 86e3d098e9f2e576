"""How a burst is timed: warm before it counts, and as often as time is left."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merino_edge.jetson import stopwatch
from merino_edge.jetson.backends import BACKENDS, TINY
from merino_edge.jetson.stopwatch import LONG_SECONDS, Rounds, Stopwatch, Visit, warm_up_steps


class Filling:
    """An engine on a clock of its own, whose caches fill step by step: 2 ms, 1.5 ms, ... down to 1 ms."""

    vocab_size = 64

    def __init__(self) -> None:
        self.now_s, self.steps = 0.0, 0

    def assume(self, positions: int) -> None:
        pass

    def forward(self, tokens: np.ndarray, start: int) -> np.ndarray:
        self.now_s += 1e-3 * (1 + 0.5**self.steps)
        self.steps += 1
        return np.zeros(64, np.float32)

    def close(self) -> None:
        pass


def test_a_warm_burst_does_not_see_the_caches_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Filling()
    watch = Stopwatch(BACKENDS["onnxruntime-cpu"], "fp32", 2, 0, TINY)  # two threads feel no neighbour
    monkeypatch.setattr(stopwatch.time, "perf_counter", lambda: engine.now_s)
    took_s = watch._burst(engine, Visit(TINY, "decode", 8, "warm"), 2e-3)  # type: ignore[arg-type]
    assert took_s == pytest.approx(1e-3, rel=0.01)


@given(st.floats(1e-6, 1.0))
def test_only_short_steps_warm_up_and_not_for_long(step_s: float) -> None:
    decode, prefill = warm_up_steps("decode", step_s), warm_up_steps("prefill", step_s)
    assert (decode == prefill == 0) == (step_s >= LONG_SECONDS)
    assert decode <= 10 and decode * step_s < 0.03
    assert decode >= 10 or decode * step_s >= 0.02 or step_s >= LONG_SECONDS


@given(st.integers(1, 20), st.integers(0, 100), st.floats(-2, 5))
def test_rounds_follow_the_time_that_is_left(least: int, more: int, share: float) -> None:
    rounds = Rounds(least, least + more)
    fewer = rounds.fewer(share)
    assert fewer.least == least <= fewer.most <= rounds.most
    assert fewer == rounds if share >= 1 else fewer.most <= max(least, share * rounds.most)
