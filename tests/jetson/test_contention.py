"""A neighbour on the core is felt by the loop beside a step, and taken out of the step's time."""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from merino_edge.jetson import contention, stopwatch
from merino_edge.jetson.backends import BACKENDS, TINY
from merino_edge.jetson.contention import Contention, undisturbed
from merino_edge.jetson.stopwatch import Stopwatch, Visit, feels_contention

SLOWNESS = st.floats(1, contention.MOST)


@given(st.floats(1e-6, 10), SLOWNESS, SLOWNESS)
def test_what_a_neighbour_adds_is_taken_out(seconds: float, before: float, after: float) -> None:
    slower = 1 + contention.STEP_SHARE * ((before + after) / 2 - 1)
    assert undisturbed(slower * seconds, before, after) == pytest.approx(seconds)
    assert undisturbed(seconds, 1, 1) == seconds


def test_the_loop_is_as_slow_as_the_machine() -> None:
    felt = Contention()
    felt.quiet_s /= 2  # twice as slow as it was when quiet
    assert statistics.median(felt.slowness() for _ in range(100)) >= 1.9
    felt.quiet_s /= 1000  # interrupted, rather
    assert felt.slowness() == contention.MOST


class Core:
    """A core with a neighbour that comes and goes: its clock, its engine of 1 ms a step, and the loop that it runs."""

    def __init__(self) -> None:
        self.now_s, self.random, self.vocab_size = 0.0, random.Random(0), 64
        self.slow = 1.0

    def perf_counter(self) -> float:
        return self.now_s

    def loop(self) -> float:
        return 20e-6 * self.slow

    def assume(self, positions: int) -> None:
        pass

    def forward(self, tokens: np.ndarray, start: int) -> np.ndarray:
        self.now_s += 1e-3 * (1 + contention.STEP_SHARE * (self.slow - 1))
        self.slow = self.random.choice((1.0, 2.0)) if self.random.random() < 0.2 else self.slow
        return np.zeros(64, np.float32)

    def close(self) -> None:
        pass


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Iterator[Core]:
    core = Core()
    monkeypatch.setattr(contention, "_loop", core.loop)
    monkeypatch.setattr(contention, "QUIET_LOOPS", 1000)
    with monkeypatch.context() as clock:
        clock.setattr(stopwatch.time, "perf_counter", core.perf_counter)
        yield core


@pytest.mark.parametrize("cache", ["warm", "cold"])
def test_a_burst_is_as_long_beside_a_neighbour_as_alone(core: Core, cache: str) -> None:
    watch = Stopwatch(BACKENDS["onnxruntime-cpu"], "fp32", 1, 64, TINY)
    visit = Visit(TINY, "decode", 8, cache)  # type: ignore[arg-type]
    disturbed = [watch._burst(core, visit, 1e-3) for _ in range(200)]  # type: ignore[arg-type]
    assert statistics.fmean(disturbed) > 1.2e-3
    core.slow = 1.0
    watch._contention = Contention()
    calm = [watch._burst(core, visit, 1e-3) for _ in range(200)]  # type: ignore[arg-type]
    assert statistics.median(calm) == pytest.approx(1e-3, rel=0.01)


def test_only_one_thread_of_a_cpu_feels_it() -> None:
    cpu, gpu = BACKENDS["onnxruntime-cpu"], BACKENDS["tensorrt"]
    assert feels_contention(cpu, 1) and not feels_contention(cpu, 2) and not feels_contention(gpu, 1)
    assert feels_contention(dataclasses.replace(cpu, name="another"), 1)
