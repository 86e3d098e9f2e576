"""A layer with a window keeps a ring of its cache in a `primitive` graph for TensorRT: the answers of a whole cache."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.convolving import written_for
from helpers.fake_driver import FakeDriver
from helpers.random_model import random_model
from helpers.rtx_tensors import rtx_tensors
from helpers.stand_in_gpu import no_compiler
from merino_edge.architecture import Architecture, Block
from merino_edge.cache_rings import SLACK, ring_positions
from merino_edge.errors import InputError
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import random_stored, store
from merino_edge.export.targets import Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.pytorch.model import Model
from merino_edge.runtime import prompt_cache
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.plan_tensors import bound_tensors
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.runtime.session import Session
from merino_edge.tensorrt_library import RTX

CONTEXT = 600
A = Architecture(
    96, CONTEXT, 64, 32,
    (
        Block(64, 1, 2, 1, 64, window=20, rotary="local"), Block(64, 1, 2, 2, 64),
        Block(64, 1, 2, 1, 64, window=100),
    ),
    norm="rmsnorm", ffn="geglu_tanh", positions="rotary", rotary_dim=32, local_rotary_base=100.0, bias="none",
    norm_placement="both", qk_norm="head",
)  # fmt: skip
WEIGHTS = random_model(A)
TOKENS = np.random.default_rng(0).integers(0, A.vocab_size, CONTEXT)
FAR = CONTEXT - SLACK - 1  # a step at the end may go back so far, and no further
Opened = Callable[[], Any]


def graph_of(capacity: int, precision: str = "fp32", lowering: str = "primitive") -> bytes:
    target = Target.named("rtx", precision, lowering)
    return to_bytes(build_stored(A, store(A, WEIGHTS, target), target, CONTEXT, capacity))


@pytest.fixture(scope="module")
def plans() -> dict[int, bytes]:
    """The second capacity is between the two rings' lengths: only one of them wraps there."""
    return {capacity: graph_of(capacity) for capacity in (100, 200, CONTEXT)}


@pytest.fixture(params=["tensorrt", "one plan", "without a compiler", "cpu"])
def opened(
    request: pytest.FixtureRequest, gpu: FakeDriver, plans: dict[int, bytes], monkeypatch: pytest.MonkeyPatch
) -> Opened:
    """Opens each engine that runs such graphs."""
    if request.param == "cpu":
        return lambda: OnnxEngine(plans[CONTEXT], A, CONTEXT, 1)
    if request.param == "without a compiler":
        no_compiler(monkeypatch)
    chosen = {CONTEXT: plans[CONTEXT]} if request.param == "one plan" else dict(plans)
    return lambda: TensorRtEngine("any", dict(chosen), A)


@pytest.fixture(scope="module")
def expected() -> np.ndarray:
    with torch.no_grad():
        return np.asarray(Model.from_weights(A, WEIGHTS)(torch.from_numpy(TOKENS)[None])[0].numpy())  # [T, V]


def after(tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return np.asarray(Model.from_weights(A, WEIGHTS)(torch.from_numpy(tokens)[None])[0, -1].numpy())


def close_to(got: np.ndarray | None, wanted: np.ndarray) -> None:
    assert got is not None
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-4 * np.abs(wanted).max())


def test_pieces_and_single_steps_over_the_wrap_are_computed_as_without_a_cache(
    opened: Opened, expected: np.ndarray
) -> None:
    with contextlib.closing(opened()) as engine:
        start = 0
        for length in (1, 1, 90, 7, *[1] * 4, 40, *[1] * 8, 60, 8, 200, *[1] * 30, 140, 1, 5, 1):
            close_to(engine.forward(TOKENS[start : start + length], start), expected[start + length - 1])
            start += length
        engine.forward(TOKENS[start:], start)
        assert engine.least_start == FAR
        for back in (1, 2, 8, SLACK + 1):  # as draft tokens that were refused: the steps before wrote these positions
            start = CONTEXT - back
            close_to(engine.forward(TOKENS[start : start + 1], start), expected[start])
            close_to(engine.forward(TOKENS[start:], start), expected[-1])
        rows = engine.forward_rows(TOKENS[-8:], CONTEXT - 8, 8)
        close_to(rows, expected[-8:])
        with pytest.raises(InputError, match="start at 0"):
            engine.forward(TOKENS[FAR - 1 : FAR], FAR - 1)
        close_to(engine.forward(TOKENS[:400], 0), expected[399])
        close_to(engine.forward(TOKENS[400:401], 400), expected[400])


def test_other_tokens_after_a_rewind_replace_what_the_ring_held(opened: Opened) -> None:
    with contextlib.closing(opened()) as engine:
        engine.forward(TOKENS[:500], 0)
        others = TOKENS[::-1]
        engine.forward(others[:60], 430)
        close_to(engine.forward(others[60:70], 490), after(np.concatenate([TOKENS[:430], others[:70]])))


def test_it_goes_on_at_the_end_of_a_prompt_after_a_long_answer(opened: Opened) -> None:
    """The bits are those of a session that runs the whole prompt."""
    with contextlib.closing(opened()) as engine, contextlib.closing(opened()) as other:
        session, fresh = Session(engine), Session(other)
        session.prefill(TOKENS[:300].tolist())
        for token in TOKENS[300:480].tolist():
            session.step(token)
        for longer in (TOKENS[:490].tolist(), [*TOKENS[:280].tolist(), 1, 2, 3]):
            assert session.first_to_run(longer) == 256
            np.testing.assert_array_equal(session.prefill(longer), np.copy(fresh.prefill(longer)))  # type: ignore[arg-type]
            np.testing.assert_array_equal(session.step(7), fresh.step(7))
            session.prefill(TOKENS[:300].tolist())  # which keeps 256 again
            for token in TOKENS[300:480].tolist():
                session.step(token)
        shorter = [*TOKENS[:200].tolist(), 5, 6, 7]
        assert session.first_to_run(shorter) == 0
        close_to(session.prefill(shorter), after(np.array(shorter)))


def test_what_a_refused_step_brought_back_is_all_that_is_left(opened: Opened) -> None:
    """A step at a kept position that is refused must not let a later one read rows that are gone."""
    with contextlib.closing(opened()) as engine:
        engine.forward(TOKENS[:300], 0)
        engine.keep_from(256)
        engine.forward(TOKENS[300:], 300)
        with pytest.raises(InputError):
            engine.forward_rows(TOKENS[256:266], 256, 11)
        if engine.least_start < FAR:  # it was brought back
            with pytest.raises(InputError):
                engine.forward(TOKENS[-1:], CONTEXT - 1)
        close_to(engine.forward(TOKENS[256:400], 256), after(TOKENS[:400]))


def test_prompt_caches_hold_the_windows(gpu: FakeDriver, plans: dict[int, bytes], tmp_path: Path) -> None:
    """TensorRT and ONNX Runtime read each other's."""
    engines: dict[str, Opened] = {
        "tensorrt": lambda: TensorRtEngine("any", dict(plans), A),
        "cpu": lambda: OnnxEngine(plans[CONTEXT], A, CONTEXT, 1),
    }
    for writer, prompt in (("tensorrt", 400), ("cpu", 400), ("tensorrt", 150)):
        with contextlib.closing(engines[writer]()) as engine:
            session = Session(engine)
            session.prefill(TOKENS[: prompt + 20].tolist())
            prompt_cache.save(tmp_path / "cache", session, prompt, written_for(A))
        for open_one in engines.values():
            with contextlib.closing(open_one()) as engine:
                session = Session(engine, exact=False)
                assert prompt_cache.load(tmp_path / "cache", session, written_for(A)) == prompt
                assert session.first_to_run(TOKENS[: prompt + 9].tolist()) == prompt
                assert engine.least_start == prompt - 2  # further back, a file may hold nothing
                close_to(session.prefill(TOKENS[: prompt + 9].tolist()), after(TOKENS[: prompt + 9]))
                other = [*TOKENS[: prompt - 50].tolist(), 3]
                close_to(session.prefill(other), after(np.array(other)))


def test_marked_positions_can_be_run_behind(opened: Opened) -> None:
    with contextlib.closing(opened()) as engine:
        engine.mark_filled(500)
        assert np.isfinite(engine.forward(TOKENS[:1], 500)).all() and engine.least_start > 300
        close_to(engine.forward(TOKENS[:3], 0), after(TOKENS[:3]))


def test_an_older_bundle_keeps_whole_caches(gpu: FakeDriver, expected: np.ndarray) -> None:
    """As do native graphs: their form is that of a ring that never wraps."""
    target = Target.named("onnxruntime", "fp32", "primitive")  # which has no rings, as graphs for TensorRT had none
    older = to_bytes(build_stored(A, store(A, WEIGHTS, target), target, CONTEXT))
    for graph, share in ((older, 1e-4), (graph_of(CONTEXT, "fp16", "native"), 0.02)):
        with contextlib.closing(TensorRtEngine("any", {CONTEXT: graph}, A)) as engine:
            engine.forward(TOKENS[:590], 0)
            assert engine._rings.least_start == 0
            got = engine.forward(TOKENS[590:], 590)
            np.testing.assert_allclose(got, expected[-1], rtol=0, atol=share * np.abs(expected[-1]).max())
            with contextlib.closing(OnnxEngine(graph, A, CONTEXT, 1)) as cpu:  # which gives back what windows leave
                cpu.forward(TOKENS[:400], 0)
                engine.write_cache(cpu.read_cache(400))
            assert engine.least_start == 398


def test_nvidias_parser_and_compiler_take_rings() -> None:
    rtx = pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    target = Target.named("rtx", "int4", "primitive")
    graph = to_bytes(build_stored(A, random_stored(A, target), target, CONTEXT))
    assert build_engine(RTX, graph, CONTEXT, "SM86").plan
    assert sorted(rtx_tensors(rtx, graph)) == sorted(bound_tensors(A, CONTEXT, "row_", rings=True))


def test_memory_of_gemma_3_1b_at_8192_positions_is_within_ten_percent_of_its_windows() -> None:
    """26 layers with one head of 256 channels: five with a window of 512 to one without."""
    blocks = [Block(64, 5, 4, 1, 32, window=512, rotary="local"), Block(64, 1, 4, 1, 32)] * 4
    gemma = Architecture(
        96, 8192, 64, 256, (*blocks, Block(64, 2, 4, 1, 32, window=512, rotary="local")), norm="rmsnorm",
        positions="rotary", rotary_dim=256, local_rotary_base=1e4, bias="none",
    )  # fmt: skip
    position_bytes = 2 * 256 * 2  # key and value, float16
    needed, held = (22 * 512 + 4 * 8192) * position_bytes, gemma.kv_bytes(8192, rings=True)
    assert needed < held < 1.1 * needed and gemma.kv_bytes(8192) == 26 * 8192 * position_bytes
    model = build_stored(gemma, random_stored(gemma, target := Target.named("jetpack-6.2", "fp16")), target, 8192)
    caches = [v for v in model.graph.inputs if str(v.name).startswith(("key_", "value_"))]
    assert sum(2 * int(np.prod(v.shape.numpy())) for v in caches) == held  # type: ignore[union-attr]


def test_a_ring_is_never_longer_than_the_cache() -> None:
    assert [ring_positions(20, capacity) for capacity in (10, 20, 148, 149, 600)] == [10, 20, 148, 148, 148]
    assert ring_positions(0, 600) == 600
