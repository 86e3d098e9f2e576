"""Conformance tests for engines: one suite that the tests of each engine inherit.

A subclass provides two fixtures. `new_engine` opens a new engine of ARCHITECTURE with WEIGHTS at each call.
`tolerance` is the allowed difference between steps of different lengths, relative to the largest logit.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from helpers.random_model import random_model
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.session import Session

CONTEXT = 300  # more than one bucket of ONNX Runtime, more than one chunk of a session's prefill
ARCHITECTURE = Architecture(
    160,
    CONTEXT,
    64,
    32,
    (Block(64, 2, 2, 1, 96, shared=True), Block(96, 1, 3, 3, 64)),
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=32,
    bias="none",
)
TOKENS = np.random.default_rng(0).integers(0, ARCHITECTURE.vocab_size, CONTEXT)
OTHERS = TOKENS[::-1].copy()  # another sequence

WEIGHTS = random_model(ARCHITECTURE)

NewEngine = Callable[[], Engine]


class EngineConformance:
    """Logits are compared with those of a fresh engine that runs the whole sequence at once."""

    @pytest.fixture
    def engine(self, new_engine: NewEngine) -> Iterator[Engine]:
        with contextlib.closing(new_engine()) as engine:
            yield engine

    @pytest.fixture
    def expected(self, new_engine: NewEngine, tolerance: float) -> Iterator[Callable[..., None]]:
        """Asserts that logits [V] are those after `tokens` [T].

        A fresh engine says it, which then runs longer sequences from their start too. It never holds later positions.
        """
        held, opened = 0, contextlib.ExitStack()
        fresh = opened.enter_context(contextlib.closing(new_engine()))

        def check(logits: np.ndarray, tokens: np.ndarray) -> None:
            nonlocal held, fresh
            if len(tokens) < held:
                opened.close()
                fresh = opened.enter_context(contextlib.closing(new_engine()))
            held = len(tokens)
            whole = fresh.forward(tokens, 0)
            assert_allclose(logits, whole, rtol=0, atol=tolerance * np.abs(whole).max())

        with opened:
            yield check

    def test_steps_equal_one_prefill(self, engine: Engine, expected: Callable[..., None]) -> None:
        start = 0
        for length in (1, 1, 7, 1, 246, 1, 1, 42):  # over a bucket's end at 256, to the end of the context
            logits = engine.forward(TOKENS[start : start + length], start)
            start += length
            expected(logits, TOKENS[:start])
        assert start == CONTEXT == engine.max_positions and logits.shape == (engine.vocab_size,)

    def test_after_a_rewind_later_positions_are_forgotten(self, engine: Engine, expected: Callable[..., None]) -> None:
        engine.forward(OTHERS, 0)
        engine.forward(TOKENS[:20], 0)
        engine.forward(OTHERS[:9], 20)
        expected(engine.forward(TOKENS[20:24], 20), TOKENS[:24])
        expected(engine.forward(TOKENS[10:11], 10), TOKENS[:11])

    def test_a_step_gives_the_rows_that_single_steps_give(self, engine: Engine, expected: Callable[..., None]) -> None:
        engine.forward(TOKENS[:30], 0)
        for start, end, wanted in ((30, 36, 4), (36, 37, 1), (37, 45, 8), (45, 47, 2), (40, 46, 6), (46, 48, 1)):
            rows = min(engine.max_rows, wanted)
            logits = engine.forward_rows(TOKENS[start:end], start, rows).copy()
            assert logits.shape == (rows, engine.vocab_size)
            for row in range(rows):
                expected(logits[row], TOKENS[: end + 1 - rows + row])
        for wrong in (0, 7, min(engine.max_rows, 6) + 1):
            with pytest.raises(InputError):
                engine.forward_rows(TOKENS[48:54], 48, wrong)
        expected(engine.forward(TOKENS[48:49], 48), TOKENS[:49])

    def test_a_session_runs_only_what_is_new(self, engine: Engine, expected: Callable[..., None]) -> None:
        session, cancelled = Session(engine), threading.Event()
        for prompt in (TOKENS[:270], TOKENS[:280], TOKENS[:40], np.append(TOKENS[:30], OTHERS[:5])):
            logits = session.prefill(prompt.tolist())
            assert logits is not None and session.ids == prompt.tolist()
            expected(logits, prompt)
        expected(session.step(int(TOKENS[0]))[0], np.append(prompt, TOKENS[0]))
        cancelled.set()
        assert session.prefill(OTHERS.tolist(), cancelled) is None
        logits = session.prefill(TOKENS[:31].tolist())
        assert logits is not None
        expected(logits, TOKENS[:31])

    def test_what_is_refused_changes_nothing(self, engine: Engine, expected: Callable[..., None]) -> None:
        engine.forward(TOKENS[:5], 0)
        for tokens, start in (
            (TOKENS[:1], 6),  # after the first position that is not filled
            (TOKENS[:1], -1),
            (TOKENS[:0], 5),
            (TOKENS[: CONTEXT - 4], 5),  # one beyond the context
        ):
            with pytest.raises(InputError) as refusal:
                engine.forward(tokens, start)
            assert "\n" not in str(refusal.value)
        expected(engine.forward(TOKENS[5:8], 5), TOKENS[:8])
        expected(engine.forward(TOKENS[8:], 8), TOKENS)
        with pytest.raises(InputError):
            engine.forward(TOKENS[:1], CONTEXT)
        expected(engine.forward(TOKENS[-1:], CONTEXT - 1), TOKENS)

    def test_positions_can_be_marked_as_filled(self, engine: Engine, expected: Callable[..., None]) -> None:
        engine.mark_filled(200)
        assert np.isfinite(engine.forward(TOKENS[:1], 200)).all()
        expected(engine.forward(TOKENS[:3], 0), TOKENS[:3])

    def test_two_engines_know_nothing_of_each_other(self, new_engine: NewEngine, engine: Engine) -> None:
        alone = engine.forward(TOKENS[:50], 0).copy()
        with contextlib.closing(new_engine()) as other:
            engine.forward(TOKENS[:49], 0)
            other.forward(OTHERS[:50], 0)
            both = engine.forward(TOKENS[49:50], 49).copy()
            other.forward(TOKENS[:49], 0)
            assert_array_equal(other.forward(TOKENS[49:50], 49), both)
        engine.forward(TOKENS[:50], 0)
        assert_array_equal(engine.forward(TOKENS[:50], 0), alone)

    def test_closed_twice_it_refuses_to_run(self, new_engine: NewEngine) -> None:
        engine = new_engine()
        engine.forward(TOKENS[:2], 0)
        engine.close()
        engine.close()
        with pytest.raises(InputError, match="closed"):
            engine.forward(TOKENS[:1], 0)
