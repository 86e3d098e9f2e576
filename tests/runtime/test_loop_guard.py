"""Loops in answers: what repeats gets less likely, nothing else changes, and end tokens keep their likelihood."""

from __future__ import annotations

import dataclasses
import random
from typing import Any

import numpy as np
import pytest

from merino_edge.runtime.engine import Candidates, Engine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.grammar import Grammars
from merino_edge.runtime.loop_guard import GROWTH, LARGEST, LEAST, LONGEST, MOST_PLACES, LoopGuard
from merino_edge.runtime.sampling import Sampler, adjusted
from merino_edge.runtime.sampling_parameters import LOOP_PENALTY, Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer

WARM = Sampling(temperature=0.1, seed=1)


class Circle:
    """An engine that says 10, 11, 12, 13, 10 and so on, unless something else gets likelier."""

    max_positions, max_rows, prompt_grid, vocab_size = 320, 8, 1, 320
    narrow_steps = 0

    def forward_rows(self, tokens: np.ndarray, start: int, rows: int) -> np.ndarray:
        logits = np.random.default_rng(0).random((rows, self.vocab_size)).astype(np.float32)
        logits[np.arange(rows), 10 + (tokens[-rows:] + 3) % 4] += 2
        return logits

    def forward(self, tokens: np.ndarray, start: int) -> np.ndarray:
        return self.forward_rows(tokens, start, 1)[0]

    def mark_filled(self, positions: int) -> None: ...

    def close(self) -> None: ...


class NarrowCircle(Circle):
    """The same, with the largest logits alone."""

    def forward_topk(self, tokens: np.ndarray, start: int, k: int) -> Candidates:
        self.narrow_steps += 1
        row = self.forward(tokens, start)
        ids = np.sort(np.argsort(-row, kind="stable")[:k])
        return Candidates(row[ids], ids)


def slow(tokens: list[int], strength: float) -> dict[int, float]:
    """The same by its definition: every earlier place is compared."""
    places = [end for end in range(LEAST, len(tokens)) if tokens[end - LEAST : end] == tokens[-LEAST:]]
    found: dict[int, float] = {}
    for end in places[-MOST_PLACES:]:
        agree = LEAST
        while agree < min(end, LONGEST) and tokens[end - agree - 1] == tokens[-agree - 1]:
            agree += 1
        found[tokens[end]] = min(LARGEST, found.get(tokens[end], 0.0) + strength * GROWTH ** (agree - LEAST))
    return found


@pytest.mark.parametrize("seed", range(3))
def test_penalties_are_those_of_the_definition_however_tokens_come(seed: int) -> None:
    rng, guard, acted = random.Random(seed), LoopGuard(0.7), 0
    tokens: list[int] = []
    while len(tokens) < 300:
        tokens += [rng.randrange(3)] if rng.random() < 0.8 else tokens[-rng.randrange(1, 30) :]
        assert guard.penalties(tokens) == guard.penalties(tokens) == pytest.approx(slow(tokens, 0.7))
        acted += bool(guard.penalties(tokens))
    assert acted > 20
    assert LoopGuard(0.0).penalties(tokens) == {} != LoopGuard(0.7).penalties(tokens)


def run(engine: Any, tokenizer: Tokenizer, sampling: Sampling, **more: object) -> Generation:
    made = generate(Session(engine), tokenizer, [7, 8, 9], sampling, 120, **more)  # type: ignore[arg-type]
    list(made)
    return made


def test_a_looping_answer_is_changed_where_it_repeats_and_others_are_not(tokenizer: Tokenizer) -> None:
    free = run(Circle(), tokenizer, dataclasses.replace(WARM, loop_penalty=0.0)).tokens
    guarded = run(Circle(), tokenizer, WARM).tokens
    first = next(i for i in range(len(free)) if LoopGuard(LOOP_PENALTY).penalties(free[:i]))
    assert free != guarded and free[:first] == guarded[:first]
    assert set(free) == {10, 11, 12, 13} and len(set(guarded)) > 20
    greedy = Sampling(greedy=True)
    assert run(Circle(), tokenizer, greedy).tokens == ([10, 11, 12, 13] * 30)[:120]


def test_it_is_on_by_default_only_where_nothing_else_is_asked_for(engine: Engine, tokenizer: Tokenizer) -> None:
    assert Sampling().loop_strength == Sampling(temperature=0.9).loop_strength == LOOP_PENALTY > 0
    off = ({"temperature": 0}, {"greedy": True}, {"repetition_penalty": 1.1}, {"presence_penalty": 0.5})
    assert [Sampling(**fields).loop_strength for fields in off] == [0.0] * len(off)
    assert Sampling(greedy=True, loop_penalty=0.5).loop_strength == 0.5
    form = Grammars(tokenizer, engine.vocab_size).regex("(abc ){20}")
    assert run(engine, tokenizer, WARM, grammar=form).text == "abc " * 20


def test_the_top_of_the_logits_is_enough_where_nothing_repeats(tokenizer: Tokenizer) -> None:
    narrow = NarrowCircle()
    assert run(narrow, tokenizer, WARM).tokens == run(Circle(), tokenizer, WARM).tokens
    assert 0 < narrow.narrow_steps < 119


def test_end_tokens_keep_their_likelihood() -> None:
    logits, context = np.array([2.0, -2.0, 1.0, 3.0], np.float32), [0, 1, 1, 3]
    penalty = Sampling(repetition_penalty=2.0)
    assert adjusted(logits, context, [], penalty).tolist() == [1, -4, 1, 1.5]
    assert adjusted(logits, context, [], penalty, np.array([0, 1, 9])).tolist() == [2, -2, 1, 1.5]
    repeated = [3, 0, 2, 1] * 5
    greedy = Sampling(greedy=True, loop_penalty=9.0)
    ending = Sampler(greedy, end_ids=[3])
    assert Sampler(greedy)(logits, [], repeated) == 0 and ending(logits, [], repeated) == 3
