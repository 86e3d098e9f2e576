"""Sampling has the support and the probabilities of Hugging Face's processors, and samples from them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from merino_edge.errors import ArtefactError, InputError
from merino_edge.runtime.sampling import FEW, MANY, Sampler, adjusted, distribution
from merino_edge.runtime.sampling_parameters import Sampling

SAMPLINGS = st.builds(
    Sampling,
    temperature=st.floats(0.05, 5),
    top_k=st.integers(0, 60),
    top_p=st.one_of(st.just(1.0), st.floats(0, 1)),
    min_p=st.one_of(st.just(0.0), st.floats(0, 1)),
    typical_p=st.one_of(st.just(1.0), st.floats(0.01, 0.99)),
    repetition_penalty=st.one_of(st.just(1.0), st.floats(0.5, 3)),
    logit_bias=st.dictionaries(st.integers(0, 1), st.floats(-100, 100)),
)


def reference(logits: np.ndarray, context_ids: list[int], sampling: Sampling) -> np.ndarray:
    """Probabilities [V] of transformers: bias and penalty in the model's float32, the filters in float64."""
    ids, scores = torch.tensor([context_ids], dtype=torch.long), torch.from_numpy(logits)[None]
    if sampling.logit_bias:
        biased = [[[token], float(bias)] for token, bias in sampling.logit_bias.items()]
        scores = SequenceBiasLogitsProcessor(biased)(ids, scores)
    if sampling.repetition_penalty != 1:
        scores = RepetitionPenaltyLogitsProcessor(float(sampling.repetition_penalty))(ids, scores)
    processors = LogitsProcessorList([TemperatureLogitsWarper(float(sampling.temperature))])
    if sampling.top_k:
        processors.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        processors.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        processors.append(MinPLogitsWarper(sampling.min_p))
    if sampling.typical_p < 1:
        processors.append(TypicalLogitsWarper(sampling.typical_p))
    return processors(ids, scores.double()).softmax(-1)[0].numpy()


def dense(logits: np.ndarray, context_ids: list[int], sampling: Sampling) -> np.ndarray:
    ids, likely = distribution(adjusted(logits, context_ids, (), sampling), sampling)
    result = np.zeros(logits.size)
    result[ids] = likely
    return result


@settings(max_examples=200, deadline=None)
@given(SAMPLINGS, st.one_of(st.integers(2, 200), st.integers(MANY, 2 * MANY)), st.integers(0, 2**32 - 1))
def test_support_and_probabilities_are_those_of_transformers(sampling: Sampling, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    logits = (rng.standard_normal(size) * 4).astype(np.float32)
    context_ids = rng.integers(size, size=10).tolist()
    expected, got = reference(logits, context_ids, sampling), dense(logits, context_ids, sampling)
    assert (got > 0).tolist() == (expected > 0).tolist()
    np.testing.assert_allclose(got, expected, rtol=1e-9)


def test_ties_at_the_kth_place_all_stay() -> None:
    logits = np.array([3, 1, 2, 2, 2, 0], np.float32)
    sampling = Sampling(temperature=0.7, top_k=2, top_p=1)
    ids, _ = distribution(logits, sampling)
    assert ids.tolist() == [0, 2, 3, 4] == np.flatnonzero(reference(logits, [], sampling)).tolist()


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(temperature=1, top_k=0, top_p=1, seed=0),
        Sampling(temperature=1.7, top_k=12, top_p=0.9, min_p=0.05, repetition_penalty=1.3, seed=1),
    ],
)
def test_draws_follow_the_distribution(sampling: Sampling) -> None:
    logits = (np.random.default_rng(2).standard_normal(40) * 1.5).astype(np.float32)
    context_ids = [3, 3, 7, 11]
    expected = reference(logits, context_ids, sampling)
    sampler = Sampler(sampling)
    draws = 20_000
    counts = np.bincount([sampler(logits, context_ids) for _ in range(draws)], minlength=40)
    likely = expected * draws >= 5  # the usual condition for a chi-squared test
    rest = counts[~likely].sum(), expected[~likely].sum() * draws
    assert counts[expected == 0].sum() == 0
    observed, wanted = [*counts[likely], rest[0]], [*(expected[likely] * draws), rest[1]]
    if rest[1] == 0:
        observed, wanted = observed[:-1], wanted[:-1]
    assert chisquare(observed, wanted).pvalue > 1e-3


def test_greedy_and_temperature_zero_take_the_most_likely_after_the_penalty() -> None:
    logits = np.array([1.0, 4.0, 3.0, -1.0], np.float32)
    for sampling in (Sampling(greedy=True), Sampling(temperature=0)):
        assert Sampler(sampling)(logits, []) == 1
    assert Sampler(Sampling(greedy=True, repetition_penalty=2))(logits, [1, 1]) == 2
    assert logits.tolist() == [1.0, 4.0, 3.0, -1.0]  # the engine's buffer is unchanged


def test_a_seed_gives_its_sequence_and_no_seed_a_new_one() -> None:
    logits = np.zeros(1000, np.float32)

    def draw(seed: int | None) -> tuple[int, list[int]]:
        sampler = Sampler(Sampling(seed=seed, top_k=0))
        return sampler.seed, [sampler(logits, []) for _ in range(10)]

    assert draw(7) == draw(7)
    seed, tokens = draw(None)
    assert draw(seed) == (seed, tokens)
    assert draw(None)[1] != tokens


@pytest.mark.parametrize("top_k", [0, 1, 2, 40])
@pytest.mark.parametrize("size", [50, 5000])
def test_tokens_of_probability_zero_are_never_sampled(size: int, top_k: int) -> None:
    logits = np.full(size, -np.inf, np.float32)
    logits[[4, 9]] = 0
    sampler = Sampler(Sampling(top_k=top_k, top_p=1, seed=0))
    assert {sampler(logits, []) for _ in range(200)} == {4, 9}


@settings(max_examples=50, deadline=None)
@given(frequency=st.floats(-2, 2), presence=st.floats(-2, 2), answer=st.lists(st.integers(0, 19), max_size=40))
def test_frequency_and_presence_penalties_apply_to_tokens_of_the_answer(
    frequency: float, presence: float, answer: list[int]
) -> None:
    logits = np.random.default_rng(0).standard_normal(20).astype(np.float32)
    sampling = Sampling(frequency_penalty=frequency, presence_penalty=presence)
    got = adjusted(logits, [1, 2, 3, *answer], answer, sampling)
    # https://platform.openai.com/docs/api-reference/chat/create: logit - count * frequency - (count > 0) * presence
    expected = [logits[t] - answer.count(t) * frequency - (answer.count(t) > 0) * presence for t in range(20)]
    np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-5)


def test_a_bias_for_an_unknown_token_is_refused() -> None:
    with pytest.raises(InputError, match="token 8"):
        Sampler(Sampling(logit_bias={8: 1.0}))(np.zeros(8, np.float32), [])


@settings(max_examples=60, deadline=None)
@given(size=st.integers(2, 6000), k=st.integers(1, 60), values=st.sampled_from((3, 50, 10**6)), seed=st.integers(0, 99))
def test_the_top_k_of_a_large_vocabulary_are_found_without_sorting_it(
    size: int, k: int, values: int, seed: int
) -> None:
    k = min(k, size - 1)
    logits = np.random.default_rng(seed).integers(values, size=size).astype(np.float32)  # few values: many ties
    logits[: size // 3] = -np.inf
    ids, _ = distribution(logits, Sampling(temperature=100.0, top_k=k, top_p=1))
    np.testing.assert_array_equal(ids, np.flatnonzero(logits >= np.sort(logits)[-k]))


@settings(max_examples=300, deadline=None)
@given(
    size=st.integers(1, 5000),
    k=st.integers(1, FEW),
    top_p=st.sampled_from([0.0, 0.3, 0.95, 1.0]),
    temperature=st.sampled_from([1e-300, 0.01, 0.5, 1.0, 30.0]),
    values=st.sampled_from([2, 40, 10**6]),
    seed=st.integers(0, 999),
)
def test_few_candidates_are_sampled_like_many(
    size: int, k: int, top_p: float, temperature: float, values: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    logits = (10 * rng.integers(values, size=size) / values).astype(np.float32)
    logits[1 : size // 2] = -np.inf
    sampling = Sampling(temperature, k, top_p, seed=seed)
    ids, likely = distribution(logits, sampling)
    few, expected = Sampler(sampling), np.random.default_rng(seed)
    for draw in expected.random(70):
        token = few(logits, [])
        index = int(np.flatnonzero(ids == token)[0])
        before = likely[:index].sum()
        assert before - 1e-12 <= draw < before + likely[index] + 1e-12


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("index", [3, -1])
@pytest.mark.parametrize("size", [8, 5000, 5024])
@pytest.mark.parametrize("sampling", [Sampling(greedy=True), Sampling(), Sampling(top_k=0), Sampling(min_p=0.1)])
def test_a_broken_model_is_refused(bad: float, index: int, size: int, sampling: Sampling) -> None:
    logits = np.zeros(size, np.float32)
    logits[index] = bad
    with pytest.raises(ArtefactError, match=f"logits of {bad}"):
        Sampler(sampling)(logits, [])
    with pytest.raises(ArtefactError, match="logits of -inf"):
        Sampler(sampling)(np.full(size, -np.inf, np.float32), [])


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", math.nan),
        ("temperature", True),
        ("top_k", -1),
        ("top_k", 1.5),
        ("top_p", 1.1),
        ("top_p", "0.5"),
        ("min_p", -0.01),
        ("repetition_penalty", 0.0),
        ("typical_p", -0.1),
        ("frequency_penalty", 2.1),
        ("presence_penalty", math.nan),
        ("logit_bias", {-1: 0.0}),
        ("logit_bias", {3: math.inf}),
        ("seed", -1),
        ("seed", "1"),
        ("temperature", None),
        ("top_k", "40"),
        ("logit_bias", None),
        ("logit_bias", [3]),
        ("logit_bias", {"3": 1.0}),
        ("logit_bias", {3: "1"}),
        ("greedy", "yes"),
        ("greedy", 1),
        ("greedy", None),
    ],
)
def test_values_out_of_range_are_refused_by_name(name: str, value: object) -> None:
    with pytest.raises(InputError, match=name):
        Sampling(**{name: value})  # type: ignore[arg-type]
