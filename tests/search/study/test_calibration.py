"""Calibration: the grid equals the score, halves are valid, and the constants that made the losses are found."""

from __future__ import annotations

import json
import random
from dataclasses import replace

import numpy as np
import pytest
from scipy import stats

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.presets import PRESETS, preset
from merino_edge.search.builtin_spaces import EDGE, STUDY
from merino_edge.search.entropy import Hyperparameters
from merino_edge.search.score import effective
from merino_edge.search.study import report
from merino_edge.search.study.calibration import Fit, calibrate, choose, halves, objective
from merino_edge.search.study.grid import FORMS, Grid, Setting, scores
from merino_edge.search.study.sampling import decoder_parameters
from merino_edge.search.study.scores import Trained

COARSE = Grid((0.1, 0.3, 0.57, 0.8), (3, 30, 700, 20000), (1 / 16, 1 / 8), (0, 1, 3), (0, 0.5, 1), (0.25, 1))


@pytest.fixture(scope="module")
def models() -> list[Architecture]:
    rng, found = random.Random(1), {}
    for blocks in (1, 2, 3):  # nearly all of the space has three
        part = replace(STUDY, blocks=(blocks,))
        found |= {a.id: a for a in (part.architecture(part.sample(rng)) for _ in range(40))}
    return list(found.values())[::-1][:80]


def made_by(setting: Setting, models: list[Architecture], noise: float = 0.0) -> list[Trained]:
    """Models whose losses fall with the logarithm of a setting's score."""
    rng, score = np.random.default_rng(0), setting.score()
    return [Trained(a, (float(8 - np.log(score.total(a)) + noise * rng.normal()),)) for a in models]


# --- the grid --------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_the_grid_is_the_score_for_every_family(form: str) -> None:
    rng = random.Random(0)
    various = [preset(name) for name in PRESETS] + [EDGE.architecture(EDGE.sample(rng)) for _ in range(5)]
    found, settings = scores(various, COARSE, form), COARSE.settings(form)
    assert found.shape == (len(settings), len(various))
    for index in rng.sample(range(len(settings)), 20):
        score = settings[index].score()
        assert found[index] == pytest.approx([score.total(a) for a in various], rel=1e-6)  # each layer is rounded


def test_the_defaults_are_in_the_standard_grid_and_nothing_is_nearer_to_them() -> None:
    for form in FORMS:
        steps, settings = Grid().steps(form), Grid().settings(form)
        nearest = settings[int(np.argmin(steps))]
        assert steps.min() == 0 and np.count_nonzero(steps == 0) == 1
        assert nearest.hyperparameters == replace(Hyperparameters(), alpha_ffn=1 - Hyperparameters().alpha_mha)


def test_a_power_of_nothing_leaves_the_score_and_one_of_one_multiplies_by_the_last_width(
    models: list[Architecture],
) -> None:
    constants = (0.57, 700.0, 1 / 16, 1.0)
    plain = effective(Setting("effective", *constants).hyperparameters)
    for a in models[::10]:
        assert Setting("exit", *constants).score().total(a) == plain.total(a)
        wider = Setting("exit", *constants, exit_power=1).score()
        assert wider.total(a) == pytest.approx(plain.total(a) * a.blocks[-1].width)


@pytest.mark.parametrize("broken", [{"alpha_mha": ()}, {"epsilon_squared": (3, 1)}, {"exit_power": (1, 1)}])
def test_a_grid_that_does_not_ascend_is_refused(broken: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(InputError, match="ascending"):
        Grid(**broken)  # type: ignore[arg-type]
    with pytest.raises(InputError, match="no form"):
        Grid().settings("wrong")


# --- halves and choice -----------------------------------------------------------------------------


@pytest.mark.parametrize("count", [80, 79])
def test_halves_are_disjoint_cover_all_and_have_models_of_like_sizes(models: list[Architecture], count: int) -> None:
    chosen = models[:count]
    order = sorted(range(count), key=lambda i: (decoder_parameters(chosen[i]), chosen[i].id))
    seen = set()
    for seed in range(20):
        first, second = halves(chosen, np.random.default_rng(seed))
        assert sorted([*first, *second]) == list(range(count)) and abs(len(first) - len(second)) <= 1
        for a, b in zip(order[::2], order[1::2], strict=False):
            assert (a in first) != (b in first)
        seen.add(tuple(first))
    assert len(seen) == 20
    again = halves(chosen, np.random.default_rng(3)), halves(chosen, np.random.default_rng(3))
    assert all((x == y).all() for x, y in zip(*again, strict=True))


def test_the_objective_is_scipys_mean_of_both_correlations() -> None:
    rng = np.random.default_rng(0)
    rows, loss = rng.integers(0, 8, (40, 23)).astype(float), rng.integers(0, 12, 23).astype(float)
    rows[7] = 3
    found = objective(rows, loss)
    for row, value in zip(rows, found, strict=True):
        expected = 0.0
        if np.ptp(row):
            expected = (stats.spearmanr(row, -loss).statistic + stats.kendalltau(row, -loss).statistic) / 2
        assert value == pytest.approx(expected, abs=1e-6)


def test_of_equal_settings_the_one_nearest_to_the_defaults_is_chosen() -> None:
    loss = np.arange(6.0)
    rows = np.array([loss, -loss, -3 * loss, -(loss**3), loss % 2])
    assert choose(rows, loss, np.array([0, 5, 2, 3, 1.0])) == 2


# --- the fit ---------------------------------------------------------------------------------------

TRUTH = Setting("cut", 0.1, 30, 1 / 8, 3)


@pytest.fixture(scope="module")
def fits(models: list[Architecture]) -> dict[str, Fit]:
    found = calibrate(made_by(TRUTH, models), COARSE, repeats=8)
    assert found.best.setting.form == "cut"
    return {fit.setting.form: fit for fit in found.fits}


def test_without_noise_the_constants_that_made_the_losses_are_found(fits: dict[str, Fit]) -> None:
    cut = fits["cut"]
    assert cut.setting == cut.on_all == TRUTH
    assert cut.training == pytest.approx(1) and cut.fitted.kendall.value == pytest.approx(1)
    assert cut.over_default.spearman.low > 0 and cut.over_parameters.spearman.low > 0
    assert cut.repeats.better == 1 and (cut.repeats.training > 0).all()
    assert sum(setting == TRUTH for setting in cut.repeats.settings) >= 6  # of 8
    assert fits["effective"].training < 1 and fits["effective"].setting.exit_power == 0


def test_a_fit_is_never_worse_where_it_was_fitted(fits: dict[str, Fit]) -> None:
    fit = fits["effective"]  # the default score is one of its settings
    assert (fit.repeats.training >= -1e-6).all() and fit.training >= fit.training_default - 1e-6


def test_with_noise_constants_close_to_the_truth_are_found(models: list[Architecture]) -> None:
    trained = made_by(TRUTH, models, noise=0.03)
    found = calibrate(trained, COARSE, ("cut",), repeats=4)
    score = {True: found.best.setting.score(), False: TRUTH.score()}
    ranks = [[score[key].total(a) for a in models] for key in (True, False)]
    assert stats.kendalltau(*ranks).statistic > 0.95
    assert found.best.over_default.kendall.value > 0


def test_an_exit_is_found_where_an_exit_made_the_losses(models: list[Architecture]) -> None:
    truth = Setting("exit", 0.3, 30, 1 / 16, 1, exit_power=1)
    found = calibrate(made_by(truth, models), COARSE, repeats=0)
    assert found.best.setting.form == "exit" and found.best.setting.exit_power == 1
    assert len(found.best.repeats.other) == 0


def test_what_a_shared_layer_counts_is_found_where_layers_share_and_not_tried_elsewhere(
    models: list[Architecture],
) -> None:
    rng, space = random.Random(2), replace(STUDY, shared=(False, True))
    sharing = list({a.id: a for a in (space.architecture(space.sample(rng)) for _ in range(60))}.values())
    truth = Setting("effective", 0.57, 700.0, 1 / 16, 1, shared_layer=0.25)
    found = calibrate(made_by(truth, sharing), COARSE, ("effective",), repeats=0)
    assert found.best.setting == truth and found.best.over_parameters.kendall.low > 0
    assert "shared_layer=0.25" in report.constants(truth)
    unshared = calibrate(made_by(TRUTH, models), COARSE, repeats=0)
    assert 2 * unshared.settings_tried == sum(len(COARSE.settings(form)) for form in FORMS)
    assert all(fit.setting.shared_layer == 1 for fit in unshared.fits)


def test_losses_without_order_give_gains_only_where_they_were_fitted(models: list[Architecture]) -> None:
    rng = np.random.default_rng(1)
    chance = [Trained(a, (float(rng.normal(5, 1)),)) for a in models]
    (fit,) = calibrate(chance, COARSE, ("effective",), repeats=20).fits
    assert (fit.repeats.training >= -1e-6).all() and fit.repeats.training.mean() > 0
    assert fit.repeats.other.mean() < 0.5 * fit.repeats.training.mean()


def test_the_same_arguments_give_the_same_calibration(models: list[Architecture]) -> None:
    trained = made_by(TRUTH, models, noise=0.1)
    reports = [
        json.dumps(report.calibration_fields(calibrate(trained, COARSE, seed=seed, repeats=3)), allow_nan=False)
        for seed in (0, 0, 1)
    ]
    assert reports[0] == reports[1] != reports[2]


def test_too_few_models_are_refused(models: list[Architecture]) -> None:
    with pytest.raises(InputError, match="halves"):
        calibrate(made_by(TRUTH, models[:7]))


def test_the_tables_hold_every_form(models: list[Architecture]) -> None:
    found = calibrate(made_by(TRUTH, models, noise=0.1), COARSE, repeats=3)
    for text, blocks in ((report.calibration_tables(found), 2), (report.stability_table(found), 1)):
        tables = text.strip().split("\n\n")
        assert len(tables) == blocks
        for table in tables:
            assert len({line.count("|") for line in table.splitlines()}) == 1
            assert all(f"| {form}" in table for form in FORMS)
    assert "exit_power" in report.constants(Setting("exit", 0.5, 1, 0.1, 1, 0.5))
    assert "exit_power" not in report.constants(TRUTH)
