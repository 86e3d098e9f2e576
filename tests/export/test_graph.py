"""The ONNX graph computes what the PyTorch module computes, for every family of architecture."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch

from helpers.random_model import random_model
from merino_edge.architecture import Architecture, Bias, Block, Ffn
from merino_edge.counts import PRECISIONS
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_model, build_stored, save, to_bytes
from merino_edge.export.parity import LIMITS, mean_kl
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import LOWERINGS, Target
from merino_edge.presets import PRESETS, preset
from merino_edge.pytorch.model import Model
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.weights import weight_shapes

CONTEXT = 600  # beyond the engine's first and second cache bucket
LLAMA = {"norm": "rmsnorm", "ffn": "swiglu", "positions": "rotary", "bias": "none"}
FAMILIES = {
    "opt": Architecture(96, CONTEXT, 64, 32, (Block(64, 2, 2, 2, 96),), position_offset=2),
    "opt-post-norm": Architecture(96, CONTEXT, 32, 32, (Block(64, 2, 2, 2, 96),), norm_placement="post"),
    "gpt2": Architecture(96, CONTEXT, 64, 32, (Block(64, 2, 2, 2, 128),), ffn="gelu_tanh"),
    "neox": Architecture(
        96,
        CONTEXT,
        64,
        32,
        (Block(64, 2, 2, 2, 128),),
        tied_head=False,
        ffn="gelu",
        positions="rotary",
        rotary_dim=16,
        parallel_residual=True,
    ),
    "llama": Architecture(96, CONTEXT, 96, 32, (Block(96, 2, 3, 1, 128),), rotary_dim=32, **LLAMA),
    "qwen": Architecture(96, CONTEXT, 64, 32, (Block(64, 2, 2, 1, 128),), rotary_dim=32, **{**LLAMA, "bias": "qkv"}),
    "lfm2": Architecture(
        96,
        CONTEXT,
        64,
        32,
        (Block(64, 2, 2, 1, 96, convolution=3), Block(64, 1, 2, 1, 96), Block(64, 2, 2, 1, 96, True, convolution=4)),
        rotary_dim=32,
        qk_norm="head",
        convolution_bias=True,
        **LLAMA,
    ),
    "merino": Architecture(
        96,
        CONTEXT,
        64,
        32,
        (Block(32, 2, 1, 1, 64, shared=True), Block(64, 1, 2, 2, 64), Block(96, 3, 3, 3, 96, shared=True)),
    ),
}


# How much logits may differ because sums have another order. MatMulNBits also rounds its inputs to int8.
TOLERANCE = {"fp32": 2e-4, "fp16": 2e-4, "int8": 0.1, "int4": 0.1}


def reference_logits(a: Architecture, weights: dict[str, np.ndarray], tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return Model.from_weights(a, weights)(torch.from_numpy(tokens)[None])[0].numpy()  # [T, V]


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_graph_equals_pytorch_for_any_split_of_the_sequence(family: str, lowering: str) -> None:
    a = FAMILIES[family]
    weights = random_model(a)
    tokens = np.random.default_rng(1).integers(0, a.vocab_size, CONTEXT)
    expected = reference_logits(a, weights, tokens)
    model = build_model(a, weights, "fp32", CONTEXT, lowering=lowering)
    engine = OnnxEngine(to_bytes(model), a, CONTEXT, threads=1)
    start = 0
    for length in (1, 1, 5, 1, 200, 1, 90, 1, 299, 1):  # crosses the buckets at 256 and 512, ends at the context
        got = engine.forward(tokens[start : start + length], start)
        start += length
        np.testing.assert_allclose(got, expected[start - 1], atol=2e-4, rtol=1e-4)
    assert start == CONTEXT


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_rewinding_gives_what_a_fresh_engine_gives(family: str, lowering: str) -> None:
    a = FAMILIES[family]
    graph = to_bytes(build_model(a, random_model(a), "fp32", CONTEXT, lowering=lowering))
    tokens = np.random.default_rng(2).integers(0, a.vocab_size, 40)
    used, fresh = (OnnxEngine(graph, a, CONTEXT, threads=1) for _ in range(2))
    used.forward(tokens[::-1].copy(), 0)  # another sequence, then back to position 10 of it
    used.forward(tokens[:20], 0)
    fresh.forward(tokens[:20], 0)
    np.testing.assert_array_equal(used.forward(tokens[20:], 20), fresh.forward(tokens[20:], 20))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lowerings_are_valid_onnx_of_the_opset_they_name(family: str, precision: str, lowering: str) -> None:
    a = FAMILIES[family]
    model = build_model(a, random_model(a), precision, CONTEXT, lowering=lowering)
    kinds = Counter(node.op_type for node in model.graph)
    onnx.checker.check_model(to_bytes(model), full_check=True)
    assert model.opset_imports[""] == (24 if lowering == "native" else 21 if lowering == "ort" else 19)
    attends = sum(not block.convolution for block in a.layer_blocks())
    assert kinds["TensorScatter"] == (2 * attends if lowering == "native" else 0)
    assert kinds["GroupQueryAttention"] == (attends if lowering == "ort" else 0)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_lowerings_multiply_by_the_very_same_weights(family: str, precision: str) -> None:
    """Only the order of float32 sums differs."""
    a = FAMILIES[family]
    weights = random_model(a)
    tokens = np.random.default_rng(3).integers(0, a.vocab_size, 40)
    native, *others = (
        OnnxEngine(to_bytes(build_model(a, weights, precision, CONTEXT, lowering=name)), a, CONTEXT, threads=1)
        for name in LOWERINGS
    )
    for engine in others:
        for start, end in ((0, 1), (1, 30), (30, 31), (9, 40)):
            expected = native.forward(tokens[start:end], start).copy()
            np.testing.assert_allclose(engine.forward(tokens[start:end], start), expected, atol=TOLERANCE[precision])


SHARED = Architecture(96, 64, 128, 64, (Block(128, 2, 2, 1, 192, shared=True), Block(192, 1, 3, 3, 256)))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("block", [64, 128])
def test_blocks_have_the_size_asked_for_if_it_divides_the_inputs(lowering: str, precision: str, block: int) -> None:
    target = Target.named("onnxruntime", precision, lowering, block=block)
    stored = store(SHARED, random_model(SHARED), target)
    tokens = np.random.default_rng(3).integers(0, 96, 40)
    blocks = {q.codes[0].size: q.codes.shape[2] for name, q in stored.quantized.items() if name != "embedding.weight"}
    assert blocks == {128: block, 192: 64, 256: block}
    expected = reference_logits(SHARED, stored.dequantize(), tokens)
    engine = OnnxEngine(to_bytes(build_stored(SHARED, stored, target, 64)), SHARED, 64, threads=1)
    got = np.stack([engine.forward(tokens[i : i + 1], i).copy() for i in range(40)])
    assert mean_kl(expected, got) < LIMITS[precision]["graph_kl"]


def stored_tables(graph: Path, vocab_size: int) -> dict[int, list[str]]:
    """Names of the tables with `vocab_size` rows in the file of weights, by their offset."""
    names = dict[int, list[str]]()
    for name, value in ir.load(graph).graph.initializers.items():
        tensor = value.const_value
        if isinstance(tensor, ir.ExternalTensor) and vocab_size in tensor.shape and tensor.nbytes >= vocab_size * 64:
            names.setdefault(tensor.offset, []).append(name)
    return names


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_tied_table_stands_once_in_the_file_and_has_a_name_for_each_use(
    lowering: str, precision: str, tmp_path: Path
) -> None:
    """With an alias ONNX Runtime frees the matrix that it packed. A graph in memory holds both, to the same effect."""
    target = Target.named("onnxruntime", precision, lowering)
    stored = store(SHARED, random_model(SHARED), target)
    model, graph = build_stored(SHARED, stored, target, 64), tmp_path / "model.onnx"
    in_memory = OnnxEngine(to_bytes(model), SHARED, 64, threads=1)
    save(model, graph)
    assert list(stored_tables(graph, 96).values()) == [["embedding.weight", "embedding.weight.twin"]]
    saved = OnnxEngine(graph, SHARED, 64, threads=1)
    tokens = np.random.default_rng(3).integers(0, 96, 40)
    np.testing.assert_array_equal(saved.forward(tokens, 0), in_memory.forward(tokens, 0))


@pytest.mark.parametrize("lowering", LOWERINGS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_fast_form_computes_what_it_stores(lowering: str, tmp_path: Path, *, tied: bool) -> None:
    target = Target.named("onnxruntime", "int4", lowering, block=64, fast=True)
    a = dataclasses.replace(SHARED, tied_head=tied)
    stored = store(a, random_model(a), target)
    tokens = np.random.default_rng(3).integers(0, 96, 40)
    expected = reference_logits(a, stored.dequantize(), tokens)
    save(build_stored(a, stored, target, 64), tmp_path / "model.onnx")
    assert len(stored_tables(tmp_path / "model.onnx", 96)) == (1 if tied else 2)  # a tied table is stored once
    engine = OnnxEngine(tmp_path / "model.onnx", a, 64, threads=1)
    got = np.stack([engine.forward(tokens[i : i + 1], i).copy() for i in range(40)])
    assert mean_kl(expected, got) < LIMITS["int4"]["graph_kl"]


def test_older_onnx_runtime_names_the_target_to_export_for(monkeypatch: pytest.MonkeyPatch) -> None:
    a = FAMILIES["llama"]
    model = build_model(a, random_model(a), "fp32", CONTEXT, lowering="native")
    model.graph.opset_imports[""] = 23  # as unknown to this graph as opset 24 is to 1.23
    monkeypatch.setattr(ort, "__version__", "1.23.2")
    with pytest.raises(UnsupportedError, match=r"1\.23\.2 is installed") as refusal:
        OnnxEngine(to_bytes(model), a, CONTEXT)
    assert "--lowering ort" in refusal.value.hint and "\n" not in str(refusal.value)
    monkeypatch.setattr(ort, "__version__", "1.22.0")
    with pytest.raises(UnsupportedError, match=r"need ONNX Runtime 1\.23"):
        OnnxEngine(to_bytes(build_model(a, random_model(a), "fp32", CONTEXT)), a, CONTEXT)


@pytest.mark.parametrize("name", PRESETS)
def test_initializers_of_every_preset_count_its_parameters(name: str) -> None:
    """The weights take no memory, since only shapes matter."""
    a = preset(name)
    weights = {key: np.broadcast_to(np.float32(0), shape) for key, shape in weight_shapes(a).items()}
    graph = build_model(a, weights, "fp32", 8).graph
    stored = [v for k, v in graph.initializers.items() if k.endswith((".weight", ".bias"))]
    assert sum(math.prod(v.const_value.shape) for v in stored) == a.parameters


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_initializers_have_the_counted_bytes(family: str, precision: str) -> None:
    a = FAMILIES[family]
    graph = build_model(a, random_model(a), precision, CONTEXT).graph
    stored = [v for k, v in graph.initializers.items() if k.endswith((".weight", ".bias", ".scale"))]
    assert sum(v.const_value.nbytes for v in stored) == a.weight_bytes(precision)


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("ffn", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("shared", [False, True])
def test_onnx_runtime_multiplies_by_the_codes_of_every_matrix(
    tmp_path: Path, ffn: Ffn, bias: Bias, precision: str, *, shared: bool
) -> None:
    """A matrix that is dequantised in every step costs ten times as much. It once was, with Relu and no bias."""
    block = Block(64, 2, 2, 1, 96, shared=shared)
    a = Architecture(96, 32, 64, 32, (block,), norm="rmsnorm", ffn=ffn, positions="rotary", rotary_dim=32, bias=bias)
    options = ort.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimized.onnx")
    ort.InferenceSession(to_bytes(build_model(a, random_model(a), precision, 32)), options, ["CPUExecutionProvider"])
    kinds = Counter(node.op_type for node in onnx.load(options.optimized_model_filepath).graph.node)
    assert kinds["DequantizeLinear"] == 0 and kinds["MatMul"] == 0
    assert kinds["MatMulNBits"] == 4 * 2 + 1  # packed query, key and value; output; up, with gate; down; the head
