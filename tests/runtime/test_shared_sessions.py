"""Several answers at once: each is the answer that it is alone, bit by bit, whoever joins, leaves or is cancelled."""

from __future__ import annotations

import platform
import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.random_model import random_model
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.export.graph import build_stored, cache_names, save
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.runtime.engine import Row
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.onnx_sequences import OnnxSequences
from merino_edge.runtime.engines.onnx_session import FIRST_WITH_INT8_CACHE, installed_version
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.server.rounds import Rounds
from merino_edge.runtime.session import Session
from merino_edge.runtime.shared_sessions import SharedSessions
from merino_edge.tokenizer import Tokenizer

FORMS = {
    "int4": Target.named("onnxruntime", "int4"),
    "int8": Target.named("onnxruntime", "int8"),
    "fp32": Target.named("onnxruntime", "fp32"),
    "int4 fast": replace(Target.named("onnxruntime", "int4"), fast=True, block=64),
    "int8 cache": replace(Target.named("onnxruntime", "int8"), cache="int8"),
    "primitive": Target.named("onnxruntime", "int8", "primitive"),
    "windows": Target.named("onnxruntime", "int4"),
    "convolutions": Target.named("onnxruntime", "int8"),
}
WINDOW, SEQUENCES = 70, 3


@dataclass
class Opened:
    alone: OnnxEngine
    group: OnnxSequences
    form: str


@pytest.fixture(scope="module", params=FORMS)
def opened(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small_model: tuple[Architecture, dict[str, np.ndarray]],
) -> Iterator[Opened]:
    """The small model at one form, for one sequence and for several."""
    (a, weights), target = small_model, FORMS[request.param]
    if target.cache == "int8" and installed_version() < FIRST_WITH_INT8_CACHE:
        pytest.skip("this ONNX Runtime has no int8 KV cache")
    if request.param == "windows":
        a = replace(a, blocks=tuple(replace(block, window=WINDOW) for block in a.blocks))
    if request.param == "convolutions":  # with query and key norms, as LFM2 has them
        blocks = (Block(64, 2, 2, 1, 64, convolution=3), *a.blocks)
        a = replace(a, blocks=blocks, positions="rotary", rotary_dim=32, qk_norm="head")
        weights = random_model(a)
    path: Path = tmp_path_factory.mktemp("form") / "model.onnx"
    scales = {name: np.float32(0.05) for names in cache_names(a) for name in names[:1]}
    stored = replace(store(a, weights, target), cache_scales=scales if target.cache == "int8" else {})
    save(build_stored(a, stored, target, a.max_positions), path)
    group = OnnxSequences(path, a, a.max_positions, 1, count=SEQUENCES)
    with closing(OnnxEngine(path, a, a.max_positions, 1)) as alone, closing(group):
        yield Opened(alone, group, request.param)


@pytest.fixture
def sessions(opened: Opened) -> SharedSessions:
    for engine in opened.group.members:
        engine.mark_filled(0)
    return SharedSessions(opened.group)


@dataclass(frozen=True)
class Asked:
    """One conversation: its prompt, how it is sampled, in which round it comes, and after how many tokens it leaves."""

    start: int
    length: int
    seed: int
    arrives: int
    tokens: int
    leaves: int


ASKED = st.builds(
    Asked,
    start=st.sampled_from([0, 0, 0, 1, 7]),
    length=st.integers(1, 200),
    seed=st.integers(0, 3),
    arrives=st.integers(0, 12),
    tokens=st.integers(1, 9),
    leaves=st.sampled_from([99, 99, 99, 0, 1, 4]),
)


def begun(opened: Opened, tokenizer: Tokenizer, asked: Asked, session: Session) -> tuple[Generation, threading.Event]:
    text = np.random.default_rng(0).integers(opened.alone.vocab_size, size=300).tolist()
    ids, cancel = text[asked.start : asked.start + asked.length], threading.Event()
    sampling = Sampling(temperature=asked.seed / 2, seed=asked.seed)
    return generate(session, tokenizer, ids, sampling, asked.tokens, cancel=cancel), cancel


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(conversations=st.lists(ASKED, min_size=2, max_size=7))
def test_answers_at_once_are_the_answers_alone(
    opened: Opened, sessions: SharedSessions, tokenizer: Tokenizer, conversations: list[Asked]
) -> None:
    expected = []
    for asked in conversations:
        generation, _ = begun(opened, tokenizer, asked, Session(opened.alone))
        expected.append(("".join(generation), generation.tokens, generation.finish_reason))
    rounds, ended = Rounds(sessions), list[int]()
    queue = sorted(range(len(conversations)), key=lambda i: conversations[i].arrives)
    answers: dict[int, tuple[Generation, threading.Event]] = {}
    number = 0
    while queue or len(rounds):
        while queue and rounds.room and (conversations[queue[0]].arrives <= number or not len(rounds)):
            index = queue.pop(0)
            answers[index] = begun(opened, tokenizer, conversations[index], sessions.every[0])
            rounds.begin(answers[index][0], lambda piece: None, lambda failure, index=index: ended.append(index))
        rounds.run()
        for index, (generation, cancel) in answers.items():
            if len(generation.tokens) >= conversations[index].leaves:
                cancel.set()
        number += 1
    assert sorted(ended) == list(range(len(conversations)))
    assert sessions.free == SEQUENCES
    for index, (generation, cancel) in answers.items():
        text, tokens, reason = expected[index]
        if cancel.is_set():
            assert tokens[: len(generation.tokens)] == generation.tokens
        else:
            assert (generation.text, generation.tokens, generation.finish_reason) == (text, tokens, reason)


def test_steps_are_joined_where_the_bits_allow_it(opened: Opened) -> None:
    never, on_x86 = {"primitive", "int4 fast"}, {"int4", "int8", "windows", "convolutions"}
    if opened.form in never or (platform.machine() == "x86_64" and opened.form in on_x86):
        assert opened.group.joins_steps == (opened.form not in never)


def test_rows_of_a_joint_step_have_the_bits_of_steps_alone(opened: Opened) -> None:
    rng, engines = np.random.default_rng(1), opened.group.members
    prompts = [rng.integers(opened.alone.vocab_size, size=length) for length in (5, 200, 64)]
    for chosen in ([0, 2], [2, 1, 0], [1, 2], [0, 1, 2]):
        for engine, prompt in zip(engines, prompts, strict=True):
            engine.forward(prompt, 0)
        rows = [Row(engines[i], 7 + i, len(prompts[i])) for i in chosen]
        together = [logits.copy() for logits in opened.group.step(rows)]
        for i, logits in zip(chosen, together, strict=True):
            opened.alone.forward(prompts[i], 0)
            np.testing.assert_array_equal(logits, opened.alone.forward(np.array([7 + i]), len(prompts[i])))


def test_a_beginning_that_another_session_holds_is_copied(opened: Opened, sessions: SharedSessions) -> None:
    rng = np.random.default_rng(2)
    common, ends = rng.integers(opened.alone.vocab_size, size=130).tolist(), ([1, 2, 3], [4, 5])
    first = sessions.take([*common, *ends[0]])
    assert first.prefill([*common, *ends[0]]) is not None
    second = sessions.take([*common, *ends[1]])
    assert second is not first and second.engine is not first.engine
    grid = opened.alone.prompt_grid
    copies = opened.form not in {"windows", "convolutions"}
    assert second.first_to_run([*common, *ends[1]]) == (130 // grid * grid if copies else 0)
    logits = second.prefill([*common, *ends[1]])
    expected = Session(opened.alone).prefill([*common, *ends[1]])
    assert logits is not None and expected is not None
    np.testing.assert_array_equal(logits, expected)
    for session in (first, second):
        sessions.give_back(session)
    assert sessions.take([*common, *ends[0]]) is first  # it goes on with its own


def test_a_newcomer_waits_for_one_step_and_a_cancel_for_one_piece(
    opened: Opened, sessions: SharedSessions, tokenizer: Tokenizer
) -> None:
    rounds, pieces = Rounds(sessions), list[str]()
    talks, _ = begun(opened, tokenizer, Asked(0, 9, 1, 0, 60, 99), sessions.every[0])
    rounds.begin(talks, pieces.append, lambda failure: None)
    for _ in range(3):
        rounds.run()
    comes, cancel = begun(opened, tokenizer, Asked(3, 100, 1, 0, 5, 99), sessions.every[0])
    rounds.begin(comes, pieces.append, lambda failure: None)
    before = len(talks.tokens)
    rounds.run()
    assert len(comes.tokens) == 2 and len(talks.tokens) == before + 1  # its first token, and one joint step
    leaves, cancel = begun(opened, tokenizer, Asked(1, 290, 1, 0, 5, 99), sessions.every[0])
    rounds.begin(leaves, pieces.append, lambda failure: None)
    rounds.run()
    assert not leaves.tokens and not leaves.finish_reason
    cancel.set()
    while sessions.free < SEQUENCES:
        rounds.run()
    assert leaves.finish_reason == "cancelled" and not leaves.tokens
    assert (talks.finish_reason, comes.finish_reason) == ("length", "length")


def test_a_sequence_has_one_row_in_a_step(opened: Opened) -> None:
    engine = opened.group.members[0]
    engine.forward(np.array([1, 2]), 0)
    if opened.group.joins_steps:
        with pytest.raises(InputError, match="two rows"):
            opened.group.step([Row(engine, 1, 2), Row(engine, 1, 2)])
