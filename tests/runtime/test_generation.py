"""Generation with a real engine: cached == uncached == PyTorch, streamed == batched, and all finish reasons."""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.same_engine import SameEngine
from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.open_bundle import open_engine
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import PREFILL_CHUNK, Session
from merino_edge.tokenizer import Tokenizer

GREEDY = Sampling(greedy=True)
PROMPT = "The quick brown"
Weights = dict[str, np.ndarray]


def run(generation: Generation) -> list[str]:
    return list(generation)


def test_greedy_tokens_are_those_of_pytorch_without_a_cache(
    engine: Engine, tokenizer: Tokenizer, small_model: tuple[Architecture, Weights]
) -> None:
    torch = pytest.importorskip("torch")
    from merino_edge.pytorch.model import Model

    ids = tokenizer.encode(PROMPT)
    generation = generate(Session(engine), tokenizer, ids, GREEDY, max_tokens=40)
    run(generation)
    with torch.no_grad():
        logits = Model.from_weights(*small_model)(torch.tensor([ids + generation.tokens]))[0]  # [T, V]
    assert generation.tokens == logits.argmax(-1)[len(ids) - 1 : -1].tolist()
    assert len(set(generation.tokens)) > 5  # the model does not just repeat itself


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32 - 1), max_tokens=st.integers(1, 60))
def test_streamed_text_is_the_decoded_tokens(engine: Engine, tokenizer: Tokenizer, seed: int, max_tokens: int) -> None:
    sampling = Sampling(temperature=2, top_k=0, top_p=1, seed=seed)
    generation = generate(Session(engine), tokenizer, tokenizer.encode(PROMPT), sampling, max_tokens)
    pieces = run(generation)
    assert "".join(pieces) == generation.text == tokenizer.decode(generation.tokens)
    assert "" not in pieces
    assert (generation.finish_reason, len(generation.tokens)) == ("length", max_tokens)


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lengths=st.lists(st.tuples(st.integers(0, 320), st.integers(1, 320)), min_size=2, max_size=4))
def test_a_reused_prefix_changes_nothing(engine: Engine, lengths: list[tuple[int, int]]) -> None:
    """Runs prompts in one session, each of which shares a prefix with the one before."""
    rng, session = np.random.default_rng(0), Session(engine)
    ids: list[int] = []
    for shared, length in lengths:
        fresh = rng.integers(engine.vocab_size, size=length).tolist()
        ids = [*ids[:shared], *fresh][:320]
        logits = session.prefill(ids)
        assert logits is not None
        reused = logits.copy()
        assert session.ids == ids
        expected = Session(SameEngine(engine)).prefill(ids)
        assert expected is not None
        np.testing.assert_allclose(reused, expected, rtol=1e-4, atol=1e-4)


def test_only_what_is_new_is_run(engine: Engine, tokenizer: Tokenizer) -> None:
    session, ids = Session(engine), tokenizer.encode(PROMPT)
    first = generate(session, tokenizer, ids, GREEDY, max_tokens=8)
    run(first)
    assert first.statistics.reused_tokens == 0
    longer = [*ids, *first.tokens, *tokenizer.encode(" fox")]
    second = generate(session, tokenizer, longer, GREEDY, max_tokens=8)
    run(second)
    # What ran one by one, as an answer, runs again as a prompt.
    assert second.statistics.reused_tokens == len(ids) // 2 * 2
    again = generate(session, tokenizer, longer, GREEDY, max_tokens=8)
    run(again)
    assert again.statistics.reused_tokens == (len(longer) - 1) // 2 * 2
    assert again.tokens == second.tokens


def test_an_end_token_stops_and_is_not_part_of_the_answer(engine: Engine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    free = generate(Session(engine), tokenizer, ids, GREEDY, max_tokens=40)
    run(free)
    at = max(free.tokens.index(token) for token in set(free.tokens))  # a token that first occurs late
    ending = Tokenizer(tokenizer.backend, dataclasses.replace(tokenizer.chat, eos_token_ids=(free.tokens[at],)))
    ended = generate(Session(engine), ending, ids, GREEDY, max_tokens=40)
    run(ended)
    assert (ended.finish_reason, ended.tokens) == ("stop", free.tokens[:at])
    assert ended.statistics.generated_tokens == at + 1


def test_a_stop_string_cuts_the_answer_before_it(engine: Engine, tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode(PROMPT)
    free = generate(Session(engine), tokenizer, ids, GREEDY, max_tokens=40)
    run(free)
    stop = free.text[10:13]
    ended = generate(Session(engine), tokenizer, ids, GREEDY, max_tokens=40, stop=["not there", stop])
    pieces = run(ended)
    assert "".join(pieces) == ended.text == free.text[: free.text.index(stop)]
    assert ended.finish_reason == "stop"
    assert len(ended.tokens) < 40


def test_the_same_seed_gives_the_same_answer_and_is_reported(engine: Engine, tokenizer: Tokenizer) -> None:
    def answer(seed: int | None) -> Generation:
        sampling = Sampling(temperature=1.5, top_k=0, top_p=1, seed=seed)
        generation = generate(Session(engine), tokenizer, tokenizer.encode(PROMPT), sampling, max_tokens=30)
        run(generation)
        return generation

    unseeded = answer(None)
    assert answer(unseeded.seed).tokens == unseeded.tokens
    assert answer(1).tokens != answer(2).tokens


@pytest.mark.parametrize("free_positions", [0, 1, 5])
def test_a_full_context_ends_the_answer(engine: Engine, tokenizer: Tokenizer, free_positions: int) -> None:
    ids = [5] * (engine.max_positions - free_positions)
    generation = generate(Session(engine), tokenizer, ids, GREEDY, max_tokens=100)
    run(generation)
    # Each token but the last takes a position in the cache.
    assert (generation.finish_reason, len(generation.tokens)) == ("context", free_positions + 1)


@pytest.mark.parametrize("after", [1, 4])
def test_cancelling_takes_effect_within_one_token(engine: Engine, tokenizer: Tokenizer, after: int) -> None:
    cancel = threading.Event()
    generation = generate(Session(engine), tokenizer, tokenizer.encode(PROMPT), GREEDY, 40, cancel=cancel)
    for _ in range(after):
        next(generation)
    count = len(generation.tokens)
    cancel.set()
    run(generation)
    assert (generation.finish_reason, len(generation.tokens)) == ("cancelled", count)
    assert generation.text == tokenizer.decode(generation.tokens)


def test_closing_ends_the_answer_and_the_session_goes_on(engine: Engine, tokenizer: Tokenizer) -> None:
    session, ids = Session(engine), tokenizer.encode(PROMPT)
    generation = generate(session, tokenizer, ids, GREEDY, max_tokens=40)
    first = next(generation)
    generation.close()
    assert (generation.finish_reason, generation.text, run(generation)) == ("cancelled", first, [])
    unstarted = generate(session, tokenizer, ids, GREEDY)
    unstarted.close()
    assert (unstarted.finish_reason, unstarted.tokens) == ("cancelled", [])
    resumed, fresh = (
        generate(s, tokenizer, ids, GREEDY, max_tokens=20) for s in (session, Session(SameEngine(engine)))
    )
    run(resumed)
    run(fresh)
    assert resumed.tokens == fresh.tokens


def test_cancelling_during_a_long_prompt_keeps_what_was_run(engine: Engine, tokenizer: Tokenizer) -> None:
    """The flag is checked between chunks of the prompt."""

    class AfterOne(threading.Event):
        looks = 0

        def is_set(self) -> bool:
            self.looks += 1
            return self.looks > 1

    session, ids = Session(engine), [7] * 300
    generation = generate(session, tokenizer, ids, GREEDY, cancel=AfterOne())
    assert run(generation) == []
    assert (generation.finish_reason, len(session.ids)) == ("cancelled", PREFILL_CHUNK)
    whole = generate(session, tokenizer, ids, GREEDY, max_tokens=3)
    run(whole)
    assert whole.statistics.reused_tokens == PREFILL_CHUNK


def test_bad_input_is_refused_before_anything_runs(engine: Engine, tokenizer: Tokenizer) -> None:
    session = Session(engine)
    with pytest.raises(InputError, match=r"321 tokens, the context of this bundle is 320.*--context"):
        generate(session, tokenizer, [1] * 321, GREEDY)
    with pytest.raises(InputError, match="empty"):
        generate(session, tokenizer, [], GREEDY)
    with pytest.raises(InputError, match="outside 0 to"):
        generate(session, tokenizer, [engine.vocab_size], GREEDY)
    with pytest.raises(InputError, match="max_tokens"):
        generate(session, tokenizer, [1], GREEDY, max_tokens=0)
    assert session.ids == []


def test_a_model_that_computes_nan_is_refused(
    small_model: tuple[Architecture, Weights], make_bundle: Callable[[Weights], Path]
) -> None:
    _, weights = small_model
    path = make_bundle({**weights, "final_norm.weight": np.full_like(weights["final_norm.weight"], np.nan)})
    engine, tokenizer, _ = open_engine(path, threads=1)
    with pytest.raises(ArtefactError, match="nan"):
        next(generate(Session(engine), tokenizer, [1, 2], GREEDY))
    engine.close()


@pytest.mark.parametrize("threads", [0, -1, 10**6])
def test_an_absurd_number_of_threads_is_refused(bundle_path: Path, threads: int) -> None:
    with pytest.raises(InputError, match="threads"):
        open_engine(bundle_path, threads)
