from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest

from merino_edge.architecture import Block
from merino_edge.errors import InputError
from merino_edge.presets import PRESETS, preset
from merino_edge.search.entropy import (
    Hyperparameters,
    block_score,
    depth_penalty,
    effectiveness_gamma,
    layer_entropy,
    matrix_entropy,
    score,
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
    """No allowance for finite size: at 100 samples and more the leading term alone is rejected (below)."""
    samples = max(100, min(1000, 2 * 10**7 // (rows * rows * columns)))
    values = sampled(rows, columns, samples, seed=rows * 10_000 + columns)
    for epsilon_squared in EPSILONS:
        entropies = np.log1p(values**2 / epsilon_squared).sum(axis=1)
        standard_error = entropies.std(ddof=1) / math.sqrt(samples)
        assert abs(entropies.mean() - matrix_entropy(rows, columns, epsilon_squared)) <= 4 * standard_error


def test_the_leading_term_alone_is_rejected() -> None:
    """The sampling sees an error of 0.6 nats in 89: the fluctuation term is needed, and the test above can fail."""
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
    a = preset("opt-125m")
    assert score(a, squared).total < score(a).total
    assert score(a, squared).raw == score(a).raw


@pytest.mark.parametrize("name", PRESETS)
def test_score_is_the_sum_over_computed_layers(name: str) -> None:
    """Summed layer by layer from the definition (paper section 4)."""
    a, constants = preset(name), Hyperparameters()
    mha = ffn = raw = 0.0
    for layer in a.layer_blocks():
        kv_width = layer.kv_heads * a.head_dim
        shapes_mha = [(layer.width, layer.width)] * 2 + [(layer.width, kv_width)] * 2
        shapes_ffn = [(layer.width, layer.ffn_width)] * (3 if a.ffn == "swiglu" else 2)
        h_mha = sum(matrix_entropy(*shape, 700.0) for shape in shapes_mha)
        h_ffn = sum(matrix_entropy(*shape, 700.0) for shape in shapes_ffn)
        mha += (1 - a.layers / 16 / math.log2(layer.width)) * h_mha
        ffn += (1 - a.layers / 16 / math.log2(layer.ffn_width)) * h_ffn
        raw += h_mha + h_ffn
    found = score(a, constants)
    assert found.mha == pytest.approx(mha) and found.ffn == pytest.approx(ffn) and found.raw == pytest.approx(raw)
    assert found.total == pytest.approx(0.4 * mha + 0.6 * ffn)


def test_sharing_weights_does_not_change_the_score() -> None:
    a = preset("merino-52m")
    assert score(a) == score(replace(a, blocks=tuple(replace(block, shared=False) for block in a.blocks)))


def test_fewer_key_value_heads_and_no_gate_lower_the_entropy() -> None:
    a = preset("smollm2-135m")
    block = Block(width=576, layers=1, heads=9, kv_heads=9, ffn_width=1536)
    full, grouped = (layer_entropy(a, replace(block, kv_heads=n), 700.0) for n in (9, 3))
    assert grouped[0] < full[0] and grouped[1] == full[1]
    assert layer_entropy(preset("opt-125m"), block, 700.0)[1] == pytest.approx(full[1] * 2 / 3)
    assert block_score(a, replace(block, layers=3), 3, Hyperparameters()).raw == pytest.approx(3 * sum(full))


@pytest.mark.parametrize(
    ("field", "value"),
    [("epsilon_squared", 0.0), ("epsilon_squared", math.nan), ("alpha_mha", -1.0), ("beta_depth", math.inf)],
)
def test_hyperparameters_out_of_range_are_refused(field: str, value: float) -> None:
    with pytest.raises(InputError, match=field):
        Hyperparameters(**{field: value})
