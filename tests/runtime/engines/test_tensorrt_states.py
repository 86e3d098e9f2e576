"""Short convolutions on TensorRT: graphs compute them, and the engine keeps their states. On stand-ins for the GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from helpers.convolving import CONTEXT, TOKENS, WEIGHTS, A, expected, written_for
from helpers.fake_driver import FakeDriver
from helpers.rtx_tensors import rtx_tensors
from helpers.stand_in_gpu import no_compiler
from merino_edge.errors import InputError
from merino_edge.export.graph import build_model, build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import random_stored, store
from merino_edge.export.targets import Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.graph_io import ONNX_CUDA_TARGET
from merino_edge.runtime import prompt_cache
from merino_edge.runtime.engine import CacheEngine, WindowedEngine
from merino_edge.runtime.engines.convolution_states import SLACK
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.plan_tensors import bound_tensors
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.runtime.session import Session
from merino_edge.tensorrt_library import RTX

FORMS = [("native", "fp16", 0.01), ("primitive", "fp32", 1e-4)]  # and what rounding may change, of the largest logit


@pytest.fixture(scope="module", params=FORMS, ids=lambda form: form[0])
def form(request: pytest.FixtureRequest) -> tuple[dict[int, bytes], float]:
    """The graphs of two capacities by one lowering, and the tolerance."""
    lowering, precision, tolerance = request.param
    target = Target.named("rtx", precision, lowering)
    stored = store(A, WEIGHTS, target)
    return {c: to_bytes(build_stored(A, stored, target, CONTEXT, c)) for c in (160, CONTEXT)}, tolerance


@pytest.fixture
def engine(gpu: FakeDriver, form: tuple[dict[int, bytes], float]) -> Iterator[TensorRtEngine]:
    with contextlib.closing(TensorRtEngine("any", dict(form[0]), A)) as engine:
        yield engine


def close_to(got: np.ndarray | None, wanted: np.ndarray, tolerance: float) -> None:
    assert got is not None
    np.testing.assert_allclose(got, wanted, rtol=0, atol=tolerance * np.abs(wanted).max())


@pytest.mark.parametrize("unified", [False, True])
def test_a_long_sequence_is_computed_as_without_a_cache_and_draft_tokens_may_be_refused(
    gpu: FakeDriver, form: tuple[dict[int, bytes], float], unified: bool
) -> None:
    gpu.set(integrated=int(unified))
    (plans, tolerance), wanted, start = form, expected(TOKENS), 0
    with contextlib.closing(TensorRtEngine("any", dict(plans), A)) as engine:
        for length in (1, 1, 150, 1, 200, 8, 1, 1, 1, 36, 100, 99, 1):  # a second plan takes over in the fifth
            close_to(engine.forward(TOKENS[start : start + length], start), wanted[start + length - 1], tolerance)
            start += length
            assert engine.least_start == max(0, start - SLACK)
        assert start == CONTEXT
        assert gpu.count("cuGraphLaunch") > 0  # steps of one token are recorded with their states
        copies = gpu.count("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2")
        assert (copies <= 8) == unified  # two plans' kernels have four tables
        for back in (1, 2, 8):  # the steps before wrote these positions already
            rows = engine.forward_rows(TOKENS[CONTEXT - back :], CONTEXT - back, back)
            close_to(rows, wanted[CONTEXT - back :], tolerance)
        engine.forward(TOKENS[-SLACK:-1], CONTEXT - SLACK)
        close_to(engine.forward(TOKENS[-1:], CONTEXT - 1), wanted[-1], tolerance)
        candidates = engine.forward_topk(TOKENS[-1:], CONTEXT - 1, 5)
        close_to(candidates.logits.max(), wanted[-1].max(), tolerance)
        for refused in (engine.forward, lambda tokens, start: engine.forward_topk(tokens, start, 5)):
            with pytest.raises(InputError, match="start at 0"):
                refused(TOKENS[300:301], 300)
        close_to(engine.forward(TOKENS[:3], 0), wanted[2], tolerance)
        assert engine.least_start == 0


def test_a_session_goes_on_at_the_end_of_the_prompt_or_starts_again(
    gpu: FakeDriver, form: tuple[dict[int, bytes], float], engine: TensorRtEngine
) -> None:
    plans, tolerance = form
    assert isinstance(engine, WindowedEngine)
    session = Session(engine)
    session.prefill(TOKENS[:300].tolist())
    for token in TOKENS[300 : 300 + SLACK + 50].tolist():
        session.step(token)
    longer = TOKENS[: 300 + SLACK + 60].tolist()
    assert session.first_to_run(longer) == 256  # a prompt is cut at multiples of 128
    with contextlib.closing(TensorRtEngine("any", dict(plans), A)) as other:
        fresh = Session(other)
        np.testing.assert_array_equal(session.prefill(longer), np.copy(fresh.prefill(longer)))  # type: ignore[arg-type]
        np.testing.assert_array_equal(session.step(7), fresh.step(7))
    shorter = [*TOKENS[:200].tolist(), 5, 6, 7]
    assert session.first_to_run(shorter) == 0  # states have left 128
    close_to(session.prefill(shorter), expected(np.array(shorter))[-1], tolerance)


def test_tensorrt_and_onnx_runtime_read_each_others_prompt_caches(
    gpu: FakeDriver, form: tuple[dict[int, bytes], float], tmp_path: Path
) -> None:
    (plans, tolerance), prompt = form, TOKENS[:200].tolist()
    opened = {
        "tensorrt": lambda: TensorRtEngine("any", dict(plans), A),
        "cpu": lambda: OnnxEngine(plans[CONTEXT], A, CONTEXT, 1),
    }
    for name, open_one in opened.items():
        with contextlib.closing(open_one()) as engine:
            assert isinstance(engine, CacheEngine)
            session = Session(engine)
            session.prefill([*prompt, *TOKENS[200:220].tolist()])
            prompt_cache.save(tmp_path / name, session, 200, written_for(A))
    for name, open_one in opened.items():
        for other in opened:
            with contextlib.closing(open_one()) as engine:
                session = Session(engine, exact=False)  # which starts where the file ends
                assert prompt_cache.load(tmp_path / other, session, written_for(A)) == 200
                assert session.first_to_run(prompt) == 199, name
                close_to(session.prefill(prompt), expected(TOKENS[:200])[-1], tolerance)
                close_to(session.step(int(TOKENS[200]))[0], expected(TOKENS[:201])[-1], tolerance)


def test_without_a_recording_or_a_compiler_the_states_are_the_same(
    gpu: FakeDriver, form: tuple[dict[int, bytes], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    results = []
    for cuda_graphs in (True, False):
        if not cuda_graphs:
            no_compiler(monkeypatch)
        with contextlib.closing(TensorRtEngine("any", dict(form[0]), A, cuda_graphs=cuda_graphs)) as engine:
            engine.forward(TOKENS[:9], 0)
            steps = [(at, at + 1) for at in range(9, 16)] + [(11, 12), (12, 15), (15, 16), (2, 3), (3, 4)]
            results.append([engine.forward(TOKENS[start:end], start).copy() for start, end in steps])
    np.testing.assert_array_equal(results[0], results[1])


def test_positions_can_be_marked_as_filled(engine: TensorRtEngine) -> None:
    engine.mark_filled(400)
    assert np.isfinite(engine.forward(TOKENS[:1], 400)).all() and engine.least_start > 0


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_the_form_for_onnx_runtime_on_a_gpu_computes_them_too(precision: str) -> None:
    half, full = (
        OnnxEngine(to_bytes(build_model(A, WEIGHTS, precision, CONTEXT, target)), A, CONTEXT, 1)
        for target in (ONNX_CUDA_TARGET, "onnxruntime")
    )
    for start, end in ((0, 50), (50, 51), (20, 28)):
        wanted = full.forward(TOKENS[start:end], start)
        close_to(half.forward(TOKENS[start:end], start), wanted, 0.01 if precision == "fp16" else 0.05)


@pytest.mark.parametrize(("lowering", "precision"), [("native", "int4"), ("primitive", "fp16")])
def test_nvidias_parser_and_compiler_take_them(lowering: str, precision: str) -> None:
    rtx = pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    target = Target.named("rtx", precision, lowering)
    graph = to_bytes(build_stored(A, random_stored(A, target), target, 128))
    layers = build_engine(RTX, graph, 128, "SM86").layers
    assert layers["KV_CACHE_UPDATE"] == (2 if lowering == "native" else 0)  # of the one layer with attention
    assert sorted(rtx_tensors(rtx, graph)) == sorted(bound_tensors(A, 128, "new_" if lowering == "native" else "row_"))
