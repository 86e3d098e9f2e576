"""Agreement of scores with losses: equal to scipy's values, with intervals that cover, and the table of scores."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.search.builtin_spaces import STUDY
from merino_edge.search.score import effective, narrowest_cut
from merino_edge.search.study import report
from merino_edge.search.study.rank_correlation import Agreement, agreement, difference
from merino_edge.search.study.sampling import decoder_parameters
from merino_edge.search.study.scores import PAPER, Row, Trained, like_size, repeatability, table
from merino_edge.statistics import kendall, signs, spearman


@pytest.fixture(scope="module")
def models() -> list[Architecture]:
    rng = random.Random(0)
    found = {a.id: a for a in (STUDY.architecture(STUDY.sample(rng)) for _ in range(40))}
    return list(found.values())


def trained_by(models: list[Architecture], scores: np.ndarray, noise: float = 0.0, seed: int = 0) -> list[Trained]:
    """Models whose losses fall with the logarithm of `scores`."""
    errors = noise * np.random.default_rng(seed).normal(size=len(models))
    return [Trained(a, (float(loss),)) for a, loss in zip(models, 8 - np.log(scores) + errors, strict=True)]


# --- correlations ----------------------------------------------------------------------------------

values = st.lists(st.integers(0, 6), min_size=4, max_size=25)  # few different ones, so many ties


@settings(deadline=None)
@given(values, st.randoms(use_true_random=False))
def test_correlations_are_scipys_ties_and_draws_with_repetition_included(a: list[int], rng: random.Random) -> None:
    b = [x if rng.random() < 0.5 else rng.randrange(7) for x in a]
    n = len(a)
    drawn = [rng.randrange(n) for _ in range(n)]
    counts = np.array([np.ones(n), np.bincount(drawn, minlength=n)], float)
    rho = spearman(signs(np.array(a, float)), signs(np.array(b, float)), counts)
    tau = kendall(signs(np.array(a, float)), signs(np.array(b, float)), counts)
    for index, pick in enumerate((range(n), drawn)):
        x, y = [a[i] for i in pick], [b[i] for i in pick]
        if len(set(x)) > 1 and len(set(y)) > 1:
            assert rho[index] == pytest.approx(stats.spearmanr(x, y).statistic, abs=1e-12)
            assert tau[index] == pytest.approx(stats.kendalltau(x, y).statistic, abs=1e-12)
        else:
            assert rho[index] == tau[index] == 0


def test_a_perfect_order_agrees_by_one_its_reverse_by_minus_one_and_a_constant_by_nothing() -> None:
    losses = np.random.default_rng(0).normal(5, 1, 30)
    for scores, expected in ((np.exp(-losses), 1), (losses**3, -1), (np.ones(30), 0)):
        found = agreement(scores, losses, like_pairs(30))
        assert found.alike is not None
        for estimate in (found.spearman, found.kendall, found.alike):
            assert estimate == pytest.approx((expected, expected, expected))


def like_pairs(n: int) -> np.ndarray:
    return np.abs(np.subtract.outer(np.arange(n), np.arange(n))) == 1


def test_kendall_over_pairs_of_like_size_counts_those_pairs_alone() -> None:
    rng = np.random.default_rng(1)
    scores, losses, pairs = rng.integers(0, 9, 20).astype(float), rng.integers(0, 9, 20).astype(float), like_pairs(20)
    agreeing = against = 0
    tied_scores = tied_losses = 0
    for i in range(19):  # neighbours
        sign = (scores[i] - scores[i + 1]) * (losses[i + 1] - losses[i])
        agreeing, against = agreeing + (sign > 0), against + (sign < 0)
        tied_scores, tied_losses = (
            tied_scores + (scores[i] == scores[i + 1]),
            tied_losses + (losses[i] == losses[i + 1]),
        )
    expected = (agreeing - against) / math.sqrt((19 - tied_scores) * (19 - tied_losses))
    found = agreement(scores, losses, pairs).alike
    assert found is not None and found.value == pytest.approx(expected)


def test_intervals_cover_the_truth_and_shrink_with_more_models() -> None:
    """Normal pairs of correlation r have rho (6/pi) asin(r/2) and tau (2/pi) asin(r)."""
    r, rng, covered, widths = 0.7, np.random.default_rng(2), np.zeros(2), []
    truth = (6 / math.pi * math.asin(r / 2), 2 / math.pi * math.asin(r))
    for repetition in range(200):
        x, noise = rng.normal(size=(2, 50))
        found = agreement(x, -(r * x + math.sqrt(1 - r * r) * noise), seed=repetition, draws=400)
        covered += [e.low <= t <= e.high for e, t in zip((found.spearman, found.kendall), truth, strict=True)]
        widths.append(found.kendall.high - found.kendall.low)
    assert (covered >= 175).all()  # of 200; 190 are promised, and 175 is five standard deviations below
    x, noise = rng.normal(size=(2, 400))
    found = agreement(x, -(r * x + math.sqrt(1 - r * r) * noise), draws=400)
    assert found.kendall.high - found.kendall.low < min(widths)


def test_a_difference_is_paired() -> None:
    """The difference of two similar scores has a much smaller interval than either score."""
    rng = np.random.default_rng(3)
    losses = rng.normal(size=60)
    a = -losses + rng.normal(size=60)
    b = a + 0.01 * rng.normal(size=60)
    alone, both = agreement(a, losses, seed=1), difference(a, b, losses, seed=1)
    assert both.spearman.value == pytest.approx(alone.spearman.value - agreement(b, losses).spearman.value)
    assert both.spearman.high - both.spearman.low < 0.1 * (alone.spearman.high - alone.spearman.low)
    again = difference(b, a, losses, seed=1)
    assert again.kendall == pytest.approx((-both.kendall.value, -both.kendall.high, -both.kendall.low))
    assert difference(a, a, losses).kendall == (0, 0, 0)


@pytest.mark.parametrize(
    ("scores", "losses"), [([1, 2, 3], [1, 2, 3]), ([1] * 5, [1] * 6), ([1, 2, 3, math.nan], [1, 2, 3, 4])]
)
def test_what_cannot_be_ranked_is_refused(scores: list[float], losses: list[float]) -> None:
    with pytest.raises(InputError, match=r"few|go with|finite"):
        agreement(scores, losses)


# --- the table -------------------------------------------------------------------------------------


def test_the_table_holds_every_score_and_finds_the_one_that_made_the_losses(models: list[Architecture]) -> None:
    cut = np.array([effective(cut=True).total(a) for a in models])
    rows = table(trained_by(models, cut), {"made up": -cut})
    by_name: dict[str, Row] = {row.name: row for row in rows}
    assert rows[0].name == PAPER and rows[0].over_paper is None
    assert by_name["entropy behind the cut"].agreement.kendall.value == pytest.approx(1)
    assert by_name["made up"].agreement.spearman.value == pytest.approx(-1)
    assert by_name["all parameters"].scores.tolist() == [a.parameters for a in models]
    over = by_name["entropy behind the cut"].over_paper
    assert over is not None and over.spearman.low > 0
    raw = by_name["raw entropy"].scores
    assert (raw >= by_name[PAPER].scores).all() and (raw > by_name[PAPER].scores).any()


def test_scores_tell_models_of_like_size_apart_or_not(models: list[Architecture]) -> None:
    """Losses depend on parameters and the cut here. Parameters rank all models well, but not those of one size."""
    truth = np.array([decoder_parameters(a) * narrowest_cut(a) for a in models], float)
    found = {row.name: row.agreement for row in table(trained_by(models, truth))}["decoder parameters"]
    assert found.alike is not None and found.kendall.value > found.alike.value + 0.1
    pairs = like_size(models, 1.5)
    assert not pairs.diagonal().any() and (pairs == pairs.T).all()
    sizes = np.array([decoder_parameters(a) for a in models])
    assert sizes.max() / sizes.min() > 1.5 and pairs[sizes.argmax(), sizes.argmin()] == 0


def test_models_that_cannot_be_compared_are_refused(models: list[Architecture]) -> None:
    whole = trained_by(models, np.array([a.parameters for a in models], float))
    with pytest.raises(InputError, match="twice"):
        table([*whole, whole[0]])
    with pytest.raises(InputError, match="already"):
        table(whole, {PAPER: np.ones(len(models))})
    with pytest.raises(InputError, match="losses"):
        Trained(models[0], ())
    with pytest.raises(InputError, match="losses"):
        Trained(models[0], (math.nan,))


def test_repeatability_is_of_the_seeds(models: list[Architecture]) -> None:
    one = trained_by(models, np.array([a.parameters for a in models], float))
    assert repeatability(one) is None
    twice = [Trained(m.architecture, (m.loss, m.loss + 0.001)) for m in one]
    found = repeatability(twice)
    assert found is not None and found.spearman.value == pytest.approx(1)


# --- the report ------------------------------------------------------------------------------------


def test_the_report_says_what_the_table_says(models: list[Architecture], tmp_path: object) -> None:
    trained = trained_by(models, np.array([effective().total(a) for a in models]), 0.3)
    rows = table(trained, {"a|b": np.arange(len(models))})
    lines = report.scores_table(rows).splitlines()
    assert len(lines) == 2 + len(rows) and len({line.replace("\\|", "").count("|") for line in lines}) == 1
    first = rows[0].agreement.spearman
    assert f"{first.value:.3f} [{first.low:.3f}, {first.high:.3f}]" in lines[2]
    fields = report.document(trained, rows)
    assert fields["scores"][0]["agreement"]["spearman"]["value"] == first.value
    assert [m["losses"] for m in fields["models"]] == [list(m.losses) for m in trained]
    assert report.agreement_fields(Agreement(first, first)) == {
        "spearman": first._asdict(),
        "kendall": first._asdict(),
    }


def test_the_figure_is_drawn(models: list[Architecture], tmp_path) -> None:  # type: ignore[no-untyped-def]
    trained = trained_by(models, np.array([effective().total(a) for a in models]), 0.3)
    report.figure(trained, table(trained), tmp_path / "figure.png")
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
