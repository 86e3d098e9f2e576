"""Every backend runs the model it was asked for, reads the cache it says it reads, and refuses what it cannot run."""

from __future__ import annotations

import contextlib
import re
import subprocess
import sys
from importlib.metadata import version

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.fake_driver import FakeDriver
from merino_edge.architecture import Architecture, Block
from merino_edge.counts import PRECISIONS
from merino_edge.errors import InputError, MerinoError, MissingExtraError, UnsupportedError
from merino_edge.jetson.profiler.backends import BACKENDS, Backend, backend_named
from merino_edge.runtime.engines.onnx_engine import OnnxEngine

SMALL = Architecture(40, 1100, 64, 32, (Block(64, 2, 2, 1, 96, shared=True), Block(96, 1, 3, 3, 64)))
ON_CPU = [(b.name, p) for b in BACKENDS.values() if b.device == "cpu" for p in b.precisions]
# int8 and int4 kernels round activations to int8; float16 has 11 bits
LOOSE = {("onnxruntime-cpu", "int8"): 0.05, ("onnxruntime-cpu", "int4"): 0.05, ("torch-cpu", "fp16"): 0.01}


def skip_without_pytorch(backend: str) -> None:
    """A board has no PyTorch (make test-board)."""
    if backend.startswith("torch"):
        pytest.importorskip("torch")


@pytest.mark.parametrize(("name", "precision"), ON_CPU)
def test_a_backend_runs_what_it_was_asked_for(name: str, precision: str) -> None:
    skip_without_pytorch(name)
    backend = backend_named(name)
    backend.check(precision)
    with contextlib.closing(backend.engine(SMALL, precision, 1)) as engine:
        assert (engine.vocab_size, engine.max_positions) == (SMALL.vocab_size, SMALL.max_positions)
        whole = engine.forward(np.arange(9, dtype=np.int64), 0).copy()
        stepwise = [engine.forward(np.array([token]), token).copy() for token in range(9)][-1]  # from 0: a rewind
    assert whole.shape == (SMALL.vocab_size,) and whole.dtype == np.float32
    assert np.isfinite(whole).all() and whole.std() > 0
    np.testing.assert_allclose(stepwise, whole, atol=LOOSE.get((name, precision), 1e-5) * np.abs(whole).max())


@pytest.mark.parametrize("name", ["onnxruntime-cpu", "torch-cpu"])
def test_a_step_runs_at_any_length_that_is_assumed(name: str) -> None:
    skip_without_pytorch(name)
    with contextlib.closing(backend_named(name).engine(SMALL, "fp32", 1)) as engine:
        for length in (0, 1099, 300):
            engine.mark_filled(length)
            assert np.isfinite(engine.forward(np.zeros(1, np.int64), length)).all()
        with pytest.raises(InputError):
            engine.forward(np.zeros(1, np.int64), 302)


def test_threads_are_those_asked_for() -> None:
    for threads in (2, 1):
        with contextlib.closing(backend_named("onnxruntime-cpu").engine(SMALL, "fp32", threads)) as engine:
            assert isinstance(engine, OnnxEngine) and engine.threads == threads


@pytest.mark.parametrize("backend", BACKENDS.values(), ids=BACKENDS)
def test_a_step_reads_the_positions_in_use_except_where_a_graph_fixes_the_cache(backend: Backend) -> None:
    assert backend.cache_capacity(300, 1100) == (1100 if backend.name.startswith("tensorrt") else 300)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 599), st.integers(0, 599))
def test_onnxruntime_reads_no_place_beyond_the_positions_in_use(length: int, more: int) -> None:
    """What would make a step's cost depend on them: cache_capacity never written hold what is no number."""
    with contextlib.closing(backend_named("onnxruntime-cpu").engine(SMALL, "fp32", 1)) as engine:
        assert isinstance(engine, OnnxEngine)
        engine.mark_filled(min(length + more, SMALL.max_positions))  # a larger cache than the step needs
        for cache in engine._arrays:
            cache[:, :, length:] = np.nan
        engine.mark_filled(length)
        assert np.isfinite(engine.forward(np.zeros(1, np.int64), length)).all()


def test_versions_are_those_installed() -> None:
    versions = backend_named("onnxruntime-cpu").versions()
    assert versions == {name: version(name) for name in ("numpy", "onnxruntime", "onnx-ir")}
    for backend in BACKENDS.values():
        assert set(backend.libraries) <= set(backend.versions()) and all(backend.versions().values())


def test_the_driver_is_called_by_the_package_that_a_table_names(fake_driver: FakeDriver, package: str) -> None:
    for name in ("tensorrt", "tensorrt-rtx"):
        versions = backend_named(name).versions()
        used, other = ("PyCUDA", "cuda-bindings") if package == "pycuda" else ("cuda-bindings", "PyCUDA")
        assert versions[used] == version(used) and other not in versions


def test_without_a_gpu_no_package_is_named(fake_driver: FakeDriver) -> None:
    fake_driver.set(devices=0)
    assert list(backend_named("tensorrt").versions()) == list(backend_named("tensorrt").libraries)


def test_a_backend_goes_by_its_name_only() -> None:
    assert all(backend_named(name) is BACKENDS[name] and BACKENDS[name].name == name for name in BACKENDS)
    with pytest.raises(
        UnsupportedError, match="choose one of onnxruntime-cpu, onnxruntime-cuda, tensorrt, "
    ) as refusal:
        backend_named("onnxruntime")
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", BACKENDS)
def test_a_precision_it_cannot_time_is_refused(name: str) -> None:
    foreign = [p for p in (*PRECISIONS, "fp8") if p not in BACKENDS[name].precisions]
    for precision in foreign:
        with pytest.raises(UnsupportedError, match=f"{name} cannot time {precision}; choose --precision "):
            backend_named(name).engine(SMALL, precision, 1)


def test_a_model_that_one_graph_cannot_hold_is_refused() -> None:
    huge = Architecture(1_000_000, 16, 64 * 9, 64, (Block(64 * 9, 1, 9, 9, 64),))
    with pytest.raises(UnsupportedError, match="parameters at fp32 are more than one graph of 2 GB holds"):
        backend_named("onnxruntime-cpu").engine(huge, "fp32", 1)


def refusal_of(name: str) -> MerinoError | None:
    try:
        backend_named(name).check("fp16")
    except MerinoError as refusal:
        return refusal
    return None


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("onnxruntime-cuda", "ONNX Runtime [0-9.]+ (is built without CUDA|cannot load its CUDA provider); "),
        ("tensorrt", "the package (tensorrt|cuda-bindings), which is not installed; run: pip |CUDA .*; "),
        # The strict driver of other tests, once it is loaded, is an Orin's: SM87.
        ("tensorrt-rtx", "bindings, which is not installed; run: pip |CUDA .*; |RTX has no kernels for SM87: .*; "),
        ("torch-cuda", "the package torch, which is not installed; run: pip |PyTorch .* finds no CUDA GPU; "),
    ],
)
def test_without_a_gpu_or_its_package_it_says_which(name: str, missing: str) -> None:
    refusal = refusal_of(name)
    if refusal is None:
        pytest.skip("this machine has what the backend needs; tests/gpu runs it")
    assert isinstance(refusal, MissingExtraError | UnsupportedError)
    assert re.search(missing, str(refusal)) and "\n" not in str(refusal), refusal


def test_no_library_is_imported_before_its_engine_is_opened() -> None:
    heavy = ("torch", "onnxruntime", "onnx_ir", "onnx", "tensorrt_rtx_bindings", "cuda.bindings.runtime")
    code = f"import sys, merino_edge.jetson.profiler.backends; print([m for m in {heavy!r} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "[]"


def test_onnxruntime_needs_no_torch() -> None:
    code = (
        "import sys, merino_edge.jetson.profiler.backends as b; b.backend_named('onnxruntime-cpu').check('int4');"
        "print('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"
