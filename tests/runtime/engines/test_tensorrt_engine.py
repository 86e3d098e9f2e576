"""Tests of the TensorRT engine without a GPU; tests/gpu runs it on one.

Its buffers are those of the graph as NVIDIA's parser reads it, and NVIDIA's compiler builds its plans. All its calls
exist in NVIDIA's bindings (tests/benchmarks/test_tensorrt_names.py). With the host's memory and ONNX Runtime in place
of TensorRT it computes the right logits.
"""

from __future__ import annotations

import contextlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.fake_driver import FakeDriver
from helpers.stand_in_gpu import COMPILER, PROFILES, Context, no_compiler
from merino_edge import bundle, tensorrt_library
from merino_edge.architecture import Architecture, Block
from merino_edge.engine_store import add_stored, engines_of
from merino_edge.errors import ArtefactError, InputError, MerinoError, UnsupportedError
from merino_edge.export.graph import build_model, build_stored, cache_names, to_bytes
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.export.tensorrt import build_engine, use_timing_cache
from merino_edge.runtime.cuda.compiler import compiled
from merino_edge.runtime.engines import kv_scatter_kernel, onnx_engine, tensorrt_engine, topk_kernel
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.plan_tensors import Tensor, bound_tensors, buffer_bytes, owner
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.store_limit import remove_least_used
from merino_edge.tensorrt_library import RTX, TENSORRT
from merino_edge.weights import random_weights

LOWERINGS = [("native", "fp16"), ("primitive", "fp16"), ("primitive", "fp32")]
A = Architecture(40, 64, 128, 64, (Block(128, 2, 2, 1, 96, shared=True), Block(192, 1, 3, 3, 64)))


@pytest.fixture(scope="module")
def rtx() -> Any:
    return pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")


@pytest.fixture(scope="module")
def graph() -> bytes:
    return to_bytes(build_model(A, random_weights(A), "fp16", 48, "rtx"))


@pytest.mark.parametrize(("lowering", "precision"), LOWERINGS)
def test_the_parser_finds_the_tensors_that_are_bound(rtx: Any, lowering: str, precision: str) -> None:
    graph = to_bytes(build_model(A, random_weights(A), precision, 48, "rtx", lowering=lowering))
    log = rtx.Logger(rtx.Logger.ERROR)
    network = rtx.Builder(log).create_network(0)
    parser = rtx.OnnxParser(network, log)
    assert parser.parse(graph)
    io_tensors = [network.get_input(i) for i in range(network.num_inputs)]
    io_tensors += [network.get_output(i) for i in range(network.num_outputs)]
    tensors = [Tensor(t.name, tuple(t.shape), np.dtype(rtx.nptype(t.dtype)).name) for t in io_tensors]
    prefix, dtype = ("new_" if lowering == "native" else "row_"), ("float32" if precision == "fp32" else "float16")
    assert sorted(tensors) == sorted(bound_tensors(A, 48, prefix, dtype))


@given(st.lists(st.integers(1, 3), min_size=1, max_size=3), st.integers(1, 99), st.integers(1, 64))
def test_an_updated_cache_lies_where_the_cache_lies(layers: list[int], context: int, longest: int) -> None:
    a = Architecture(40, 100, 64, 32, tuple(Block(64, n, 2, 1, 64, n == 2) for n in layers))
    tensors = bound_tensors(a, context)
    assert len({t.name for t in tensors}) == len(tensors) == 4 + 4 * a.layers
    sizes = buffer_bytes(tensors, longest, 5)
    assert set(sizes) == {"tokens", "positions", "logit_rows", "logits", *(name for name, _ in cache_names(a))}
    assert all(owner(new) == owner(name) == name for name, new in cache_names(a))
    assert sizes["tokens"] == sizes["positions"] == 8 * longest
    assert sizes["logit_rows"] == 8 * 5 and sizes["logits"] == 4 * 40 * 5
    assert sum(sizes[name] for name, _ in cache_names(a)) == 2 * 2 * 32 * context * a.layers  # float16, one head of 32


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
@pytest.mark.parametrize("context", [1, 48])
def test_nvidias_compiler_builds_it(rtx: Any, precision: str, context: int) -> None:
    graph = to_bytes(build_model(A, random_weights(A), precision, context, "rtx"))
    assert len(build_engine(RTX, graph, context, "SM86").plan) > A.weight_bytes(precision)


@pytest.mark.filterwarnings("ignore:Use Deprecated in TensorRT-RTX:DeprecationWarning")
def test_timings_of_kernels_that_do_not_fit_are_left_unused(rtx: Any) -> None:
    trt, log = tensorrt_library.load(RTX)
    builder = trt.Builder(log)
    fresh = bytes(builder.create_builder_config().create_timing_cache(b"").serialize())
    for timings in (b"", b"something else", fresh):
        config = builder.create_builder_config()
        use_timing_cache(config, timings, log)
        assert config.get_timing_cache() is not None and log.first == tensorrt_library.NO_REASON


@pytest.mark.filterwarnings("ignore")
def test_what_it_cannot_build_is_one_line(rtx: Any, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UnsupportedError, match="cannot parse the graph") as refusal:
        build_engine(RTX, b"no graph", 48, "SM86")
    assert "\n" not in str(refusal.value)
    odd = Architecture(40, 64, 24, 12, (Block(24, 1, 2, 2, 24),))  # NVIDIA cannot lay out heads of 12
    with pytest.raises(UnsupportedError, match="cannot compile the graph") as refusal:
        build_engine(RTX, to_bytes(build_model(odd, random_weights(odd), "fp16", 48, "rtx")), 48, "SM86")
    assert "\n" not in str(refusal.value)


def test_without_a_gpu_it_is_refused_in_one_line(rtx: Any) -> None:
    with pytest.raises(MerinoError, match=r"cuda-bindings|CUDA|cannot load the engine") as refusal:
        TensorRtEngine(RTX, {48: b""}, A)  # with a GPU, the empty plan is refused
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("unified", [False, True])
@pytest.mark.parametrize(("lowering", "precision"), LOWERINGS)
def test_steps_chunks_and_rewinds_over_bound_addresses(
    gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch, lowering: str, precision: str, unified: bool
) -> None:
    """With unified memory nothing is copied."""
    gpu.set(integrated=int(unified))
    monkeypatch.setattr(
        onnx_engine, "PREFILL_CHUNK", PROFILES[0]
    )  # as in the stand-in for TensorRT, so that rounding is the same
    context = 1100
    a = Architecture(60, context, 64, 64, (Block(64, 2, 1, 1, 64, shared=True),))
    graph = to_bytes(build_model(a, random_weights(a), precision, context, "rtx", lowering=lowering))
    tokens = np.random.default_rng(0).integers(0, a.vocab_size, context)
    engine, reference = TensorRtEngine("any", {context: graph}, a), OnnxEngine(graph, a, context, 1)
    with contextlib.closing(engine), contextlib.closing(reference):
        for start, end in ((0, 1), (1, 2), (2, 4), (4, 1090), (1090, 1091), (700, 703), (703, 1100), (0, 1100)):
            expected = reference.forward(tokens[start:end], start)
            np.testing.assert_array_equal(engine.forward(tokens[start:end], start), expected)
        engine.mark_filled(7)  # these positions still hold the right keys and values
        np.testing.assert_array_equal(engine.forward(tokens[7:8], 7), reference.forward(tokens[7:8], 7))
        for first, start in ((0, 9), (0, 1100), (0, -1), (1100, 0)):
            with pytest.raises(InputError):
                engine.forward(tokens[first:], start)
    engine.close()
    with pytest.raises(InputError):
        engine.forward(tokens[:1], 0)
    assert gpu.held().keys() <= {"contexts"}
    assert (gpu.count("cuMemcpyHtoDAsync_v2", "cuMemcpyDtoHAsync_v2") <= 4) == unified  # a kernel's four tables


@pytest.mark.parametrize("lowering", ["native", "primitive"])
def test_steps_of_one_token_are_recorded_once_and_launched(
    gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch, lowering: str
) -> None:
    a = Architecture(60, 64, 64, 64, (Block(64, 2, 1, 1, 64, shared=True),))
    plans: dict[int, bytes | Path] = {
        64: to_bytes(build_model(a, random_weights(a), "fp16", 64, "rtx", lowering=lowering))
    }
    tokens, results = np.random.default_rng(0).integers(0, a.vocab_size, 64), []
    for cuda_graphs, can_record, counts in ((True, True, (1, 12)), (True, False, (1, 0)), (False, True, (0, 0))):
        monkeypatch.setattr(Context, "can_record", can_record)
        gpu.reset()
        with contextlib.closing(TensorRtEngine("any", plans, a, cuda_graphs=cuda_graphs)) as engine:
            steps = [(0, 9), *((i, i + 1) for i in range(9, 16)), (16, 18), *((i, i + 1) for i in range(18, 24))]
            results.append([engine.forward(tokens[start:end], start).copy() for start, end in steps])
        assert (gpu.count("cuStreamBeginCapture_v2"), gpu.count("cuGraphLaunch")) == counts
    np.testing.assert_array_equal(results[1], results[0])
    np.testing.assert_array_equal(results[2], results[0])


def test_the_kv_scatter_kernel_writes_what_copies_write(gpu: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the kernel's source, compiled for the host."""
    if not COMPILER:
        pytest.skip("needs a compiler")
    target = Target.named("rtx", "fp16", "primitive")
    plans: dict[int, bytes | Path] = {}
    for capacity in (16, 40):
        graph = build_stored(A, store(A, random_weights(A), target), target, 40, capacity)
        plans[capacity] = to_bytes(graph)
    tokens, results = np.random.default_rng(0).integers(0, A.vocab_size, 40), []
    for can_compile in (True, False):
        if not can_compile:
            no_compiler(monkeypatch)
        with contextlib.closing(TensorRtEngine("any", plans, A)) as engine:
            steps = [(0, 5), *((i, i + 1) for i in range(5, 39)), (7, 8), (8, 11), (11, 12)]
            results.append([engine.forward(tokens[start:end], start).copy() for start, end in steps])
        assert gpu.count("run scatter_kv") == 36  # nothing more without a compiler
    np.testing.assert_array_equal(results[0], results[1])


@pytest.mark.parametrize("kernel", [kv_scatter_kernel, topk_kernel])
def test_cudas_compiler_takes_the_kernel(kernel: Any) -> None:
    nvrtc = pytest.importorskip("cuda.bindings.nvrtc", reason="needs the package cuda-bindings")
    try:
        _, known = nvrtc.nvrtcGetSupportedArchs()
    except RuntimeError as missing:
        pytest.skip(str(missing))
    assert 87 in known
    for number in (72, 87, 101, 110):  # CUDA 13 has dropped Xavier's and renamed Thor's
        if number in known:
            assert kernel.NAME.encode() in compiled(kernel.SOURCE, kernel.NAME, f"SM{number}")
        else:
            with pytest.raises(UnsupportedError, match=f"compiles for sm_.*, not for sm_{number};") as refusal:
                compiled(kernel.SOURCE, kernel.NAME, f"SM{number}")
            assert "CUDA toolkit" in refusal.value.hint


def graphs_of(a: Architecture, target: Target, *capacities: int) -> dict[int, bytes]:
    """One graph for each capacity, with the same weights."""
    stored = store(a, random_weights(a), target)
    return {count: to_bytes(build_stored(a, stored, target, max(capacities), count)) for count in capacities}


@pytest.mark.parametrize(("lowering", "precision"), LOWERINGS)
def test_a_sequence_outgrows_one_plan_after_the_other(gpu: FakeDriver, lowering: str, precision: str) -> None:
    a = Architecture(60, 96, 64, 64, (Block(64, 2, 1, 1, 64, shared=True), Block(192, 1, 3, 3, 64)))
    graphs = graphs_of(a, Target.named("rtx", precision, lowering), 8, 32, 96)
    tokens = np.random.default_rng(0).integers(0, a.vocab_size, 96)
    steps = ((0, 5), (5, 8), (8, 9), (9, 32), (4, 6), (6, 33), (33, 96), (0, 3))
    engine, reference = TensorRtEngine("any", graphs, a), OnnxEngine(graphs[96], a, 96, 1)
    with contextlib.closing(engine), contextlib.closing(reference):
        assert engine.max_positions == 96
        for start, end in steps:
            expected = reference.forward(tokens[start:end], start)
            got = engine.forward(tokens[start:end], start)
            np.testing.assert_allclose(got, expected, rtol=0, atol=2e-3 * np.abs(expected).max())
        tables = 4 if COMPILER else 0  # of the kernel
        rows = 2 * a.layers + tables if lowering == "primitive" else 0
        topk = 1 if COMPILER else 0  # results of the top-k kernel
        buffers = len(buffer_bytes(bound_tensors(a, 96), 1, 1)) + 1  # one-token steps have an index of their own
        assert 0 < gpu.held()["memory"] - 5 == buffers + rows + topk  # of one plan; 5 are pinned: inputs, logits, top k
        with pytest.raises(InputError):
            engine.forward(tokens[:1], 97)
    assert gpu.held().keys() <= {"contexts"}


def test_a_bundle_runs_on_its_engines_for_this_gpu(
    gpu: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = Architecture(60, 32, 64, 64, (Block(64, 2, 1, 1, 64, shared=True),))
    graphs = graphs_of(a, Target.named("rtx", "fp16"), 8, 32)
    for name, content in (("model.onnx", graphs[32]), ("model-8.onnx", graphs[8])):
        (tmp_path / name).write_bytes(content)
    for name in ("tokenizer.json", "chat.json"):
        (tmp_path / name).write_text(name)
    bundle.write_manifest(tmp_path, a, "fp16", "rtx", 32, contexts=[8, 32])
    loaded = bundle.load(tmp_path)
    for capability, context in (("SM86", 32), ("SM86", 8), ("SM89", 32)):
        files = loaded.manifest["files"]
        entry = {"library": RTX, "version": "0", "capability": capability, "context": context}
        entry["onnx_sha256"] = files[loaded.graph_of(context).name]["sha256"]
        plan = graphs[context] if capability == "SM86" else b"no plan"
        loaded = bundle.add_engine(loaded, plan, entry, lambda old: False)
    newest = {**entry, "library": TENSORRT, "capability": "SM86"}  # that is not installed, as on another machine
    loaded = bundle.add_engine(loaded, b"of full TensorRT", newest, lambda old: False)
    monkeypatch.setattr(tensorrt_library, "is_installed", lambda library: library == RTX)
    monkeypatch.setattr(tensorrt_engine, "gpu_capability", lambda: "SM86")
    tokens = np.arange(32)
    engine, reference = TensorRtEngine.from_bundle(loaded), OnnxEngine(graphs[32], a, 32, 1)
    with contextlib.closing(engine), contextlib.closing(reference):
        for start, end in ((0, 7), (7, 8), (8, 32)):
            expected = reference.forward(tokens[start:end], start)
            np.testing.assert_allclose(engine.forward(tokens[start:end], start), expected, atol=2e-3)
    monkeypatch.setattr(tensorrt_engine, "gpu_capability", lambda: "SM87")
    with pytest.raises(UnsupportedError, match="has engines for SM86, this GPU is SM87"):  # those of the newest's
        TensorRtEngine.from_bundle(loaded)
    loaded = bundle.add_engine(loaded, b"no plan", entry, lambda old: old["library"] == TENSORRT)
    with pytest.raises(UnsupportedError, match="has engines for SM86, SM89, this GPU is SM87") as refusal:
        TensorRtEngine.from_bundle(loaded)
    assert refusal.value.hint == f"build it again: merino-edge build {tmp_path}"
    assert gpu.held().keys() <= {"contexts"}


def test_engines_of_the_store_stay_there_while_they_are_open(
    gpu: FakeDriver, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, store = Architecture(60, 32, 64, 64, (Block(64, 2, 1, 1, 64, shared=True),)), tmp_path / "store"
    monkeypatch.setenv("MERINO_ENGINES", str(store))
    monkeypatch.setenv("MERINO_ENGINES_GB", "0.000001")
    graphs = graphs_of(a, Target.named("rtx", "fp16"), 8, 32)
    (tmp_path / "bundle").mkdir()
    files = {"model.onnx": graphs[32], "model-8.onnx": graphs[8], "tokenizer.json": b"", "chat.json": b""}
    for name, content in files.items():
        (tmp_path / "bundle" / name).write_bytes(content)
    bundle.write_manifest(tmp_path / "bundle", a, "fp16", "rtx", 32, contexts=[8, 32])
    loaded = bundle.load(tmp_path / "bundle")
    for context in (8, 32):
        (onnx_sha256,) = loaded.onnx_sha256s(context)
        entry = {"library": RTX, "version": "0", "capability": "SM86", "context": context, "onnx_sha256": onnx_sha256}
        add_stored(store, loaded.graph_sha256(context), graphs[context], entry)
    monkeypatch.setattr(tensorrt_engine, "gpu_capability", lambda: "SM86")
    with contextlib.closing(TensorRtEngine.from_bundle(loaded)) as engine:
        assert remove_least_used(store, []) == ""
        engine.forward(np.arange(8), 0)
        engine.forward(np.arange(9), 8)  # opens the second
    used = {built.entry["context"]: built.path.stat().st_mtime_ns for built in engines_of(loaded)}
    assert used[8] < used[32]  # the smallest would leave first
    assert remove_least_used(store, []) and engines_of(loaded) == []


def test_an_engine_of_another_model_is_refused_and_leaves_no_memory(gpu: FakeDriver, graph: bytes) -> None:
    for a, context in ((A, 64), (replace(A, vocab_size=41), 48), (replace(A, blocks=A.blocks[:1]), 48)):
        with pytest.raises(ArtefactError, match="built from another model, or for another context"):
            TensorRtEngine("any", {context: graph}, a)
    TensorRtEngine("any", {48: graph}, A).close()
    assert gpu.held().keys() <= {"contexts"}
