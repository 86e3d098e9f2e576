from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from merino_edge.jetson.validation import figures, kendall_tau

PAIRS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=12)


@given(PAIRS)
@settings(max_examples=60, deadline=None)
def test_kendall_tau_is_tau_b(pairs: list[tuple[int, int]]) -> None:
    expected = kendalltau(*zip(*pairs, strict=True)).statistic
    assert kendall_tau(pairs) == (None if expected != expected else pytest.approx(expected, abs=1e-12))


def test_figures_are_relative_to_what_was_measured() -> None:
    found = figures([(110.0, 100.0), (190.0, 200.0), (300.0, 300.0), (400.0, 800.0)])
    assert found["mape_percent"] == pytest.approx((10 + 5 + 0 + 50) / 4)
    assert found["bias_percent"] == pytest.approx((10 - 5 + 0 - 50) / 4)
    assert found["p95_percent"] == found["max_percent"] == pytest.approx(50)
    assert found["kendall_tau"] == 1.0 and found["models"] == 4
