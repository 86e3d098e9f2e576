"""What ONNX Runtime says about the provider of each node is read right. A session on the CPU says it, too."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import onnxruntime as ort
import pytest

from merino_edge.architecture import Architecture, Block
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.graph_io import ONNX_CUDA_TARGET
from merino_edge.runtime.engines import node_placement, onnx_session
from merino_edge.runtime.engines.node_placement import INDEX_NODES, cpu_nodes, nodes_outside, warning
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.weights import random_weights

A = Architecture(40, 64, 64, 32, (Block(64, 3, 2, 1, 96),))


def graph_for(target: str, precision: str) -> bytes:
    return to_bytes(build_model(A, random_weights(A), precision, 64, target))


@pytest.fixture(scope="module")
def session() -> Any:
    options = ort.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    opened = ort.InferenceSession(graph_for(ONNX_CUDA_TARGET, "fp16"), options, ["CPUExecutionProvider"])
    if not hasattr(opened, "get_provider_graph_assignment_info"):
        pytest.skip("this ONNX Runtime does not tell")
    return opened


def test_every_node_of_a_session_on_the_cpu_is_outside_cuda(session: Any) -> None:
    outside = nodes_outside("CUDAExecutionProvider", session)
    assert outside["GroupQueryAttention"] == A.layers and sum(outside.values()) > 10 * A.layers
    assert not nodes_outside("CPUExecutionProvider", session)
    named = cpu_nodes(session)
    assert named["GroupQueryAttention"] == A.layers
    assert sum(outside.values()) - sum(named.values()) <= sum(INDEX_NODES.values())
    assert f"{A.layers} GroupQueryAttention" in warning(session) and "\n" not in warning(session)


def recorded(*providers: tuple[str, list[str]]) -> Any:
    """A session with the placement that a GPU would record."""
    subgraphs = [
        SimpleNamespace(ep_name=name, get_nodes=lambda kinds=kinds: [SimpleNamespace(op_type=k) for k in kinds])
        for name, kinds in providers
    ]
    return SimpleNamespace(get_provider_graph_assignment_info=lambda: subgraphs)


def test_only_whole_numbers_on_the_cpu_are_as_it_should_be() -> None:
    on_gpu = ("CUDAExecutionProvider", ["GroupQueryAttention", "MatMul", "Cast", "Cast"])
    assert warning(recorded(on_gpu, ("CPUExecutionProvider", ["Slice", "Reshape", "Cast", "Add", "Neg"]))) == ""
    fell = warning(recorded(on_gpu, ("CPUExecutionProvider", ["Cast", "Cast", "Cast", "GroupQueryAttention"])))
    assert fell.endswith("2 Cast, 1 GroupQueryAttention")


def test_an_older_onnx_runtime_is_said_to_be_silent() -> None:
    with pytest.raises(UnsupportedError, match="does not tell"):
        cpu_nodes(SimpleNamespace())
    assert "1.24" in warning(SimpleNamespace())


@pytest.mark.filterwarnings("ignore:Specified provider")
@pytest.mark.parametrize(
    ("target", "precision", "said"),
    [("onnxruntime", "fp16", "float16 kernels only"), (ONNX_CUDA_TARGET, "fp16", "cannot load its CUDA provider")],
)
def test_a_gpu_gets_float16_and_nothing_falls_to_the_cpu_unseen(
    monkeypatch: pytest.MonkeyPatch, target: str, precision: str, said: str
) -> None:
    """A package without CUDA that says it has it: what is left is the refusal of the graph, or of the provider."""
    if node_placement.has_cuda():
        pytest.skip("tests/gpu runs it")
    with pytest.raises(UnsupportedError, match="built without CUDA"):
        OnnxEngine(graph_for(target, precision), A, 64, 1, device="cuda")
    monkeypatch.setattr(onnx_session, "has_cuda", lambda: True)
    with pytest.raises(UnsupportedError, match=said) as refusal:
        OnnxEngine(graph_for(target, precision), A, 64, 1, device="cuda")
    assert "\n" not in str(refusal.value) and "CPU" in refusal.value.hint
