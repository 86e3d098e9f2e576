"""Guesses change how many steps an answer takes, and nothing else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Generation, Session, generate
from merino_edge.runtime.lookup import LENGTHS, NGRAMS, STALE_STEPS, Drafter, PromptLookup
from merino_edge.runtime.sampling import Sampling
from merino_edge.tokenizer import Tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog. The quick"

FEW = dict.fromkeys((70, 71, 72), 20.0)  # a text of three tokens repeats itself


@given(ids=st.lists(st.integers(0, 3), max_size=60), most=st.integers(1, 8))
def test_a_guess_is_what_followed_the_longest_run_that_came_before(ids: list[int], most: int) -> None:
    lookup = PromptLookup()
    for token in ids:
        lookup.push(token)
    expected: list[int] = []
    for n in NGRAMS:
        places = [end for end in range(n, len(ids)) if ids[end - n : end] == ids[len(ids) - n :]]
        if places:
            expected = ids[places[-1] : places[-1] + most]
            break
    assert lookup.guess(most) == expected


def drafter_after(step_s: dict[int, float], right: float, tokens: int = 2000, seed: int = 0) -> tuple[Drafter, float]:
    """A drafter on a text whose guesses are right so often, on a machine whose steps take so long; tokens a second."""
    rng, drafter, seconds = np.random.default_rng(seed), Drafter(range(8)), 0.0
    known = list(range(8))
    done = 0
    while done < tokens:
        guess = drafter.draft(7)
        drafter.ran(1 + len(guess), step_s[1 + len(guess)])
        seconds += step_s[1 + len(guess)]
        for place in range(1 + len(guess)):
            expected = (known[-1] + 1) % 8
            token = expected if rng.random() < right else int(rng.integers(8))
            known.append(token)
            drafter.push(token)
            done += 1
            if place == len(guess) or token != guess[place]:
                break
    return drafter, done / seconds


CHEAP = {1: 1.0, 2: 1.05, 4: 1.2, 8: 1.5}  # s: reading the weights is what takes time
DEAR = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}  # arithmetic is


@pytest.mark.parametrize(
    ("step_s", "right", "least", "most"), [(CHEAP, 0.95, 2.5, 6), (CHEAP, 0.0, 0.93, 1.1), (DEAR, 0.95, 0.93, 1.1)]
)
def test_it_guesses_where_that_pays_and_leaves_off_where_it_does_not(
    step_s: dict[int, float], right: float, least: float, most: float
) -> None:
    """A step alone takes a second, so tokens a second are the gain."""
    _, gain = drafter_after(step_s, right)
    assert least < gain < most


def test_a_length_that_was_slow_once_is_tried_again() -> None:
    drafter, _ = drafter_after(DEAR, 1.0, tokens=400)
    drafter.hit_rate = 1.0
    tried = set()
    for token in range(4 * STALE_STEPS):
        guess = drafter.draft(7)
        tried.add(len(guess))
        drafter.ran(1 + len(guess), DEAR[1 + len(guess)])
        drafter.push((token + 400) % 8)
    assert tried & set(LENGTHS)


# --- through the real engine ---


def answer(engine: Engine, tokenizer: Tokenizer, sampling: Sampling, lookup: bool, **more: object) -> Generation:
    made = generate(Session(engine), tokenizer, tokenizer.encode(PROMPT), sampling, lookup=lookup, **more)  # type: ignore[arg-type]
    for _ in made:
        pass
    return made


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be guessed is."""
    monkeypatch.setattr(Drafter, "_tokens_per_second", lambda self, length: float(length + 1))


def outcome(made: Generation) -> tuple[object, ...]:
    return made.tokens, made.text, made.finish_reason, made.statistics.generated_tokens


@pytest.mark.usefixtures("eager")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    seed=st.integers(0, 2**32 - 1),
    temperature=st.sampled_from([0.0, 0.3, 1.0]),
    max_tokens=st.integers(1, 120),
    penalty=st.sampled_from([1.0, 1.2]),
    stop=st.sampled_from([(), ("o",), ("the",)]),
    bias=st.sampled_from([{}, FEW]),
)
def test_an_answer_is_the_same_with_and_without_guesses(
    engine: Engine,
    tokenizer: Tokenizer,
    seed: int,
    temperature: float,
    max_tokens: int,
    penalty: float,
    stop: tuple[str, ...],
    bias: dict[int, float],
) -> None:
    sampling = Sampling(temperature, 0, 1.0, repetition_penalty=penalty, seed=seed, logit_bias=bias)
    plain = answer(engine, tokenizer, sampling, False, max_tokens=max_tokens, stop=stop)
    guessed = answer(engine, tokenizer, sampling, True, max_tokens=max_tokens, stop=stop)
    assert outcome(guessed) == outcome(plain)
    assert plain.statistics.guessed_tokens == 0


@pytest.mark.usefixtures("eager")
def test_guesses_are_run_and_some_are_right_up_to_the_end_of_the_context(engine: Engine, tokenizer: Tokenizer) -> None:
    greedy = Sampling(temperature=1, seed=2, logit_bias=FEW)
    plain = answer(engine, tokenizer, greedy, False, max_tokens=1000)
    guessed = answer(engine, tokenizer, greedy, True, max_tokens=1000)
    assert outcome(guessed) == outcome(plain) and plain.finish_reason == "context"
    s = guessed.statistics
    assert 0 < s.right_guesses <= s.guessed_tokens


@pytest.mark.usefixtures("eager")
def test_the_next_turn_finds_only_what_was_said_in_the_cache(engine: Engine, tokenizer: Tokenizer) -> None:
    """Keys of wrong guesses lie in the cache behind the answer: the session must not take them for text."""
    session, ids = Session(engine), tokenizer.encode(PROMPT)
    first = generate(session, tokenizer, ids, Sampling(greedy=True), 50, lookup=True)
    for _ in first:
        pass
    assert session.ids == (ids + first.tokens)[: len(session.ids)]
    longer = ids + first.tokens + tokenizer.encode(" And then")
    again = generate(session, tokenizer, longer, Sampling(greedy=True), 30, lookup=True)
    fresh = generate(Session(engine), tokenizer, longer, Sampling(greedy=True), 30, lookup=False)
    assert "".join(again) == "".join(fresh) and again.tokens == fresh.tokens


@pytest.mark.parametrize("count", [1, 2, 16])
def test_rows_of_a_step_are_those_of_single_steps(engine: Engine, count: int) -> None:
    ids = np.random.default_rng(count).integers(engine.vocab_size, size=40 + count)
    engine.forward(ids[:40], 0)
    single = [engine.forward(ids[i : i + 1], i).copy() for i in range(40, 40 + count)]
    engine.forward(ids[:40], 0)
    np.testing.assert_allclose(engine.forward_rows(ids[40:], 40, count), single, rtol=1e-4, atol=1e-5)
    assert engine.forward(ids[40:], 40).shape == (engine.vocab_size,)


@pytest.mark.parametrize(("tokens", "rows"), [(4, 0), (4, 5), (17, 17), (300, -1)])
def test_rows_that_cannot_be_are_refused(engine: Engine, tokens: int, rows: int) -> None:
    with pytest.raises(InputError, match="rows of logits"):
        engine.forward_rows(np.zeros(tokens, np.int64), 0, rows)
