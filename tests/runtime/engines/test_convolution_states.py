"""States of short convolutions: a step may go back, a session starts again, a prompt cache holds them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers.convolving import CONTEXT, TAPS, TOKENS, WEIGHTS, A, expected, written_for
from helpers.random_model import random_model
from merino_edge.errors import ArtefactError, InputError, UnsupportedError
from merino_edge.export.graph import build_model, build_stored, state_names, to_bytes
from merino_edge.export.quantization.stored_weights import cache_scales, store
from merino_edge.export.targets import LOWERINGS, Target
from merino_edge.runtime import prompt_cache
from merino_edge.runtime.engines.convolution_states import SLACK, ConvolutionStates
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.onnx_session import FIRST_WITH_INT8_CACHE, installed_version
from merino_edge.runtime.session import Session


def close_to(got: np.ndarray | None, wanted: np.ndarray) -> None:
    assert got is not None
    np.testing.assert_allclose(got, wanted, atol=1e-4 * np.abs(wanted).max())


@pytest.fixture(scope="module", params=LOWERINGS)
def graph(request: pytest.FixtureRequest) -> bytes:
    return to_bytes(build_model(A, WEIGHTS, "fp32", CONTEXT, lowering=request.param))


def opened(graph: bytes) -> OnnxEngine:
    return OnnxEngine(graph, A, CONTEXT, threads=1)


def test_a_long_sequence_is_computed_as_without_a_cache_and_draft_tokens_may_be_refused(graph: bytes) -> None:
    engine, wanted, start = opened(graph), expected(TOKENS), 0
    for length in (1, 1, 150, 1, 200, 8, 1, 38, 100, 99, 1):
        close_to(engine.forward(TOKENS[start : start + length], start), wanted[start + length - 1])
        start += length
    assert engine.least_start == CONTEXT - SLACK
    for back in (1, 2, 8, SLACK):  # the steps before wrote these positions already
        close_to(engine.forward_rows(TOKENS[CONTEXT - back :], CONTEXT - back, back), wanted[CONTEXT - back :])
    with pytest.raises(InputError, match="start at 0"):
        engine.forward(TOKENS[300:301], 300)
    close_to(engine.forward(TOKENS[:3], 0), wanted[2])
    assert engine.least_start == 0


def test_a_session_starts_again_where_the_states_have_left(graph: bytes) -> None:
    session = Session(opened(graph))
    session.prefill(TOKENS[:400].tolist())
    for shared in (390, 100):  # what is kept reaches back to the first
        other = [*TOKENS[:shared].tolist(), 5, 6, 7]
        close_to(session.prefill(other), expected(np.array(other))[-1])


def test_after_a_long_answer_a_session_goes_on_at_the_end_of_the_prompt(graph: bytes) -> None:
    session, fresh = Session(opened(graph)), Session(opened(graph))
    session.prefill(TOKENS[:300].tolist())
    for token in TOKENS[300 : 300 + SLACK + 50].tolist():
        session.step(token)
    longer = TOKENS[: 300 + SLACK + 60].tolist()
    assert session.first_to_run(longer) == 300 // session.engine.prompt_grid * session.engine.prompt_grid
    np.testing.assert_array_equal(session.prefill(longer), np.copy(fresh.prefill(longer)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(session.step(7), fresh.step(7))


def test_a_few_tokens_after_the_kept_state_the_rings_hold_enough(graph: bytes) -> None:
    """The steps after the first one read positions of which only the kept state knows."""
    session, engine = Session(opened(graph)), opened(graph)
    prompt = TOKENS[:257].tolist()  # after a multiple of every grid
    session.prefill(prompt)
    for longer in (prompt, [*prompt, 5, 6], [*prompt, 5, 6, 7]):
        for token in TOKENS[300 : 300 + SLACK + 10].tolist():
            session.step(token)
        fresh = Session(engine)
        np.testing.assert_array_equal(session.prefill(longer), np.copy(fresh.prefill(longer)))  # type: ignore[arg-type]
        for token in (8, 9, 10):
            np.testing.assert_array_equal(session.step(token), fresh.step(token))


def test_a_prompt_of_an_odd_context_s_length_has_the_same_bits_however_much_is_reused() -> None:
    """Its last token has no room for a partner behind it, and takes the one before."""
    a, ids = replace(A, max_positions=301), TOKENS[:301].tolist()
    engine = OnnxEngine(to_bytes(build_model(a, WEIGHTS, "fp32", 301)), a, 301, threads=1)
    wanted = np.copy(Session(engine).prefill(ids))  # type: ignore[arg-type]
    for shared in (301, 300, 299, 298, 1):
        session = Session(engine)
        session.prefill([*ids[:shared], 5, 6, 7][:301])
        np.testing.assert_array_equal(session.prefill(ids), wanted)  # type: ignore[arg-type]
        assert session.ids == ids


def test_a_prompt_cache_file_holds_the_states(graph: bytes, tmp_path: Path) -> None:
    session, other, prompt = Session(opened(graph)), Session(opened(graph)), TOKENS[:200].tolist()
    session.prefill([*prompt, *TOKENS[200:250].tolist()])  # an answer whose end is not in the file
    prompt_cache.save(tmp_path / "cache", session, len(prompt), written_for(A))
    assert prompt_cache.load(tmp_path / "cache", other, written_for(A)) == 200
    assert other.engine.least_start == 198  # type: ignore[attr-defined]
    close_to(other.prefill(prompt), expected(TOKENS[:200])[-1])
    close_to(other.step(int(TOKENS[200]))[0], expected(TOKENS[:201])[-1])
    shorter = [*prompt[:150], 1, 2]
    close_to(other.prefill(shorter), expected(np.array(shorter))[-1])
    session.prefill([*prompt, *TOKENS[200:400].tolist()])
    with pytest.raises(UnsupportedError, match="have left the prompt behind") as refusal:
        prompt_cache.save(tmp_path / "late", session, len(prompt), written_for(A))
    assert refusal.value.hint == "write it with --max-tokens 1" and not (tmp_path / "late").exists()


@pytest.mark.skipif(installed_version() < FIRST_WITH_INT8_CACHE, reason="this ONNX Runtime has no int8 KV cache")
def test_states_stay_float32_beside_an_int8_cache(tmp_path: Path) -> None:
    target = Target.named("onnxruntime", "int8", cache="int8")
    scales = cache_scales({"key_2": np.full((1, 32), 8.0), "value_2": np.full((1, 32), 8.0)})
    stored = replace(store(A, WEIGHTS, target), cache_scales=scales)
    graph = to_bytes(build_stored(A, stored, target, CONTEXT))
    session, other = Session(opened(graph)), Session(opened(graph))
    wanted = session.prefill(TOKENS[:20].tolist())
    assert wanted is not None
    wanted = wanted.copy()
    prompt_cache.save(tmp_path / "cache", session, 20, written_for(A))
    prompt_cache.load(tmp_path / "cache", other, written_for(A))
    assert [array.dtype.name for array in other.engine.read_cache(20)] == ["int8"] * 2 + ["float32"] * 3  # type: ignore[attr-defined]
    again = other.prefill(TOKENS[:20].tolist())
    # A step of one token attends over codes, a prompt's over floats.
    np.testing.assert_allclose(again, wanted, atol=0.1 * np.abs(wanted).max())  # type: ignore[arg-type]


def test_a_graph_without_the_states_is_refused() -> None:
    plain = replace(A, blocks=tuple(replace(block, convolution=0) for block in A.blocks), convolution_bias=False)
    graph = to_bytes(build_model(plain, random_model(plain), "fp32", CONTEXT))
    with pytest.raises(ArtefactError, match="no state_0") as refusal:
        OnnxEngine(graph, A, CONTEXT, threads=1)
    assert refusal.value.hint == "export the bundle again"


def test_rings_hold_what_a_step_needs_and_no_more() -> None:
    states = ConvolutionStates(A)
    assert [(name, f"gated_{name[6:]}") for name in states.inputs] == state_names(A)
    rows = np.arange(500, dtype=np.float32)[:, None] + np.zeros((1, 96), np.float32)
    for start, end in ((0, 2), (2, 3), (3, 300), (290, 310)):
        states.keep([rows[None, start:end, :width] for width in states.outputs.values()], start)
    states.prepare(301)
    assert [state[0, :, 0].tolist() for state in states.inputs.values()] == [[298, 299, 300]] * 2 + [[299, 300]]
    assert states.length == SLACK + TAPS - 1 and states.least_start == 310 - SLACK
    states.keep([rows[None, :1, :width] for width in states.outputs.values()], 0)
    states.prepare(1)
    assert [state[0, :, 0].tolist() for state in states.inputs.values()] == [[0, 0, 0]] * 2 + [[0, 0]]
    assert states.least_start == 0
