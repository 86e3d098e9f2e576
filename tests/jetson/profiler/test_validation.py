"""Errors against whole models, and how well repetitions of one model agree."""

from __future__ import annotations

import math
import random

import pytest

from merino_edge.jetson.profiler.validation import _next_bounds, error_figures, repeatability_percent
from merino_edge.latency.measurement import Measurement, What


def test_figures_are_relative_to_what_was_measured() -> None:
    found = error_figures([(110.0, 100.0), (190.0, 200.0), (300.0, 300.0), (400.0, 800.0)])
    assert found["mape_percent"] == pytest.approx((10 + 5 + 0 + 50) / 4)
    assert found["bias_percent"] == pytest.approx((10 - 5 + 0 - 50) / 4)
    assert found["p95_percent"] == found["max_percent"] == pytest.approx(50)
    assert found["kendall_tau"] == 1.0 and found["models"] == 4


def repetition(model: int, ms: float, number: int, yardstick_ms: float = 1.0, what: What = "model") -> Measurement:
    shape = {"architecture": {"model": model}}
    return Measurement(what, "prefill", 8, shape, (ms, ms), reference_ms={"prefill": yardstick_ms}, repetition=number)


def test_visits_to_one_model_are_compared_with_each_other_alone() -> None:
    lines = [repetition(1, ms, number) for number, ms in enumerate((10.0, 12.0, 9.0))]
    lines += [
        repetition(2, 500.0, 0),
        repetition(3, 1.0, 0, what="calibration"),
        repetition(3, 9.0, 1, what="calibration"),
    ]
    assert repeatability_percent(lines, "prefill") == pytest.approx(100 * (0 + 0.2 + 0.1) / 3)
    assert repeatability_percent(lines, "decode") is None and repeatability_percent(lines[:1], "prefill") is None


def test_a_slower_machine_is_no_distance_between_visits() -> None:
    lines = [repetition(1, 10.0, 0), repetition(1, 20.0, 1, 2.0), repetition(1, 5.0, 2, 0.5)]
    assert repeatability_percent(lines, "prefill") == pytest.approx(0)


@pytest.mark.parametrize("predicted_ms", [0.0, -0.1])
def test_a_prediction_of_no_time_has_no_interval(predicted_ms: float) -> None:
    figures = error_figures([(predicted_ms, 1.0), (1.0, 1.1), (2.0, 2.0)])
    assert figures["low_percent"] is None and figures["high_percent"] is None
    assert figures["max_percent"] == pytest.approx(100 * (1 - predicted_ms))
    few = error_figures([(predicted_ms, 1.0)] + [(1.0, 1.0)] * 40)  # fewer than may lie outside
    assert few["low_percent"] == few["high_percent"] == 0.0


def test_the_bounds_of_few_found_models_hold_what_comes_next() -> None:
    """Nine of ten, over many draws; the least and the largest of seven would hold three of four."""
    rng, inside, outermost = random.Random(0), 0, 0
    for _ in range(10_000):
        *known, following = [math.exp(rng.gauss(0.02, 0.05)) for _ in range(8)]
        bounds = _next_bounds([(1.0, measured) for measured in known])
        low, high = (1 + (bounds[name] or 0.0) / 100 for name in ("low_percent", "high_percent"))
        inside += low <= following <= high
        outermost += min(known) <= following <= max(known)
    assert 0.89 < inside / 10_000 < 0.95 and outermost / 10_000 < 0.8
    assert set(_next_bounds([(0.0, 1.0)] * 5).values()) == {None}
