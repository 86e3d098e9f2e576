"""Bootstrap draws and rank correlations, against scipy on random values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import bootstrap, kendalltau, spearmanr

from merino_edge.statistics import (
    kendall,
    kendall_tau,
    median_interval,
    percentile_interval,
    resampled_counts,
    resampled_indices,
    signs,
    spearman,
)

PAIRS = st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=2, max_size=12)


@given(PAIRS)
@settings(max_examples=60, deadline=None)
def test_kendall_tau_is_tau_b(pairs: list[tuple[int, int]]) -> None:
    expected = kendalltau(*zip(*pairs, strict=True)).statistic
    assert kendall_tau(pairs) == (None if expected != expected else pytest.approx(expected, abs=1e-12))


@given(PAIRS, st.integers(0, 9))
@settings(max_examples=60, deadline=None)
def test_correlations_of_a_draw_are_those_of_its_items(pairs: list[tuple[int, int]], seed: int) -> None:
    a, b = np.array(pairs, np.float64).T
    counts = resampled_counts(len(pairs), 3, seed)
    rho, tau = spearman(signs(a), signs(b), counts), kendall(signs(a), signs(b), counts)
    for draw, times in enumerate(counts.astype(int)):
        x, y = np.repeat(a, times), np.repeat(b, times)
        if np.ptp(x) == 0 or np.ptp(y) == 0:
            assert rho[draw] == tau[draw] == 0
        else:
            assert rho[draw] == pytest.approx(spearmanr(x, y).statistic, abs=1e-9)
            assert tau[draw] == pytest.approx(kendalltau(x, y).statistic, abs=1e-9)


@given(PAIRS)
@settings(max_examples=30, deadline=None)
def test_kendall_of_some_pairs_is_that_of_the_items_where_they_are_all_pairs(pairs: list[tuple[int, int]]) -> None:
    """A mask of the pairs among the first items gives the tau of these items."""
    a, b = np.array(pairs, np.float64).T
    first = np.arange(len(pairs)) < 2
    ones = np.ones((1, len(pairs)))
    masked = kendall(signs(a), signs(b), ones, first[:, None] & first[None, :])
    assert masked[0] == pytest.approx(kendall(signs(a[:2]), signs(b[:2]), np.ones((1, 2)))[0])


@given(st.integers(1, 30), st.integers(1, 20), st.integers(0, 9))
@settings(max_examples=30, deadline=None)
def test_draws_hold_as_many_items_as_there_are(items: int, draws: int, seed: int) -> None:
    indices, counts = resampled_indices(items, draws, seed), resampled_counts(items, draws, seed)
    assert indices.shape == counts.shape == (draws, items)
    assert ((indices >= 0) & (indices < items)).all() and (counts.sum(1) == items).all()
    np.testing.assert_array_equal(indices, resampled_indices(items, draws, seed))


@given(st.lists(st.floats(0.1, 100), min_size=2, max_size=15))
@settings(max_examples=15, deadline=None)
def test_the_interval_of_a_median_is_close_to_scipys(samples: list[float]) -> None:
    """Both are percentile intervals; scipy draws other samples, so its bounds are tried at wider and narrower tails."""
    low, high = median_interval(samples)

    def scipys(confidence: float) -> tuple[float, float]:
        found = bootstrap(
            (samples,), np.median, n_resamples=2000, confidence_level=confidence, method="percentile", rng=0
        )
        return found.confidence_interval.low, found.confidence_interval.high

    (outer_low, outer_high), (inner_low, inner_high) = scipys(0.99), scipys(0.85)
    assert outer_low - 1e-9 <= low <= inner_low + 1e-9 and inner_high - 1e-9 <= high <= outer_high + 1e-9


def test_a_percentile_interval_is_along_the_draws() -> None:
    low, high = percentile_interval(np.arange(101.0)[:, None] * [1, 2], 0.9)
    np.testing.assert_allclose([low, high], [[5, 10], [95, 190]])
