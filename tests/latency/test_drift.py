"""Drift correction: repetitions become one entry, and a slow machine is no slow part."""

from __future__ import annotations

import dataclasses
import math
import random

import pytest

from merino_edge.latency.drift import merge_repetitions
from merino_edge.latency.measurement import Measurement


def test_visits_merge_into_one_entry() -> None:
    first, second, broken = (
        Measurement("model", "decode", 8, {"architecture": {}}, samples, energy_mj, "warm", failed)
        for samples, energy_mj, failed in (((1.0, 2.0), 3.0, ""), ((4.0,), 5.0, ""), ((), None, "no memory"))
    )
    assert merge_repetitions([first, second]) == [dataclasses.replace(first, samples=(1.0, 2.0, 4.0), energy_mj=4.0)]
    assert merge_repetitions([first, broken]) == [broken]


def test_a_visit_to_a_slow_machine_counts_like_the_others() -> None:
    usual, slow, quick = (
        Measurement(
            "model", "decode", 8, {"architecture": {}}, (2.0 * slowdown,), reference_ms={"decode warm": 0.1 * slowdown}
        )
        for slowdown in (1.0, 1.5, 0.8)
    )
    (whole,) = merge_repetitions([slow, usual, quick])
    assert whole.samples == pytest.approx((2.0, 2.0, 2.0)) and whole.reference_ms == {"decode warm": 0.1}


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
def test_visits_tell_how_much_a_cold_yardstick_says_of_whole_models(share: float) -> None:
    """Both reference_ms wander, the models' own time follows them by some share each."""
    rng = random.Random(0)
    lines = []
    for repetition in range(3):
        for length in range(8, 20):
            warm, cold = (math.exp(rng.gauss(0, 0.1)) for _ in range(2))
            shape, took = {"architecture": {}}, 0.1 * length * warm ** (1 - share) * cold**share
            reference_ms = {"decode warm": 0.2 * warm, "decode cold": 0.8 * cold}
            lines.append(
                Measurement("model", "decode", length, shape, (took,), reference_ms=reference_ms, repetition=repetition)
            )
    whole = merge_repetitions(lines)
    ms_per_position = [m.median_ms / m.length for m in whole]
    assert len(whole) == 12 and max(ms_per_position) == pytest.approx(min(ms_per_position))
