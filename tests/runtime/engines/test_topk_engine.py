"""An engine that finds the top k on the GPU, tested on the stand-in GPU.

Answers are those of the whole row. A step stays one launch, and the row is copied only where it is needed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import numpy as np
import pytest

from helpers.fake_driver import FakeDriver
from helpers.stand_in_gpu import COMPILER, no_compiler
from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.runtime.bench import Case, bench
from merino_edge.runtime.engine import Candidates, Engine, TopKEngine
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.runtime.engines.topk_kernel import TOP_K, TopKKernel
from merino_edge.runtime.generation import generate
from merino_edge.runtime.grammar import Grammars
from merino_edge.runtime.sampling import Sampler
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer

pytestmark = pytest.mark.skipif(not COMPILER, reason="needs a compiler")
Weights = dict[str, np.ndarray]
OpenPlans = Callable[..., TensorRtEngine]


@pytest.fixture
def open_plans(gpu: FakeDriver, small_model: tuple[Architecture, Weights]) -> OpenPlans:
    """The small model on the stand-in GPU."""
    a, weights = small_model
    graph = to_bytes(build_model(a, weights, "fp16", a.max_positions, "rtx", lowering="primitive"))
    return lambda cuda_graphs=True: TensorRtEngine("any", {a.max_positions: graph}, a, cuda_graphs=cuda_graphs)


class WholeRowEngine:
    """An engine without `forward_topk`: only the calls of the protocol."""

    def __init__(self, engine: Engine) -> None:
        self.forward, self.forward_rows, self.mark_filled = engine.forward, engine.forward_rows, engine.mark_filled
        self.vocab_size, self.max_positions, self.max_rows = engine.vocab_size, engine.max_positions, engine.max_rows
        self.prompt_grid, self.close = engine.prompt_grid, engine.close


SAMPLINGS = [
    Sampling(greedy=True),
    Sampling(seed=1),
    Sampling(temperature=1.5, top_k=63, top_p=1, min_p=0.02, seed=2),
    Sampling(temperature=1.5, top_k=64, typical_p=0.9, seed=3),  # more than the kernel keeps
    Sampling(temperature=1.5, top_k=0, top_p=1, seed=4),
    Sampling(temperature=1.5, repetition_penalty=1.3, seed=5),
]


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("unified", [True, False])
@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_answers_are_the_same(
    gpu: FakeDriver,
    open_plans: OpenPlans,
    tokenizer: Tokenizer,
    sampling: Sampling,
    unified: bool,
    cuda_graphs: bool,
) -> None:
    gpu.set(integrated=int(unified))
    answers = []
    for wrap in (lambda engine: engine, WholeRowEngine):
        with contextlib.closing(wrap(open_plans(cuda_graphs))) as engine:
            assert isinstance(engine, TopKEngine) == (wrap is not WholeRowEngine)
            session = Session(engine)
            for prompt in ("The quick", "The quick brown"):
                answer = generate(session, tokenizer, tokenizer.encode(prompt), sampling, max_tokens=60)
                list(answer)
                answers.append(answer.tokens)
    assert answers[:2] == answers[2:] and len(answers[0]) == 60


def test_a_step_is_one_launch_and_the_row_stays_on_the_gpu(
    gpu: FakeDriver, open_plans: OpenPlans, tokenizer: Tokenizer
) -> None:
    with contextlib.closing(open_plans()) as engine:
        row_bytes = 4 * engine.vocab_size
        session, ids = Session(engine), tokenizer.encode("The quick")

        def count() -> dict[str, int]:
            names = ("cuGraphLaunch", "copies to host", "bytes to host", "copies to device", "bytes to device")
            return {name: gpu.count(name) for name in names}

        for sampling, step_bytes in (
            (Sampling(loop_penalty=0.0), 8 * TOP_K),
            (Sampling(greedy=True), 8 * TOP_K),
            (Sampling(repetition_penalty=1.1), row_bytes),
            (Sampling(greedy=True), 8 * TOP_K),
        ):
            before = count()
            list(generate(session, tokenizer, ids, sampling, max_tokens=20))
            new = {name: number - before[name] for name, number in count().items()}
            # The prompt returns a row. Of the 19 steps the very first is not recorded yet.
            assert 18 <= new["cuGraphLaunch"] <= 20
            assert new["copies to host"] == 20 and new["bytes to host"] == row_bytes + 19 * step_bytes
            # A step sends the token and its position. Only a prompt of several tokens has an index of its row, too.
            prompt = new["bytes to device"] - 38 * 8
            assert new["copies to device"] <= 38 + 3 and 0 < prompt <= 8 * (2 * len(ids) + 1)
        assert gpu.count("cuStreamBeginCapture_v2") == 2


def test_the_row_is_copied_with_too_many_ties_or_without_a_compiler(
    open_plans: OpenPlans, monkeypatch: pytest.MonkeyPatch
) -> None:
    with contextlib.closing(open_plans()) as engine:
        engine.forward(np.arange(5), 0)
        row = engine.forward(np.arange(1), 5).copy()
        logits, ids = engine.forward_topk(np.arange(1), 5, 3)
        assert ids is not None and ids.size == logits.size >= 3
        np.testing.assert_array_equal(logits, row[ids])
        for k in (TOP_K, row.size):
            logits, ids = engine.forward_topk(np.arange(1), 5, k)
            assert ids is None
            np.testing.assert_array_equal(logits, row)
        monkeypatch.setattr(TopKKernel, "candidates", lambda self, k: None)
        logits, ids = engine.forward_topk(np.arange(1), 5, 3)
        assert ids is None
        np.testing.assert_array_equal(logits, row)
        logits, ids = engine.forward_topk(np.arange(3), 3, 3)  # more than one token
        assert ids is None and logits.shape == row.shape
    no_compiler(monkeypatch)
    with contextlib.closing(open_plans()) as engine:
        engine.forward(np.arange(5), 0)
        logits, ids = engine.forward_topk(np.arange(1), 5, 3)
        assert ids is None
        np.testing.assert_array_equal(logits, row)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_broken_model_is_refused(
    gpu: FakeDriver, small_model: tuple[Architecture, Weights], tokenizer: Tokenizer, bad: float
) -> None:
    a, weights = small_model
    broken = {**weights, "final_norm.weight": np.full_like(weights["final_norm.weight"], bad)}
    graph = to_bytes(build_model(a, broken, "fp32", a.max_positions, "rtx", lowering="primitive"))
    with contextlib.closing(TensorRtEngine("any", {a.max_positions: graph}, a)) as engine:
        session = Session(engine)
        session.prefill([1, 2])
        logits, ids = session.step_topk(3, 40)
        assert ids is None
        with pytest.raises(ArtefactError, match="export again"):
            Sampler(Sampling())(logits, [])


def test_a_grammar_gets_the_whole_row(
    open_plans: OpenPlans, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*arguments: object) -> None:
        raise AssertionError

    monkeypatch.setattr(TensorRtEngine, "forward_topk", never)
    with contextlib.closing(open_plans()) as engine:
        session, ids = Session(engine), tokenizer.encode("The quick")
        with pytest.raises(AssertionError):
            list(generate(session, tokenizer, ids, Sampling(), max_tokens=3))
        pytest.importorskip("llguidance")
        grammar = Grammars(tokenizer, engine.vocab_size).regex("[a-z]{3,9}")
        list(generate(session, tokenizer, ids, Sampling(greedy=True), max_tokens=3, grammar=grammar))


def test_bench_times_what_generate_runs(open_plans: OpenPlans, monkeypatch: pytest.MonkeyPatch) -> None:
    requested_k: list[int] = []
    forward_topk = TensorRtEngine.forward_topk

    def counted(self: TensorRtEngine, tokens: np.ndarray, start: int, k: int) -> Candidates:
        requested_k.append(k)
        return forward_topk(self, tokens, start, k)

    monkeypatch.setattr(TensorRtEngine, "forward_topk", counted)
    with contextlib.closing(open_plans()) as engine:
        bench({"one": engine}, [Case("decode", 5)], 1)
    assert set(requested_k) == {1} and len(requested_k) >= 5
