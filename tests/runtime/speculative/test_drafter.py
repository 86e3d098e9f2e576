"""Speculative decoding changes how many steps an answer takes, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from helpers.same_engine import SameEngine
from merino_edge import bundle
from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.runtime.engine import Engine, Logits
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.sampling import Sampler, adjusted, distribution
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.runtime.speculative import drafter as drafters
from merino_edge.runtime.speculative.draft_model import DraftModel
from merino_edge.runtime.speculative.drafter import LENGTHS, STALE_STEPS, Drafter, Proposer
from merino_edge.runtime.speculative.prompt_lookup import PromptLookup
from merino_edge.tokenizer import Tokenizer

PROMPT = "The quick brown fox jumps over the lazy dog. The quick brown fox jumps over the lazy dog. The quick"

ROUNDING = 1e-6  # of a probability, by which steps of one token and of several differ
FEW = dict.fromkeys((70, 71, 72), 20.0)  # a text of three tokens repeats itself


def drafter_after(
    step_s: dict[int, float], acceptance: float, tokens: int = 2000, seed: int = 0
) -> tuple[Drafter, float]:
    """A drafter after `tokens` tokens of a text, and its tokens per second.

    `acceptance` is the probability that a draft token is accepted; `step_s` are the times of steps by their length.
    """
    rng, drafter, seconds = np.random.default_rng(seed), Drafter(PromptLookup()), 0.0
    drafter.begin(range(8))
    text = list(range(8))
    done = 0
    while done < tokens:
        draft = drafter.draft(7)
        drafter.record_step(1 + len(draft), step_s[1 + len(draft)])
        seconds += step_s[1 + len(draft)]
        for index in range(1 + len(draft)):
            expected = (text[-1] + 1) % 8
            token = expected if rng.random() < acceptance else int(rng.integers(8))
            text.append(token)
            drafter.push(token)
            done += 1
            if index == len(draft) or token != draft[index]:
                break
    return drafter, done / seconds


CHEAP = {1: 1.0, 2: 1.05, 4: 1.2, 8: 1.5}  # s: most of the time goes into reading the weights
EXPENSIVE = {1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0}  # s: most of it goes into arithmetic


@pytest.mark.parametrize(
    ("step_s", "acceptance", "low", "high"),
    [(CHEAP, 0.95, 2.5, 6), (CHEAP, 0.0, 0.93, 1.1), (EXPENSIVE, 0.95, 0.93, 1.1)],
)
def test_it_drafts_only_where_that_pays(step_s: dict[int, float], acceptance: float, low: float, high: float) -> None:
    """A step of one token takes a second, so the tokens per second are the gain."""
    _, gain = drafter_after(step_s, acceptance)
    assert low < gain < high


def test_a_length_that_was_slow_once_is_tried_again() -> None:
    drafter, _ = drafter_after(EXPENSIVE, 1.0, tokens=400)
    drafter.acceptance_rate = 1.0
    tried = set()
    for token in range(4 * STALE_STEPS):
        draft = drafter.draft(7)
        tried.add(len(draft))
        drafter.record_step(1 + len(draft), EXPENSIVE[1 + len(draft)])
        drafter.push((token + 400) % 8)
    assert tried & set(LENGTHS)


def test_a_slow_proposer_is_used_only_where_it_pays(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(drafters, "perf_counter", lambda: now[0])

    class Clock(PromptLookup):
        """Proposes tokens that are always accepted, and takes `propose_s` seconds for each."""

        free = False

        def __init__(self, propose_s: float) -> None:
            super().__init__()
            self.propose_s = propose_s

        def propose(self, max_tokens: int) -> list[int]:
            now[0] += max_tokens * self.propose_s
            return [0] * max_tokens

    for propose_s, pays in ((0.1, True), (2.0, False)):
        drafter = Drafter(Clock(propose_s))
        drafter.begin([0])
        lengths = []
        for _ in range(60):
            draft = drafter.draft(7)
            lengths.append(len(draft))
            drafter.record_step(1 + len(draft), CHEAP[1 + len(draft)])
            for _ in range(1 + len(draft)):
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
    """Prompt lookup, or a draft model: the same model, one that is nearly always wrong, or one of a short context."""
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


@pytest.fixture(params=["onnxruntime", "tensorrt"])
def any_engine(
    request: pytest.FixtureRequest, engine: Engine, small_model: tuple[Architecture, dict[str, np.ndarray]]
) -> Iterator[Engine]:
    """The engine of ONNX Runtime, or TensorRT's on the stand-in GPU with plans of three capacities."""
    if request.param == "onnxruntime":
        yield engine
        return
    request.getfixturevalue("gpu")
    a, weights = small_model
    target = Target.named("rtx", "fp32", "primitive")
    stored = store(a, weights, target)
    plans = {count: to_bytes(build_stored(a, stored, target, a.max_positions, count)) for count in (60, 130, 320)}
    with closing(TensorRtEngine("any", plans, a)) as opened:
        yield opened


def answer(
    engine: Engine, tokenizer: Tokenizer, sampling: Sampling, proposer: Proposer | None, **more: object
) -> Generation:
    generation = generate(Session(engine), tokenizer, tokenizer.encode(PROMPT), sampling, proposer=proposer, **more)  # type: ignore[arg-type]
    for _ in generation:
        pass
    return generation


@pytest.fixture
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    """All proposed tokens are run."""
    monkeypatch.setattr(Drafter, "_tokens_per_second", lambda self, length: float(length + 1))


class RecordingSampler(Sampler):
    """Samples as usual, and records how close each random number came to another token, which rounding may change."""

    nearest: list[float]

    def __call__(self, logits: Logits, context_ids: Sequence[int], output_ids: Sequence[int] = ()) -> int:
        sampling = self.sampling
        _, likely = distribution(
            adjusted(logits, context_ids, output_ids, sampling),
            replace(sampling, temperature=sampling.temperature or 1.0),
        )
        if sampling.temperature:
            draw = self._draw()
            self._drawn.append(draw)
            self.nearest.append(float(np.abs(likely.cumsum() - draw).min()))
        else:
            second, first = np.partition(likely, -2)[-2:]
            self.nearest.append(float(first - second))
        return super().__call__(logits, context_ids, output_ids)


@pytest.fixture
def nearest(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """What RecordingSampler recorded, for all tokens of all answers."""
    monkeypatch.setattr(RecordingSampler, "nearest", distances := list[float](), raising=False)
    monkeypatch.setattr("merino_edge.runtime.generation.Sampler", RecordingSampler)
    return distances


def outcome(generation: Generation) -> tuple[object, ...]:
    return generation.tokens, generation.text, generation.finish_reason, generation.statistics.generated_tokens


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
def test_an_answer_is_the_same_with_and_without_drafts(
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
    drafted = answer(engine, tokenizer, sampling, proposer, max_tokens=max_tokens, stop=stop)
    if (other := [x != y for x, y in zip(plain.tokens, drafted.tokens, strict=False)]) and any(other):
        assert of_plain[other.index(True)] < ROUNDING
    else:
        assert outcome(drafted) == outcome(plain)
    assert plain.statistics.drafted_tokens == 0


@pytest.mark.usefixtures("eager")
@pytest.mark.parametrize(
    "sampling", [Sampling(temperature=1, seed=2, logit_bias=FEW), Sampling(greedy=True, logit_bias=FEW)]
)
def test_drafts_are_run_and_some_are_accepted_up_to_the_end_of_the_context(
    any_engine: Engine, tokenizer: Tokenizer, proposer: Proposer, sampling: Sampling, request: pytest.FixtureRequest
) -> None:
    plain = answer(any_engine, tokenizer, sampling, None, max_tokens=1000)
    drafted = answer(any_engine, tokenizer, sampling, proposer, max_tokens=1000)
    assert outcome(drafted) == outcome(plain) and plain.finish_reason == "context"
    s = drafted.statistics
    assert s.accepted_tokens <= s.drafted_tokens and s.drafted_tokens > 0
    assert (s.accepted_tokens > 0) == (request.node.callspec.params["proposer"] != "another")


@pytest.mark.usefixtures("eager")
def test_the_next_turn_reuses_only_accepted_tokens(
    any_engine: Engine, tokenizer: Tokenizer, proposer: Proposer
) -> None:
    """The cache holds keys of rejected draft tokens after the answer. The session must not reuse them."""
    session, ids = Session(any_engine), tokenizer.encode(PROMPT)
    first = generate(session, tokenizer, ids, Sampling(greedy=True), 50, proposer=proposer)
    for _ in first:
        pass
    assert session.ids == (ids + first.tokens)[: len(session.ids)]
    longer = ids + first.tokens + tokenizer.encode(" And then")
    again = generate(session, tokenizer, longer, Sampling(greedy=True), 30, proposer=proposer)
    fresh = generate(Session(SameEngine(any_engine)), tokenizer, longer, Sampling(greedy=True), 30)
    assert "".join(again) == "".join(fresh) and again.tokens == fresh.tokens


@pytest.mark.usefixtures("eager")
def test_a_model_that_drafts_for_itself_is_always_right_and_runs_nothing_twice(
    engine: Engine, tokenizer: Tokenizer, bundle_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(DraftModel.open(bundle_path, bundle.load(bundle_path), threads=1)) as itself:
        run: list[int] = []
        forward = OnnxEngine.forward_rows

        def counted(self: OnnxEngine, tokens: np.ndarray, start: int, rows: int) -> np.ndarray:
            run.extend([len(tokens)] if self is itself._session.engine else [])
            return forward(self, tokens, start, rows)

        monkeypatch.setattr(OnnxEngine, "forward_rows", counted)
        generation = answer(engine, tokenizer, Sampling(greedy=True), itself, max_tokens=80)
    s = generation.statistics
    assert s.accepted_tokens == s.drafted_tokens > 60
    # The keys of the last of each seven draft tokens are run later.
    assert sum(run) <= s.prompt_tokens + 80 + 80 // 8 + 8


def test_a_draft_model_with_another_tokenizer_is_refused(
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
def test_impossible_numbers_of_rows_are_refused(engine: Engine, tokens: int, rows: int) -> None:
    with pytest.raises(InputError, match="rows of logits"):
        engine.forward_rows(np.zeros(tokens, np.int64), 0, rows)
