from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge.errors import InputError
from merino_edge.search.entropy import (
    Hyperparameters,
    depth_penalty,
    effectiveness_gamma,
    layer_entropy,
    matrix_entropy,
)

# Narrow to wide, square to 8:1, with as many samples as give every shape about the same work.
SHAPES = [(rows, round(rows * ratio)) for rows in (12, 16, 24, 32, 48, 64, 96) for ratio in (1, 1.5, 2, 4, 8)]
EPSILONS = (1.0, 30.0, 700.0, 1e4)


def sampled(rows: int, columns: int, samples: int, seed: int) -> np.ndarray:
    """Singular values of random normal matrices: [samples, min(rows, columns)]."""
    rng = np.random.default_rng(seed)
    matrices = (rng.standard_normal((rows, columns)) for _ in range(samples))
    return np.stack([np.linalg.svd(matrix, compute_uv=False) for matrix in matrices])


@pytest.mark.parametrize(("rows", "columns"), SHAPES)
def test_closed_form_is_within_the_sampling_error(rows: int, columns: int) -> None:
    """The error of finite size gets no allowance. With 100 samples the leading term alone is rejected (see below)."""
    samples = max(100, min(1000, 2 * 10**7 // (rows * rows * columns)))
    values = sampled(rows, columns, samples, seed=rows * 10_000 + columns)
    for epsilon_squared in EPSILONS:
        entropies = np.log1p(values**2 / epsilon_squared).sum(axis=1)
        standard_error = entropies.std(ddof=1) / math.sqrt(samples)
        assert abs(entropies.mean() - matrix_entropy(rows, columns, epsilon_squared)) <= 4 * standard_error


def test_the_leading_term_alone_is_rejected() -> None:
    """Sampling detects an error of 0.6 nats in 89. So the second term is needed, and the test above can fail."""
    entropies = np.log1p(sampled(32, 32, 1000, seed=0) ** 2).sum(axis=1)
    standard_error = entropies.std(ddof=1) / math.sqrt(1000)
    g = 32.0  # n / epsilon_squared, beta = 1
    f = (math.sqrt(4 * g + 1) - 1) ** 2
    leading = 32 * (2 * math.log(1 + g - f / 4) - f / (4 * g))
    assert leading - entropies.mean() > 8 * standard_error
    assert matrix_entropy(32, 32, 1.0) - leading == pytest.approx(-0.6, abs=0.02)


def test_matrix_entropy_does_not_care_about_orientation_and_grows_with_size() -> None:
    assert matrix_entropy(64, 256, 700.0) == matrix_entropy(256, 64, 700.0)
    assert matrix_entropy(64, 64, 700.0) < matrix_entropy(64, 128, 700.0) < matrix_entropy(128, 128, 700.0)
    assert matrix_entropy(64, 64, 700.0) < matrix_entropy(64, 64, 70.0)
    assert 0 < matrix_entropy(1, 1, 1e12) < 1e-11  # the limit of vanishing singular values keeps its precision


def test_gamma_equals_the_papers_table_1() -> None:
    assert effectiveness_gamma(1, 256, 1 / 16) == pytest.approx(0.0078, abs=5e-5)
    assert effectiveness_gamma(24, 64, 1 / 16) == pytest.approx(0.25)
    assert effectiveness_gamma(1000, 64, 1 / 16) == 1.0
    assert effectiveness_gamma(1, 1, 1 / 16) == 1.0


def test_penalty_power_changes_only_the_penalty() -> None:
    squared = Hyperparameters(effectiveness_power=2.0)
    assert depth_penalty(24, 64, squared) == pytest.approx(0.75**2)
    assert depth_penalty(24, 64, Hyperparameters(effectiveness_power=0.0)) == 1.0


def test_fewer_key_value_heads_and_no_gate_lower_the_entropy() -> None:
    full, grouped = (layer_entropy(576, kv_width, 1536, 700.0, gated=True) for kv_width in (576, 192))
    assert grouped[0] < full[0] and grouped[1] == full[1]
    assert layer_entropy(576, 576, 1536, 700.0, gated=False)[1] == pytest.approx(full[1] * 2 / 3)


@given(width=st.sampled_from((64, 128, 256)), cut=st.integers(16, 512), gated=st.booleans())
@settings(max_examples=40, deadline=None)
def test_a_cut_takes_entropy_exactly_where_it_is_narrower(width: int, cut: int, *, gated: bool) -> None:
    whole, behind = (layer_entropy(width, 64, 2 * width, 700.0, gated=gated, cut=c) for c in (None, cut))
    if cut >= width:
        assert behind == whole
    else:
        assert all(0 < narrow < wide for narrow, wide in zip(behind, whole, strict=True))
        # the same layer of a stream as narrow as the cut: only the stream's side shrinks
        attention = 2 * matrix_entropy(cut, width, 700.0) + 2 * matrix_entropy(cut, 64, 700.0)
        ffn = (3 if gated else 2) * matrix_entropy(cut, 2 * width, 700.0)
        assert behind == (attention, ffn)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("epsilon_squared", 0.0),
        ("epsilon_squared", math.nan),
        ("alpha_mha", -1.0),
        ("beta_depth", math.inf),
        ("shared_layer", 1.1),
    ],
)
def test_hyperparameters_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        Hyperparameters(**{field: value})
