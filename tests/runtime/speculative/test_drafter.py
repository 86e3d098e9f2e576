"""Guesses change how many steps an answer takes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from merino_edge import bundle
from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine, Logits
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.sampling import Sampler, Sampling, adjusted, distribution
from merino_edge.runtime.session import Session
from merino_edge.runtime.speculative import drafter as drafters
from merino_edge.runtime.speculative.draft_model import DraftModel
from merino_edge.runtime.speculative.drafter import LENGTHS, STALE_STEPS, Drafter, Proposer
from merino_edge.runtime.speculative.prompt_lookup import PromptLookup
from merino_edge.tokenizer import Tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog. The quick"

ROUNDING = 1e-6  # of a probability, by which steps of one token and of several differ
FEW = dict.fromkeys((70, 71, 72), 20.0)  # a text of three tokens repeats itself


def drafter_after(step_s: dict[int, float], right: float, tokens: int = 2000, seed: int = 0) -> tuple[Drafter, float]:
    """A drafter on a text whose guesses are right so often, on a machine whose steps take so long; tokens a second."""
    rng, drafter, seconds = np.random.default_rng(seed), Drafter(PromptLookup()), 0.0
    drafter.begin(range(8))
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
    drafter.acceptance_rate = 1.0
    tried = set()
    for token in range(4 * STALE_STEPS):
        guess = drafter.draft(7)
        tried.add(len(guess))
        drafter.ran(1 + len(guess), DEAR[1 + len(guess)])
        drafter.push((token + 400) % 8)
    assert tried & set(LENGTHS)


def test_a_guess_that_takes_time_is_worth_it_only_where_it_takes_little(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(drafters, "perf_counter", lambda: now[0])

    class Clock(PromptLookup):
        """Always right, after so many seconds a token."""

        free = False

        def __init__(self, guess_s: float) -> None:
            super().__init__()
            self.guess_s = guess_s

        def propose(self, most: int) -> list[int]:
            now[0] += most * self.guess_s
            return [0] * most

    for guess_s, pays in ((0.1, True), (2.0, False)):
        drafter = Drafter(Clock(guess_s))
        drafter.begin([0])
        lengths = []
        for _ in range(60):
            guess = drafter.draft(7)
            lengths.append(len(guess))
            drafter.ran(1 + len(guess), CHEAP[1 + len(guess)])
            for _ in range(1 + len(guess)):
                drafter.push(0)
        assert (lengths[-20:] == [7] * 20) if pays else (lengths[-20:] == [0] * 20)


# --- through the real engine ---


@pytest.fixture(params=["lookup", "itself", "another", "short"])
def proposer(
    request: pytest.FixtureRequest,
    bundle_path: Path,
    make_bundle: Callable[..., Path],
    small_model: tuple[Architecture, dict[str, np.ndarray]],
) -> Iterator[Proposer]:
    """Prompt lookup, or a draft model: the model itself, one that is nearly always wrong, one of a short context."""
    if request.param == "lookup":
        yield PromptLookup()
        return
    others = {
        "itself": bundle_path,
        "another": make_bundle({name: np.flip(array, 0) for name, array in small_model[1].items()}),
        "short": make_bundle(small_model[1], context=100),
    }
    with closing(DraftModel.open(others[request.param], bundle.load(bundle_path), threads=1)) as opened:
        yield opened


def answer(
    engine: Engine, tokenizer: Tokenizer, sampling: Sampling, proposer: Proposer | None, **more: object
) -> Generation:
    made = generate(Session(engine), tokenizer, tokenizer.encode(PROMPT), sampling, proposer=proposer, **more)  # type: ignore[arg-type]
    for _ in made:
        pass
    return made


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever can be guessed is."""
    monkeypatch.setattr(Drafter, "_tokens_per_second", lambda self, length: float(length + 1))


class Chances(Sampler):
    """Draws as ever, and keeps how near to another token each draw came: what rounding may turn over."""

    nearest: list[float]

    def __call__(self, logits: Logits, history: Sequence[int], answer: Sequence[int] = ()) -> int:
        sampling = self.sampling
        _, likely = distribution(
            adjusted(logits, history, answer, sampling), replace(sampling, temperature=sampling.temperature or 1.0)
        )
        if sampling.temperature:
            draw = self._draw()
            self._drawn.append(draw)
            self.nearest.append(float(np.abs(likely.cumsum() - draw).min()))
        else:
            second, first = np.partition(likely, -2)[-2:]
            self.nearest.append(float(first - second))
        return super().__call__(logits, history, answer)


@pytest.fixture
def nearest(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Of every token of every answer."""
    monkeypatch.setattr(Chances, "nearest", found := list[float](), raising=False)
    monkeypatch.setattr("merino_edge.runtime.generation.Sampler", Chances)
    return found


def outcome(made: Generation) -> tuple[object, ...]:
    return made.tokens, made.text, made.finish_reason, made.statistics.generated_tokens


@pytest.mark.usefixtures("eager")
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(seed=51, temperature=1.0, max_tokens=16, penalty=1.0, stop=(), bias={})  # a draw between two tokens
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
    proposer: Proposer,
    nearest: list[float],
    seed: int,
    temperature: float,
    max_tokens: int,
    penalty: float,
    stop: tuple[str, ...],
    bias: dict[int, float],
) -> None:
    sampling = Sampling(temperature, 0, 1.0, repetition_penalty=penalty, seed=seed, logit_bias=bias)
    nearest.clear()
    plain = answer(engine, tokenizer, sampling, None, max_tokens=max_tokens, stop=stop)
    of_plain = nearest[: len(plain.tokens)]
    guessed = answer(engine, tokenizer, sampling, proposer, max_tokens=max_tokens, stop=stop)
    if (other := [x != y for x, y in zip(plain.tokens, guessed.tokens, strict=False)]) and any(other):
        assert of_plain[other.index(True)] < ROUNDING
    else:
        assert outcome(guessed) == outcome(plain)
    assert plain.statistics.drafted_tokens == 0


@pytest.mark.usefixtures("eager")
def test_guesses_are_run_and_some_are_right_up_to_the_end_of_the_context(
    engine: Engine, tokenizer: Tokenizer, proposer: Proposer, request: pytest.FixtureRequest
) -> None:
    greedy = Sampling(temperature=1, seed=2, logit_bias=FEW)
    plain = answer(engine, tokenizer, greedy, None, max_tokens=1000)
    guessed = answer(engine, tokenizer, greedy, proposer, max_tokens=1000)
    assert outcome(guessed) == outcome(plain) and plain.finish_reason == "context"
    s = guessed.statistics
    assert s.accepted_tokens <= s.drafted_tokens and s.drafted_tokens > 0
    assert (s.accepted_tokens > 0) == (request.node.callspec.params["proposer"] != "another")


@pytest.mark.usefixtures("eager")
def test_the_next_turn_finds_only_what_was_said_in_the_cache(
    engine: Engine, tokenizer: Tokenizer, proposer: Proposer
) -> None:
    """Keys of wrong guesses lie in the cache behind the answer: the session must not take them for text."""
    session, ids = Session(engine), tokenizer.encode(PROMPT)
    first = generate(session, tokenizer, ids, Sampling(greedy=True), 50, proposer=proposer)
    for _ in first:
        pass
    assert session.ids == (ids + first.tokens)[: len(session.ids)]
    longer = ids + first.tokens + tokenizer.encode(" And then")
    again = generate(session, tokenizer, longer, Sampling(greedy=True), 30, proposer=proposer)
    fresh = generate(Session(engine), tokenizer, longer, Sampling(greedy=True), 30)
    assert "".join(again) == "".join(fresh) and again.tokens == fresh.tokens


@pytest.mark.usefixtures("eager")
def test_a_model_that_guesses_for_itself_is_always_right_and_runs_nothing_twice(
    engine: Engine, tokenizer: Tokenizer, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(DraftModel.open(bundle_path, bundle.load(bundle_path), threads=1)) as itself:
        run: list[int] = []
        forward = OnnxEngine.forward_rows

        def counted(self: OnnxEngine, tokens: np.ndarray, start: int, rows: int) -> np.ndarray:
            run.extend([len(tokens)] if self is itself._session.engine else [])
            return forward(self, tokens, start, rows)

        monkeypatch.setattr(OnnxEngine, "forward_rows", counted)
        made = answer(engine, tokenizer, Sampling(greedy=True), itself, max_tokens=80)
    s = made.statistics
    assert s.accepted_tokens == s.drafted_tokens > 60
    assert sum(run) <= s.prompt_tokens + 80 + 80 // 8 + 8  # of every guess of seven, the last one's keys are run later


def test_a_model_of_other_tokens_cannot_guess(
    make_bundle: Callable[..., Path], bundle_path: Path, small_model: tuple[Architecture, dict[str, np.ndarray]]
) -> None:
    other = make_bundle(small_model[1])
    (other / "tokenizer.json").write_text((other / "tokenizer.json").read_text() + " ")
    bundle.write_manifest(other, small_model[0], "fp32", "onnxruntime", small_model[0].max_positions)
    with pytest.raises(InputError, match="has another tokenizer") as refusal:
        DraftModel.open(other, bundle.load(bundle_path))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("count", [1, 2, 16])
def test_rows_of_a_step_are_those_of_single_steps(engine: Engine, count: int) -> None:
    ids = np.random.default_rng(count).integers(engine.vocab_size, size=40 + count)
    engine.forward(ids[:40], 0)
    single = [engine.forward(ids[i : i + 1], i).copy() for i in range(40, 40 + count)]
    engine.forward(ids[:40], 0)
    np.testing.assert_allclose(engine.forward_rows(ids[40:], 40, count), single, rtol=1e-4, atol=1e-5)
    assert engine.forward(ids[40:], 40).shape == (engine.vocab_size,)


@pytest.mark.parametrize(("tokens", "rows"), [(4, 0), (4, 5), (129, 129), (300, -1)])
def test_rows_that_cannot_be_are_refused(engine: Engine, tokens: int, rows: int) -> None:
    with pytest.raises(InputError, match="rows of logits"):
        engine.forward_rows(np.zeros(tokens, np.int64), 0, rows)
