"""How a burst is timed: warm before it counts, without the neighbour on the core, and as often as time is left."""

from __future__ import annotations

import dataclasses
import random
import statistics

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merino_edge.jetson.profiler import contention, timer
from merino_edge.jetson.profiler.backends import BACKENDS, TINY
from merino_edge.jetson.profiler.contention import ContentionProbe
from merino_edge.jetson.profiler.timer import (
    FEWEST_ROUNDS,
    LONG_SECONDS,
    Rounds,
    TimedStep,
    Timer,
    can_probe_contention,
    warm_up_steps,
)

CPU = BACKENDS["onnxruntime-cpu"]


class Clocked:
    """An engine on a clock of its own, of 1 ms a step."""

    vocab_size = 64

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now_s = 0.0
        monkeypatch.setattr(timer.time, "perf_counter", lambda: self.now_s)

    def slower(self) -> float:
        """How many times longer the next step takes."""
        raise NotImplementedError

    def mark_filled(self, positions: int) -> None:
        pass

    def forward(self, tokens: np.ndarray, start: int) -> np.ndarray:
        self.now_s += 1e-3 * self.slower()
        return np.zeros(self.vocab_size, np.float32)


class Filling(Clocked):
    """Its caches fill step by step: 2 ms, 1.5 ms, ..."""

    excess = 2.0

    def slower(self) -> float:
        self.excess /= 2
        return 1 + self.excess


class Shared(Clocked):
    """A neighbour on its core comes and goes after a step, and slows the loop too."""

    loop_slower = 1.0

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__(monkeypatch)
        self.random = random.Random(0)
        monkeypatch.setattr(contention, "_loop", lambda turns=0: 20e-6 * self.loop_slower)
        monkeypatch.setattr(contention, "QUIET_LOOPS", 1000)

    def slower(self) -> float:
        found = 1 + contention.STEP_SHARE * (self.loop_slower - 1)
        self.loop_slower = self.random.choice((1.0, 2.0)) if self.random.random() < 0.2 else self.loop_slower
        return found


def test_a_warm_burst_does_not_see_the_caches_fill(monkeypatch: pytest.MonkeyPatch) -> None:
    watch = Timer(CPU, "fp32", 2, sweep_bytes=0, reference_model=TINY)  # two threads contention_probe_s no neighbour
    step = TimedStep(TINY, "decode", 8, "warm")
    took_s = watch._burst(Filling(monkeypatch), step, 2e-3)  # type: ignore[arg-type]
    assert took_s == pytest.approx(1e-3, rel=0.01)


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_a_burst_is_as_long_beside_a_neighbour_as_alone(monkeypatch: pytest.MonkeyPatch, cache: str) -> None:
    core, watch = Shared(monkeypatch), Timer(CPU, "fp32", 1, sweep_bytes=64, reference_model=TINY)
    step = TimedStep(TINY, "decode", 8, cache)  # type: ignore[arg-type]
    disturbed = [watch._burst(core, step, 1e-3) for _ in range(200)]  # type: ignore[arg-type]
    assert statistics.fmean(disturbed) > 1.2e-3
    core.loop_slower = 1.0
    watch._contention = ContentionProbe()
    calm = [watch._burst(core, step, 1e-3) for _ in range(200)]  # type: ignore[arg-type]
    assert statistics.median(calm) == pytest.approx(1e-3, rel=0.01)


def test_only_one_thread_of_a_cpu_feels_it() -> None:
    gpu = BACKENDS["tensorrt"]
    assert can_probe_contention(CPU, 1) and not can_probe_contention(CPU, 2) and not can_probe_contention(gpu, 1)
    assert can_probe_contention(dataclasses.replace(CPU, name="another"), 1)


@given(st.floats(1e-6, 1.0))
def test_only_short_steps_warm_up_and_not_for_long(step_s: float) -> None:
    decode, prefill = warm_up_steps("decode", step_s), warm_up_steps("prefill", step_s)
    assert (decode == prefill == 0) == (step_s >= LONG_SECONDS)
    assert decode <= 10 and decode * step_s < 0.03
    assert decode >= 10 or decode * step_s >= 0.02 or step_s >= LONG_SECONDS


@given(st.integers(1, 20), st.integers(0, 100), st.floats(-2, 5))
def test_rounds_follow_the_time_that_is_left(least: int, more: int, share: float) -> None:
    rounds = Rounds(least, least + more)
    fewer = rounds.limited_to(share)
    assert fewer.minimum == min(least, fewer.maximum) and fewer.maximum <= rounds.maximum
    assert fewer.maximum >= min(FEWEST_ROUNDS, rounds.maximum)
    assert fewer == rounds if share >= 1 else fewer.maximum <= max(FEWEST_ROUNDS, share * rounds.maximum)
