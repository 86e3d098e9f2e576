"""The form for ONNX Runtime on a GPU: its attention reads float16, and it computes what its weights say. On the CPU."""

from __future__ import annotations

import dataclasses
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import pytest

from helpers.random_model import random_model
from merino_edge.architecture import Architecture, Block
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import UnsupportedError
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.graph import build_model, build_stored, to_bytes
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.quantization.stored_weights import random_stored, store
from merino_edge.export.targets import PLATFORMS, Target
from merino_edge.graph_io import ONNX_CUDA_TARGET
from merino_edge.runtime.engines import node_placement
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.open_bundle import open_engine

PRECISIONS = PLATFORMS[ONNX_CUDA_TARGET].precisions
CONTEXT = 300
A = Architecture(96, CONTEXT, 64, 32, (Block(64, 1, 2, 2, 96), Block(96, 2, 3, 1, 128, shared=True)))
FAMILIES = {
    "opt": dataclasses.replace(A, position_offset=2),
    "neox": dataclasses.replace(A, ffn="gelu", positions="rotary", rotary_dim=16, tied_head=False),
    "llama": dataclasses.replace(
        A, norm="rmsnorm", ffn="swiglu", positions="rotary", rotary_dim=32, bias="qkv", parallel_residual=True
    ),
}
ROUNDING = {"fp16": 0.002, "int8": 0.05, "int4": 0.05}  # of the largest logit; kernels round activations to int8


def types_of(graph: bytes) -> dict[str, int]:
    """The element type of every value whose type the graph says or that ONNX infers."""
    model = onnx.shape_inference.infer_shapes(onnx.load_from_string(graph))
    values = [*model.graph.input, *model.graph.output, *model.graph.value_info]
    return {value.name: value.type.tensor_type.elem_type for value in values} | {
        tensor.name: tensor.data_type for tensor in model.graph.initializer
    }


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_attention_reads_and_writes_float16(family: str, precision: str) -> None:
    a = FAMILIES[family]
    graph = to_bytes(build_model(a, random_model(a), precision, CONTEXT, ONNX_CUDA_TARGET))
    types, half = types_of(graph), onnx.TensorProto.FLOAT16
    attentions = [node for node in onnx.load_from_string(graph).graph.node if node.op_type == "GroupQueryAttention"]
    assert len(attentions) == a.layers
    for node in attentions:
        caches, rotation = node.input[3:5], [name for name in node.input[7:9] if name]
        assert len(rotation) == (2 if a.positions == "rotary" else 0)
        for name in (*caches, *rotation, *node.output[1:]):
            assert types[name] == half
    assert types["logits"] == onnx.TensorProto.FLOAT


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_it_computes_what_the_form_for_a_cpu_computes(family: str, precision: str) -> None:
    a, tokens = FAMILIES[family], np.random.default_rng(1).integers(0, 96, 60)
    weights = random_model(a)
    half, full = (
        OnnxEngine(to_bytes(build_model(a, weights, precision, CONTEXT, target)), a, CONTEXT, 1)
        for target in (ONNX_CUDA_TARGET, "onnxruntime")
    )
    assert half.cache_dtype == np.float16 and full.cache_dtype == np.float32
    for start, end in ((0, 50), (50, 51), (20, 28)):
        expected = full.forward_rows(tokens[start:end], start, min(8, end - start))
        got = half.forward_rows(tokens[start:end], start, min(8, end - start))
        np.testing.assert_allclose(got, expected, rtol=0, atol=ROUNDING[precision] * np.abs(expected).max())


def test_offsets_and_a_pruned_head_have_this_form_too() -> None:
    a, target = FAMILIES["llama"], Target.named(ONNX_CUDA_TARGET, "int4")
    weights = {name: 0.3 * array + 0.05 if array.ndim > 1 else array for name, array in random_model(a).items()}
    stored = store(a, weights, target).with_pruned_vocab(np.arange(5, 90, 3))
    assert any(matrix.offsets is not None for matrix in stored.quantized.values())
    other = Target.named("onnxruntime", "int4")
    full = store(a, weights, other).with_pruned_vocab(np.arange(5, 90, 3))
    got, expected = (
        OnnxEngine(to_bytes(build_stored(a, form, which, CONTEXT)), a, CONTEXT, 1).forward(np.arange(20), 0)
        for form, which in ((stored, target), (full, other))
    )
    said = np.isfinite(expected)
    assert (np.isfinite(got) == said).all() and said.sum() == 29
    np.testing.assert_allclose(got[said], expected[said], rtol=0, atol=0.05 * np.abs(expected[said]).max())


@pytest.mark.parametrize("precision", PRECISIONS)
def test_an_exported_bundle_runs_on_the_cpu_where_there_is_no_gpu(
    tiny_checkpoint: Checkpoint, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    options = ExportOptions(Target.named(ONNX_CUDA_TARGET, precision), 64)
    a = tiny_checkpoint.architecture
    write_bundle(tiny_checkpoint, tmp_path / "b", options, lambda graph, count: OnnxEngine(graph, a, count, 1))
    monkeypatch.setattr(node_placement, "has_cuda", lambda: False)
    engine, _, opened = open_engine(tmp_path / "b")
    with closing(engine):
        assert isinstance(engine, OnnxEngine) and engine.device == "cpu" and opened.target == ONNX_CUDA_TARGET
        assert engine.placement_warning == "" and np.isfinite(engine.forward(np.arange(9), 0)).all()
    asked: list[str] = []
    monkeypatch.setattr(OnnxEngine, "from_bundle", lambda bundle, threads, device="cpu", **_: asked.append(device))
    open_engine(tmp_path / "b", cpu=True)
    monkeypatch.setattr(node_placement, "has_cuda", lambda: True)
    open_engine(tmp_path / "b", cpu=True)
    open_engine(tmp_path / "b")
    assert asked == ["cpu", "cpu", "cuda"]


def test_what_it_has_no_kernel_for_is_refused() -> None:
    for refused in (
        lambda: Target.named(ONNX_CUDA_TARGET, "fp32"),
        lambda: Target.named(ONNX_CUDA_TARGET, "fp16", "native"),
        lambda: Target.named(ONNX_CUDA_TARGET, "int8", cache="int8"),
    ):
        with pytest.raises(UnsupportedError) as refusal:
            refused()
        assert "\n" not in str(refusal.value)
    target = Target.named(ONNX_CUDA_TARGET, "fp16")
    assert to_bytes(build_stored(A, random_stored(A, target), target, 16))
