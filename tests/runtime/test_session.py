"""A session: what a prompt computes has the same bits, whatever ran before it; at every form of the weights."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from helpers.same_engine import SameEngine
from helpers.small_bundle import CONTEXT
from merino_edge.architecture import Architecture
from merino_edge.export.graph import build_stored, cache_names, save
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.onnx_session import FIRST_WITH_INT8_CACHE, installed_version
from merino_edge.runtime.session import PREFILL_CHUNK, Session

FORMS = {
    "fp32": Target.named("onnxruntime", "fp32"),
    "int8": Target.named("onnxruntime", "int8"),
    "int4": Target.named("onnxruntime", "int4"),
    "int4 fast": replace(Target.named("onnxruntime", "int4"), fast=True, block=64),
    "int8 cache": replace(Target.named("onnxruntime", "int8"), cache="int8"),
    "primitive": Target.named("onnxruntime", "int8", "primitive"),
    "windows": Target.named("onnxruntime", "fp32"),
}
WINDOW = 70


@pytest.fixture(scope="module", params=FORMS)
def engine(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    small_model: tuple[Architecture, dict[str, np.ndarray]],
) -> Iterator[Engine]:
    """The small model at one form."""
    (a, weights), target = small_model, FORMS[request.param]
    if target.cache == "int8" and installed_version() < FIRST_WITH_INT8_CACHE:
        pytest.skip("this ONNX Runtime has no int8 KV cache")
    if request.param == "windows":
        a = replace(a, blocks=tuple(replace(block, window=WINDOW) for block in a.blocks))
    path: Path = tmp_path_factory.mktemp("form") / "model.onnx"
    scales = (
        {name: np.float32(0.05) for names in cache_names(a) for name in names[:1]} if target.cache == "int8" else {}
    )
    stored = replace(store(a, weights, target), cache_scales=scales)
    save(build_stored(a, stored, target, a.max_positions), path)
    with closing(OnnxEngine(path, a, a.max_positions, 1)) as opened:
        yield opened


# Each turn: how much it shares with the one before, how long it is, and how many tokens of an answer follow.
TURNS = st.lists(st.tuples(st.integers(0, 300), st.integers(1, 300), st.integers(0, 9)), min_size=2, max_size=4)


@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turns=TURNS, seed=st.integers(0, 99))
def test_what_ran_before_changes_no_bit_of_an_answer(
    engine: Engine, turns: list[tuple[int, int, int]], seed: int
) -> None:
    rng, session = np.random.default_rng(seed), Session(engine)
    ids: list[int] = []
    rows = np.empty(0)
    for shared, length, answered in turns:
        ids = [*ids[:shared], *rng.integers(engine.vocab_size, size=length).tolist()][:300]
        logits = session.prefill(ids)
        assert logits is not None
        rows = logits.copy()
        last, prompt = rows, list(ids)
        for _ in range(answered):
            ids.append(int(last.argmax()))
            last = session.step(ids[-1])[0].copy()
    fresh = Session(SameEngine(engine)).prefill(prompt)
    assert fresh is not None
    np.testing.assert_array_equal(rows, fresh)


@pytest.mark.parametrize("length", [1, 2, 3, PREFILL_CHUNK - 1, PREFILL_CHUNK, PREFILL_CHUNK + 1, CONTEXT])
def test_a_prompt_runs_in_pairs(engine: Engine, length: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pieces: list[int] = []
    run = engine.forward_rows

    def counted(tokens: np.ndarray, start: int, rows: int) -> np.ndarray:
        pieces.append(len(tokens))
        return run(tokens, start, rows)

    with monkeypatch.context() as patched:
        patched.setattr(engine, "forward_rows", counted)
        session = Session(engine)
        session.prefill([5] * length)
        whole = pieces.copy()
        session.prefill([5] * length)
    assert length <= sum(whole) <= length + 1
    if engine.prompt_grid == 2:
        assert pieces[len(whole) :] == [2]
        assert not any(piece % 2 for piece in pieces)
    else:
        assert pieces[len(whole) :] == [(length - 1) % engine.prompt_grid + 1]


def test_a_prefill_that_is_cancelled_leaves_no_token_of_another_answer(engine: Engine) -> None:
    """A prompt cache file would call its bits those of a prompt."""
    session, cancel = Session(engine), threading.Event()
    session.prefill([5] * 10)
    for token in range(5):
        session.step(token)
    cancel.set()
    assert session.prefill([7] * 200, cancel) is None
    assert session.ids == []
