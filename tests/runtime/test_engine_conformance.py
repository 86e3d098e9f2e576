"""The engines that run without PyTorch keep what merino_edge.runtime.engine promises."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_conformance import ARCHITECTURE, CONTEXT, WEIGHTS, EngineConformance, NewEngine

from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantize import store
from merino_edge.export.targets import LOWERINGS, Target
from merino_edge.runtime.onnx_engine import OnnxEngine
from merino_edge.runtime.tensorrt_engine import TensorRtEngine

ROUNDING = {"fp32": 1e-5, "fp16": 5e-3}  # ONNX Runtime's CPU keeps fp16 caches and weights in fp16


def graph_of(target: Target, places: int | None = None) -> bytes:
    return to_bytes(build_stored(ARCHITECTURE, store(ARCHITECTURE, WEIGHTS, target), target, CONTEXT, places))


@pytest.mark.parametrize("precision", ROUNDING)
@pytest.mark.parametrize("lowering", LOWERINGS)
class TestOnnxRuntime(EngineConformance):
    @pytest.fixture
    def tolerance(self, precision: str) -> float:
        return ROUNDING[precision]

    @pytest.fixture
    def new_engine(self, lowering: str, precision: str) -> NewEngine:
        graph = graph_of(Target.named("onnxruntime", precision, lowering))
        return lambda: OnnxEngine(graph, ARCHITECTURE, CONTEXT, threads=1)


@pytest.mark.parametrize(("lowering", "precision"), [("native", "fp16"), ("primitive", "fp32")])
@pytest.mark.parametrize("places", [(CONTEXT,), (32, 256, CONTEXT)], ids=["one plan", "three plans"])
class TestTensorRt(EngineConformance):
    """Over the host's memory, with ONNX Runtime in place of TensorRT."""

    @pytest.fixture
    def tolerance(self, precision: str) -> float:
        return ROUNDING[precision]

    @pytest.fixture
    def new_engine(self, host_memory: None, lowering: str, precision: str, places: tuple[int, ...]) -> NewEngine:
        target = Target.named("rtx", precision, lowering)
        plans: dict[int, bytes | Path] = {count: graph_of(target, count) for count in places}
        return lambda: TensorRtEngine("any", plans, ARCHITECTURE)
