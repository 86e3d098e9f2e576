"""The engines that run without PyTorch follow the protocol of merino_edge.runtime.engine."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from numpy.testing import assert_allclose

from helpers.engine_conformance import ARCHITECTURE, CONTEXT, TOKENS, WEIGHTS, EngineConformance, NewEngine
from helpers.fake_driver import FakeDriver
from helpers.one_row_graph import one_row
from helpers.random_model import random_model
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.lowerings.ort import MAX_INT8_ATTENTION_TOKENS
from merino_edge.export.quantization.calibration import cache_absmax
from merino_edge.export.quantization.smoothing import smooth_attention
from merino_edge.export.quantization.stored_weights import cache_scales, store
from merino_edge.export.targets import LOWERINGS, Target
from merino_edge.graph_io import MAX_LOGIT_ROWS
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.onnx_session import FIRST_WITH_INT8_CACHE, FIRST_WITH_TENSOR_SCATTER, installed_version
from merino_edge.runtime.engines.tensorrt_engine import TensorRtEngine

Smooth = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
FLOAT_CACHE = Target.named("onnxruntime", "fp32", "ort")
# What an int8 KV cache may change, as a part of the largest logit: over several steps, and in a single one.
ROUNDED, AT_ONCE = 0.02, 0.005
# With stronger weights, attention changes too much at a rounded score.
GENTLE = random_model(ARCHITECTURE, strength=0.7)
ROUNDING = {"fp32": 1e-5, "fp16": 5e-3}  # ONNX Runtime's CPU keeps fp16 caches and weights in fp16


@cache
def graph_of(target: Target, capacity: int | None = None) -> bytes:
    return graph_with(WEIGHTS, target, capacity)


def graph_with(weights: Mapping[str, np.ndarray], target: Target, capacity: int | None = None) -> bytes:
    return to_bytes(build_stored(ARCHITECTURE, store(ARCHITECTURE, weights, target), target, CONTEXT, capacity))


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("lowering", LOWERINGS)
class TestOnnxRuntime(EngineConformance):
    @pytest.fixture
    def tolerance(self, precision: str) -> float:
        return ROUNDING[precision]

    @pytest.fixture
    def new_engine(self, lowering: str, precision: str) -> NewEngine:
        if lowering == "native" and installed_version() < FIRST_WITH_TENSOR_SCATTER:
            pytest.skip("this ONNX Runtime has no TensorScatter")
        graph = graph_of(Target.named("onnxruntime", precision, lowering))
        return lambda: OnnxEngine(graph, ARCHITECTURE, CONTEXT, threads=1)


@pytest.fixture(scope="module")
def smooth() -> Smooth:
    """Weights smoothed as in an export with an int8 cache, and the range of the cached values on TOKENS."""
    torch = pytest.importorskip("torch")
    from merino_edge.pytorch.model import KVCache, Model

    cache = KVCache(ARCHITECTURE)
    with torch.inference_mode():
        Model.from_weights(ARCHITECTURE, GENTLE)(torch.from_numpy(TOKENS)[None], cache)
    return smooth_attention(ARCHITECTURE, GENTLE, cache_absmax(ARCHITECTURE, cache), smooth_values=True)


@pytest.mark.skipif(installed_version() < FIRST_WITH_INT8_CACHE, reason="this ONNX Runtime has no int8 KV cache")
class TestInt8Cache(EngineConformance):
    """With float weights, so that only the cache is rounded."""

    @pytest.fixture
    def tolerance(self) -> float:
        return ROUNDED + AT_ONCE

    @pytest.fixture
    def floating(self, smooth: Smooth) -> Iterator[OnnxEngine]:
        graph = graph_with(smooth[0], FLOAT_CACHE)
        with contextlib.closing(OnnxEngine(graph, ARCHITECTURE, CONTEXT, threads=1)) as engine:
            engine.forward(TOKENS, 0)
            yield engine

    @pytest.fixture
    def scales(self, smooth: Smooth) -> dict[str, np.ndarray]:
        return cache_scales(smooth[1])

    @pytest.fixture
    def new_engine(self, smooth: Smooth, scales: dict[str, np.ndarray]) -> NewEngine:
        target = replace(FLOAT_CACHE, cache="int8")
        stored = replace(store(ARCHITECTURE, smooth[0], target), cache_scales=scales)
        graph = to_bytes(build_stored(ARCHITECTURE, stored, target, CONTEXT))
        return lambda: OnnxEngine(graph, ARCHITECTURE, CONTEXT, threads=1)

    @pytest.mark.parametrize("together", [1, MAX_INT8_ATTENTION_TOKENS, MAX_INT8_ATTENTION_TOKENS + 1, CONTEXT])
    def test_its_codes_are_closest_to_the_values_of_a_float_cache(
        self, engine: OnnxEngine, floating: OnnxEngine, scales: dict[str, np.ndarray], together: int
    ) -> None:
        for start in range(0, CONTEXT, together):
            some = TOKENS[start : start + together]
            rounded, exact_logits = engine.forward(some, start), floating.forward(some, start)
            allowed = ROUNDED if together < CONTEXT else AT_ONCE
            assert_allclose(rounded, exact_logits, rtol=0, atol=allowed * np.abs(exact_logits).max())
        parts = zip(engine.read_cache(CONTEXT), floating.read_cache(CONTEXT), scales.values(), strict=True)
        for index, (codes, exact, scale) in enumerate(parts):
            assert codes.dtype == np.int8 and codes.shape == exact.shape
            off = np.abs(codes - exact / scale)
            assert np.median(off) < 1
            assert index >= 2 or off.max() < 0.501  # later layers see the rounding of the first one

    def test_an_older_onnx_runtime_is_refused(self, new_engine: NewEngine, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("merino_edge.runtime.engines.onnx_engine.installed_version", lambda: (1, 26))
        with pytest.raises(UnsupportedError, match=r"needs ONNX Runtime 1\.27") as caught:
            new_engine()
        assert "--cache float" in caught.value.hint


@pytest.mark.parametrize(("lowering", "precision"), [("native", "fp16"), ("primitive", "fp32")])
@pytest.mark.parametrize("capacities", [(CONTEXT,), (32, 256, CONTEXT)], ids=["one plan", "three plans"])
class TestTensorRt(EngineConformance):
    """On the strict driver through each package that calls it, with ONNX Runtime in place of TensorRT."""

    max_rows = MAX_LOGIT_ROWS

    @pytest.fixture
    def tolerance(self, precision: str) -> float:
        return ROUNDING[precision]

    @pytest.fixture
    def new_engine(
        self, gpu: FakeDriver, package: str, lowering: str, precision: str, capacities: tuple[int, ...]
    ) -> NewEngine:
        target = Target.named("rtx", precision, lowering)
        plans: dict[int, bytes | Path] = {count: self.form(graph_of(target, count)) for count in capacities}
        return lambda: TensorRtEngine("any", plans, ARCHITECTURE)

    def form(self, graph: bytes) -> bytes:
        return graph

    def test_it_gives_as_many_rows_as_its_graph(self, engine: TensorRtEngine) -> None:
        assert engine.max_rows == self.max_rows
        with pytest.raises(InputError, match=f"this engine gives at most {self.max_rows}"):
            engine.forward_rows(TOKENS[:10], 0, self.max_rows + 1)


class TestTensorRtOfAnOlderBundle(TestTensorRt):
    """Its graph gives one row of logits, and has no input for rows."""

    max_rows = 1

    def form(self, graph: bytes) -> bytes:
        return one_row(graph)


@pytest.mark.parametrize("lowering", ["native", "primitive"])
class TestOnnxRuntimeOfAnOlderBundle(EngineConformance):
    """The graph of an older bundle for TensorRT."""

    @pytest.fixture
    def tolerance(self) -> float:
        return ROUNDING["fp16"]

    @pytest.fixture
    def new_engine(self, lowering: str) -> NewEngine:
        if lowering == "native" and installed_version() < FIRST_WITH_TENSOR_SCATTER:
            pytest.skip("this ONNX Runtime has no TensorScatter")
        graph = one_row(graph_of(Target.named("rtx", "fp16", lowering)))
        return lambda: OnnxEngine(graph, ARCHITECTURE, CONTEXT, threads=1)

    def test_it_gives_one_row(self, engine: OnnxEngine) -> None:
        assert engine.max_rows == 1
