"""A step that another program interrupts does not count: by a fake kernel's counter, and beside a real busy program."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import pytest

from merino_edge.jetson.profiler import interruption
from merino_edge.jetson.profiler.interruption import TRIES, switches, uninterrupted_seconds


def runs(monkeypatch: pytest.MonkeyPatch, interrupted: list[bool]) -> Callable[[], float]:
    """Runs of 1, 2, ... s, some of them interrupted; each takes a tenth of the time of the processor."""
    counter, processor_s, number = [0], [0.0], [0]
    monkeypatch.setattr(interruption, "switches", lambda: counter[0])
    monkeypatch.setattr(interruption.time, "thread_time", lambda: processor_s[0])

    def run() -> float:
        counter[0] += interrupted[number[0]]
        number[0] += 1
        processor_s[0] += number[0] / 10
        return float(number[0])

    return run


@pytest.mark.parametrize("interruptions", range(TRIES))
def test_the_first_run_that_nothing_interrupted_counts(monkeypatch: pytest.MonkeyPatch, interruptions: int) -> None:
    between: list[None] = []
    run = runs(monkeypatch, [True] * interruptions + [False] * TRIES)
    took_s = uninterrupted_seconds(run, lambda: between.append(None), one_thread=True)
    assert took_s == interruptions + 1 and len(between) == interruptions


@pytest.mark.parametrize(("one_thread", "expected_s"), [(True, 0.1), (False, 1.0)])
def test_where_every_run_is_interrupted_the_processor_s_time_counts_if_it_is_of_one_thread(
    monkeypatch: pytest.MonkeyPatch, one_thread: bool, expected_s: float
) -> None:
    run = runs(monkeypatch, [True] * TRIES)
    assert uninterrupted_seconds(run, lambda: None, one_thread=one_thread) == pytest.approx(expected_s)


@pytest.fixture
def busy_program() -> Iterator[None]:
    """A program that never rests, and this one, on the same core."""
    allowed = os.sched_getaffinity(0)
    os.sched_setaffinity(0, sorted(allowed)[-1:])
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        yield
    finally:
        child.kill()
        child.wait()
        os.sched_setaffinity(0, allowed)


@pytest.mark.usefixtures("busy_program")
def test_the_kernel_counts_what_a_busy_program_interrupts() -> None:
    """And work that takes far longer than a turn on the core is told by the time of the processor."""

    def work() -> float:
        begun, end = time.perf_counter(), time.thread_time() + 0.06
        while time.thread_time() < end:
            pass
        return time.perf_counter() - begun

    before = switches()
    while switches() == before:
        work()
    took_s = [uninterrupted_seconds(work, lambda: None, one_thread=True) for _ in range(3)]
    assert min(took_s) == pytest.approx(0.06, rel=0.2)
