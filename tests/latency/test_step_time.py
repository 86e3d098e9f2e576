"""The step-time model of a decode step finds the law again that whole models follow."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge.latency.step_time import COLD, WARM, Piece, StepTimeModel, Sums, fit, single

MODELS = 48  # that a profile fits to
FAR = Piece(0.95, 0.0, 0.0)
# A byte's cold penalty is 0.02 ms per MB in what `drawn` draws.
LAW = StepTimeModel((WARM, Piece(1.0, 0.01, -0.8), FAR), ((0, 1), (2,)))
CURVE = StepTimeModel((WARM, Piece(0.0, 0.01, -0.2), Piece(0.0, 0.03, -1.2)), ((0, 1, 2),))
HINGE = StepTimeModel((WARM, Piece(1.0, 0.0, -0.5)), ((0, 1),))
NEAR = single(Piece(0.05, 0.0, -0.02))


def drawn(law: StepTimeModel, count: int, noise: float = 0.0, seed: int = 0) -> list[tuple[Sums, float]]:
    rng, models = random.Random(seed), []
    for _ in range(count):
        mb = rng.uniform(5, 100)
        warm = mb * rng.uniform(0.01, 0.03)
        sums = Sums(warm, warm + 0.02 * mb, mb)
        models.append((sums, law.value(sums) * math.exp(rng.gauss(0, noise))))
    return models


@pytest.mark.parametrize("law", [LAW, CURVE, HINGE, NEAR, single(WARM)])
def test_a_law_of_this_form_is_found_again(law: StepTimeModel) -> None:
    fitted = fit(drawn(law, MODELS), warm=True)
    for sums, measured in drawn(law, 50, seed=1):
        assert fitted.value(sums) == pytest.approx(measured, rel=0.05)


def test_noise_does_not_spoil_the_fit() -> None:
    fitted = fit(drawn(HINGE, 24, noise=0.02), warm=True)
    errors = [abs(fitted.value(sums) / measured - 1) for sums, measured in drawn(HINGE, 50, seed=2)]
    assert sum(errors) / len(errors) < 0.03


def test_a_slow_outlier_does_not_make_every_larger_model_cold() -> None:
    """As on a machine whose last cache holds all models, but another guest was busy now and then."""
    models = drawn(NEAR, 24, noise=0.02)
    largest = max(range(24), key=lambda i: models[i][0].mb)
    models[largest] = (models[largest][0], 1.06 * models[largest][1])
    fitted = fit(models, warm=True)
    errors = [abs(fitted.value(sums) / measured - 1) for sums, measured in drawn(NEAR, 50, seed=1)]
    assert max(errors) < 0.1


def test_without_warm_entries_cold_ones_get_a_constant() -> None:
    models = [(Sums(cold, cold, cold), cold - 0.3) for cold in (1.0, 2.0, 3.0)]
    assert fit(models, warm=False).value(Sums(5.0, 5.0, 5.0)) == pytest.approx(4.7)


def test_without_cold_entries_warm_ones_get_a_constant() -> None:
    models = [(Sums(warm, warm, warm), warm + 0.04) for warm in (0.3, 0.5, 0.8)]
    assert fit(models, warm=True, cold=False).value(Sums(0.6, 0.6, 0.6)) == pytest.approx(0.64)


def test_every_constant_of_a_piece_is_found_again() -> None:
    """Here the cold penalty is no multiple of the bytes, so neither can stand for the other."""
    law = StepTimeModel((Piece(0.0, 0.0, 0.1), Piece(0.13, 0.01, -0.4)), ((0, 1),))

    def independent(count: int, seed: int) -> list[tuple[Sums, float]]:
        rng, models = random.Random(seed), []
        for _ in range(count):
            mb = rng.uniform(5, 100)
            warm = mb * rng.uniform(0.01, 0.03)
            sums = Sums(warm, warm + mb * rng.uniform(0.005, 0.05), mb)
            models.append((sums, law.value(sums)))
        return models

    fitted = fit(independent(MODELS, seed=0), warm=True)
    errors = [abs(fitted.value(sums) / measured - 1) for sums, measured in independent(50, seed=1)]
    assert sum(errors) / len(errors) < 0.01


@pytest.mark.parametrize("seed", range(3))
def test_noise_alone_adds_no_constant(seed: int) -> None:
    assert fit(drawn(single(WARM), MODELS, noise=0.01, seed=seed), warm=True) == single(WARM)


def test_no_piece_falls_with_the_bytes() -> None:
    """Not even where the models that read more take less beside their warm sum, as noise may have it."""
    models = [(sums, sums.warm_ms + max(0.05, 2.0 - 0.03 * sums.mb)) for sums, _ in drawn(single(WARM), MODELS)]
    fitted = fit(models, warm=True)
    assert all(piece.cold_share >= 0 and piece.ms_per_mb >= 0 for piece in fitted.pieces)


def test_few_models_fit_no_hinge() -> None:
    assert len(fit(drawn(LAW, 7), warm=True).pieces) == 1
    assert len(fit(drawn(LAW, 15), warm=True).pieces) <= 3


@given(st.floats(0.1, 5), st.floats(0, 5), st.floats(1, 100))
@settings(max_examples=50, deadline=None)
def test_pieces_read_back_as_they_were_written(warm: float, penalty: float, mb: float) -> None:
    assert StepTimeModel.from_dict(LAW.to_dict()) == LAW
    sums = Sums(warm, warm + penalty, mb)
    steep, far = warm + penalty + 0.01 * mb - 0.8, warm + 0.95 * penalty
    assert LAW.value(sums) == pytest.approx(min(max(warm, steep), far))
    assert single(COLD).value(sums) == pytest.approx(warm + penalty)


@pytest.mark.parametrize(
    "harm",
    [
        {},
        {"faces": [[0, 0, 0]], "alternatives": []},
        {"faces": [[0, 0, 0]], "alternatives": [[1]]},
        {"faces": [[0, 0, 0]], "alternatives": [[]]},
        {"faces": [[0, 0, "nan"]], "alternatives": [[0]]},
        {"faces": [[0, 0]], "alternatives": [[0]]},
        [],
    ],
)
def test_what_is_no_form_of_a_model_is_refused(harm: object) -> None:
    with pytest.raises((KeyError, TypeError, ValueError)):
        StepTimeModel.from_dict(harm)
