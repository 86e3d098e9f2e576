"""The number of threads is one that was measured, and no fewer are as fast."""

from __future__ import annotations

from helpers.stranger import TINY
from merino_edge.jetson.profiler.thread_count import measure_threads
from merino_edge.runtime.thread_tuning import TOLERANCE


def test_it_is_the_fewest_of_the_fastest() -> None:
    count = measure_threads(TINY, "fp32", cores=3)
    speeds = count.tokens_per_s
    assert list(speeds) == [1, 2, 3] and min(speeds.values()) > 0
    fast = [threads for threads, speed in speeds.items() if speed * TOLERANCE >= max(speeds.values()) * (1 - 1e-9)]
    assert count.threads == min(fast)
