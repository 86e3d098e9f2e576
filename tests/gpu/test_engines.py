"""Engines on a GPU give the logits of ONNX Runtime on the CPU: prefill, decode, rewind. Not run on a GPU yet."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Sequence

import numpy as np
import pytest

from helpers import engine_conformance as conformance
from helpers.device_memory import assert_memory_comes_back
from helpers.engine_conformance import EngineConformance, NewEngine
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError, InputError, UnsupportedError
from merino_edge.export.graph import build_model, build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import PLATFORMS, Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.graph_io import ONNX_CUDA_TARGET
from merino_edge.jetson.profiler.backends import BACKENDS, backend_named
from merino_edge.runtime.cuda.cuda import Cuda
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.engines.node_placement import nodes_outside
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine
from merino_edge.runtime.engines.topk_kernel import TOP_K, TopKKernel
from merino_edge.tensorrt_library import EXTRAS
from merino_edge.weights import random_weights

CONTEXT = 1100  # more than two chunks of a prompt, and more than two buckets
A = Architecture(
    300,
    CONTEXT,
    128,
    64,
    (Block(128, 2, 2, 1, 256, shared=True), Block(192, 1, 3, 3, 128)),
    norm="rmsnorm",
    ffn="swiglu",
    positions="rotary",
    rotary_dim=64,
    bias="none",
)
STEPS = ((0, 1050), (1050, 1051), (1051, 1052), (20, 21), (21, 30), (0, 3))  # the later ones rewind
FP16_TOLERANCE = 0.03  # of the largest logit: float16 rounding through a few layers


def assert_equal_steps(
    engine: Engine, reference: Engine, tolerance: float, steps: Sequence[tuple[int, int]] = STEPS
) -> None:
    tokens = np.random.default_rng(0).integers(0, A.vocab_size, CONTEXT)
    for start, end in steps:
        expected = reference.forward(tokens[start:end], start)
        got = engine.forward(tokens[start:end], start)
        np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance * np.abs(expected).max())


def strong_weights() -> dict[str, np.ndarray]:
    return {name: 4 * w if w.ndim > 1 else w for name, w in random_weights(A).items()}


@pytest.mark.parametrize(("lowering", "precision"), [("native", "fp16"), ("primitive", "fp32")])
@pytest.mark.parametrize("library", EXTRAS)
class TestTensorRt(EngineConformance):
    @pytest.fixture
    def tolerance(self) -> float:
        return FP16_TOLERANCE

    @pytest.fixture
    def new_engine(self, library: str, lowering: str, precision: str) -> NewEngine:
        pytest.importorskip(library)
        target, a = Target.named("rtx", precision, lowering), conformance.ARCHITECTURE
        graph = to_bytes(build_stored(a, store(a, conformance.WEIGHTS, target), target, conformance.CONTEXT))
        plans = {conformance.CONTEXT: build_engine(library, graph, conformance.CONTEXT).plan}
        return lambda: TensorRtEngine(library, plans, a)


FORMS = [(lowering, precision) for lowering in ("native", "primitive") for precision in ("fp16", "int8", "int4")]


@pytest.mark.parametrize(("lowering", "precision"), [*FORMS, ("primitive", "fp32")])
@pytest.mark.parametrize("library", EXTRAS)
def test_tensorrt_computes_what_onnxruntime_computes(library: str, lowering: str, precision: str) -> None:
    pytest.importorskip(library)
    graph = to_bytes(build_model(A, strong_weights(), precision, CONTEXT, "rtx", lowering=lowering))
    plan = build_engine(library, graph, CONTEXT).plan
    with contextlib.closing(TensorRtEngine(library, {CONTEXT: plan}, A)) as engine:
        with contextlib.closing(OnnxEngine(graph, A, CONTEXT, 1)) as reference:
            assert_equal_steps(engine, reference, FP16_TOLERANCE)
        for tokens, start in ((np.arange(1), 1099), (np.arange(0), 0), (np.arange(1101), 0)):
            with pytest.raises(InputError):
                engine.forward(tokens, start)
    with pytest.raises(ArtefactError, match="another context"):
        TensorRtEngine(library, {CONTEXT - 1: plan}, A)


@pytest.mark.parametrize("lowering", ["native", "primitive"])
@pytest.mark.parametrize("library", EXTRAS)
def test_a_sequence_outgrows_one_plan_after_the_other(library: str, lowering: str) -> None:
    pytest.importorskip(library)
    target = Target.named("rtx", "fp16", lowering)
    stored = store(A, strong_weights(), target)
    graphs = {capacity: to_bytes(build_stored(A, stored, target, CONTEXT, capacity)) for capacity in (64, 256, CONTEXT)}
    plans = {capacity: build_engine(library, graph, capacity).plan for capacity, graph in graphs.items()}
    engine, reference = TensorRtEngine(library, plans, A), OnnxEngine(graphs[CONTEXT], A, CONTEXT, 1)
    with contextlib.closing(engine), contextlib.closing(reference):
        assert_equal_steps(
            engine, reference, FP16_TOLERANCE, ((0, 60), (60, 64), (64, 65), (65, 300), (300, 301), (9, 12))
        )


@pytest.mark.parametrize("size", [40, 2048, 49_152, 151_936])
def test_the_largest_logits_are_found_on_the_gpu(size: int) -> None:
    rng = np.random.default_rng(size)
    with contextlib.closing(Cuda()) as cuda, cuda.active():
        address = cuda.allocate(4 * size)
        kernel = TopKKernel(cuda, address, size)
        for values in (10, 1000, 10**6):  # few different values: many ties
            logits = rng.standard_normal(values).astype(np.float32)[rng.integers(values, size=size)]
            logits[rng.integers(size, size=2)] = -np.inf
            cuda.to_device(logits, address)
            kernel.queue()
            cuda.synchronize()
            for k in (1, 39, kernel.max_k):
                result, expected = kernel.candidates(k), np.flatnonzero(logits >= np.sort(logits)[-k])
                assert (result is None) == (expected.size >= min(size, TOP_K))
                if result is not None:
                    assert result.ids is not None
                    np.testing.assert_array_equal(result.ids, expected)
                    np.testing.assert_array_equal(result.logits, logits[expected])


@pytest.mark.parametrize("cuda_graphs", [True, False])
@pytest.mark.parametrize("lowering", ["native", "primitive"])
@pytest.mark.parametrize("library", EXTRAS)
def test_a_topk_step_has_the_logits_of_the_row(library: str, lowering: str, cuda_graphs: bool) -> None:
    pytest.importorskip(library)
    graph = to_bytes(build_model(A, strong_weights(), "fp16", CONTEXT, "rtx", lowering=lowering))
    plans = {CONTEXT: build_engine(library, graph, CONTEXT).plan}
    tokens, seen = np.random.default_rng(0).integers(0, A.vocab_size, 60), 0
    with contextlib.closing(TensorRtEngine(library, plans, A, cuda_graphs=cuda_graphs)) as engine:
        engine.forward(tokens[:20], 0)
        for at in range(20, 60):  # steps of both kinds in turn, so that both are recorded and replayed
            row = engine.forward(tokens[at : at + 1], at).copy()
            logits, ids = engine.forward_topk(tokens[at : at + 1], at, 1 + at % 50)
            seen += ids is not None
            if ids is not None:
                np.testing.assert_array_equal(ids, np.flatnonzero(row >= np.sort(row)[-1 - at % 50]))
            np.testing.assert_array_equal(logits, row if ids is None else row[ids])
    assert seen > 30


@pytest.mark.parametrize("precision", PLATFORMS[ONNX_CUDA_TARGET].precisions)
def test_onnxruntime_on_the_gpu_computes_what_it_computes_on_the_cpu(precision: str) -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    graph = to_bytes(build_model(A, strong_weights(), precision, CONTEXT, ONNX_CUDA_TARGET))
    engine, reference = OnnxEngine(graph, A, CONTEXT, 1, device="cuda"), OnnxEngine(graph, A, CONTEXT, 1)
    with contextlib.closing(engine), contextlib.closing(reference):
        on_gpu = nodes_outside("CPUExecutionProvider", engine._session)
        assert on_gpu["GroupQueryAttention"] == A.layers and not engine.cpu_nodes, engine.placement_warning
        assert_equal_steps(engine, reference, FP16_TOLERANCE)
        engine.forward(np.arange(300), 0)
        kept, other = engine.read_cache(300), OnnxEngine(graph, A, CONTEXT, 1, device="cuda")
        with contextlib.closing(other):
            other.write_cache(kept)
            expected = engine.forward(np.arange(1), 300)
            np.testing.assert_allclose(other.forward(np.arange(1), 300), expected, atol=1e-3 * np.abs(expected).max())


def test_onnxruntime_on_the_gpu_refuses_the_graph_of_the_cpu() -> None:
    ort = pytest.importorskip("onnxruntime")
    if "CUDAExecutionProvider" not in ort.get_available_providers():
        pytest.skip("needs onnxruntime-gpu")
    with pytest.raises(UnsupportedError, match="float16 kernels only"):
        OnnxEngine(to_bytes(build_model(A, strong_weights(), "fp32", CONTEXT)), A, CONTEXT, 1, device="cuda")


def test_pytorch_on_the_gpu_computes_what_it_computes_on_the_cpu() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("needs PyTorch built for CUDA")
    from merino_edge.pytorch.engine import TorchEngine
    from merino_edge.pytorch.model import Model

    engine = TorchEngine(Model.from_weights(A, strong_weights()), device="cuda")
    reference = TorchEngine(Model.from_weights(A, strong_weights()))
    with contextlib.closing(engine), contextlib.closing(reference):
        assert_equal_steps(engine, reference, 1e-4)


@pytest.mark.parametrize("name", [b.name for b in BACKENDS.values() if b.device == "cuda"])
def test_a_backend_runs_a_tiny_model(name: str) -> None:
    from merino_edge.errors import MissingExtraError, UnsupportedError

    try:
        backend_named(name).check("fp16")
    except (MissingExtraError, UnsupportedError) as refusal:
        pytest.skip(str(refusal))


def test_memory_comes_back_as_it_was_sent() -> None:
    with contextlib.closing(Cuda()) as cuda, cuda.active():
        assert re.fullmatch(r"SM\d{2,3}", cuda.capability)
        assert_memory_comes_back(cuda)
