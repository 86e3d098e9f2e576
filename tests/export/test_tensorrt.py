"""NVIDIA's own parser and compiler accept what is exported for TensorRT: every preset, lowering, precision. No GPU."""

from __future__ import annotations

import dataclasses
from collections import Counter
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from helpers.architectures import LATER_PARTS
from merino_edge.architecture import Architecture, Block
from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_model, build_stored, save, to_bytes
from merino_edge.export.operators import find_unsupported
from merino_edge.export.quantization.stored_weights import random_stored
from merino_edge.export.targets import BLOCK_SIZES, PLATFORMS, Target
from merino_edge.export.tensorrt import NO_KERNEL, Engine, build_engine, require_kernels
from merino_edge.presets import PRESETS, shrunk
from merino_edge.tensorrt_library import RTX, TENSORRT
from merino_edge.weights import random_weights, weight_shapes

# Two presets are another's graph with other numbers: merino-52m's, and pythia-70m's (benchmarks/compile_engines.py).
KINDS = [name for name in PRESETS if name not in ("merino-61m", "pythia-160m")]
FORMS = [(lowering, p) for p in PLATFORMS["rtx"].precisions for lowering in PLATFORMS["rtx"].lowerings_at(p)]


def narrow(name: str, least_heads: int = 2) -> Architecture:
    """The shrunk preset with two to four heads a layer: the same nodes, and they compile sooner.

    Widths that differ still do, and heads that share keys and values still share them. Where several widths have a
    layer, each has one: merino-64m has two layers that share weights.
    """
    a = shrunk(name)
    widths = sorted({a.embedding_width, *(block.width for block in a.blocks)})
    heads = {width: count for count, width in enumerate(widths, least_heads)}
    blocks = []
    for block in a.blocks:
        count = heads[block.width]
        kv_heads, width = max(1, count * block.kv_heads // block.heads), count * a.head_dim
        ffn_width = width * block.ffn_width // block.width // 32 * 32  # int4 has blocks of 32 or more
        layers = 1 if len(a.blocks) > 1 else block.layers
        blocks.append(Block(width, layers, count, kv_heads, ffn_width, shared=block.shared))
    return dataclasses.replace(a, embedding_width=heads[a.embedding_width] * a.head_dim, blocks=tuple(blocks))


@pytest.fixture
def rtx() -> None:
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_a_pretrained_model_compiles_for_sm86(smollm2: Checkpoint, tmp_path: Path, precision: str) -> None:
    """Two layers of it, and a third of its vocabulary: benchmarks/compile_engines.py compiles whole models."""
    a, graph = smollm2.architecture, tmp_path / "model.onnx"
    a = dataclasses.replace(a, vocab_size=2**14, blocks=(dataclasses.replace(a.blocks[0], layers=2),))
    weights = {name: smollm2.weights[name][: shape[0]] for name, shape in weight_shapes(a).items()}
    save(build_model(a, weights, precision, 256, "rtx"), graph)
    stored = (tmp_path / "model.onnx.data").stat().st_size
    engine = build_engine(RTX, graph, 256, "SM86")
    # The engine holds the weights at their precision: neither dropped nor widened.
    assert 0.9 * stored < len(engine.plan) < 1.3 * stored
    assert engine.layers["KV_CACHE_UPDATE"] == 2 * a.layers and engine.layers["ATTENTION_INPUT"] == a.layers


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(("lowering", "precision"), FORMS)
@pytest.mark.parametrize("name", KINDS)
def test_every_kind_of_preset_compiles(name: str, lowering: str, precision: str) -> None:
    a, target = narrow(name), Target.named("rtx", precision, lowering)
    graph = to_bytes(build_stored(a, random_stored(a, target), target, 128))
    engine = build_engine(RTX, graph, 128, "SM86")
    native = lowering == "native"
    assert engine.layers["KV_CACHE_UPDATE"] == (2 * a.layers if native else 0)
    assert engine.layers["ATTENTION_INPUT"] == (a.layers if native else 0)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(("lowering", "cap"), [("native", 0.0), ("primitive", 50.0)])
def test_what_later_families_have_compiles(lowering: str, cap: float) -> None:
    """benchmarks/every_family.py compiles each of them, at each precision."""
    a, target = dataclasses.replace(LATER_PARTS, attention_cap=cap), Target.named("rtx", "int4", lowering)
    engine = build_engine(RTX, to_bytes(build_stored(a, random_stored(a, target), target, 128)), 128, "SM86")
    assert engine.layers["ATTENTION_INPUT"] == (a.layers if lowering == "native" and not cap else 0)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(("lowering", "precision"), FORMS)
@pytest.mark.parametrize("capability", ["SM75", "SM80", "SM89", "SM120", "SM121"])
def test_other_capabilities_compile_what_they_have_kernels_for(lowering: str, precision: str, capability: str) -> None:
    a, target = narrow("smollm2-135m"), Target.named("rtx", precision, lowering)
    graph = to_bytes(build_stored(a, random_stored(a, target), target, 128))
    if (capability, precision) in NO_KERNEL:
        with pytest.raises(UnsupportedError, match="cannot compile the graph"):
            build_engine(RTX, graph, 128, capability)
    else:
        assert build_engine(RTX, graph, 128, capability).plan


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("lowering", PLATFORMS["rtx"].lowerings_at("int4"))
@pytest.mark.parametrize("block", BLOCK_SIZES)
def test_every_block_of_int4_compiles(lowering: str, block: int) -> None:
    a = narrow("cerebras-gpt-111m", least_heads=4)  # widths of 256 and 1024
    target = Target.named("rtx", "int4", lowering, block=block)
    stored = random_stored(a, target)
    assert {q.codes.shape[2] for q in stored.quantized.values() if q.bits == 4} == {block}
    assert build_engine(RTX, to_bytes(build_stored(a, stored, target, 128)), 128, "SM86").plan


@pytest.mark.parametrize("target", [name for name, platform in PLATFORMS.items() if platform.tensorrt])
@pytest.mark.parametrize("name", [*PRESETS, "later"])
def test_no_graph_has_an_operator_that_its_targets_parser_lacks(name: str, target: str) -> None:
    a, platform = LATER_PARTS if name == "later" else narrow(name), PLATFORMS[target]
    assert platform.tensorrt is not None
    for precision in platform.precisions:
        for lowering in platform.lowerings_at(precision):
            resolved = Target.named(target, precision, lowering)
            model = build_stored(a, random_stored(a, resolved), resolved, 128)
            assert find_unsupported(model, platform.tensorrt) == []
            assert platform.opsets[0] <= model.opset_imports[""] <= platform.opsets[1]


@pytest.mark.parametrize(
    ("lowering", "tensorrt", "said"),
    [
        ("native", (10, 3), "TensorScatter (from TensorRT 10.15)"),
        ("native", (10, 14), "RotaryEmbedding (from TensorRT 10.15)"),
        ("native", (10, 3), "Attention (from TensorRT 10.14)"),
        ("ort", (11, 0), "com.microsoft.GroupQueryAttention (no TensorRT has it)"),
    ],
)
def test_what_an_older_parser_lacks_is_named_with_the_release_that_has_it(
    lowering: str, tensorrt: tuple[int, int], said: str
) -> None:
    a = narrow("smollm2-135m")
    target = Target.named("onnxruntime", "fp32", lowering)
    model = build_stored(a, random_stored(a, target), target, 128)
    assert said in map(str, find_unsupported(model, tensorrt))


@pytest.mark.usefixtures("rtx")
@pytest.mark.filterwarnings("ignore")
def test_a_graph_the_parser_does_not_know_is_one_line(tmp_path: Path) -> None:
    x = ir.val("tokens", ir.DataType.FLOAT, [1])
    node = ir.Node("com.example", "Mystery", [x], num_outputs=1)
    node.outputs[0].name, node.outputs[0].dtype, node.outputs[0].shape = "y", ir.DataType.FLOAT, ir.Shape([1])
    graph = ir.Graph([x], node.outputs, nodes=[node], opset_imports={"": 24, "com.example": 1})
    ir.save(ir.Model(graph, ir_version=11), tmp_path / "model.onnx")
    with pytest.raises(UnsupportedError, match="cannot parse") as refusal:
        build_engine(RTX, tmp_path / "model.onnx", 8, "SM86")
    assert "\n" not in str(refusal.value)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize(
    ("capability", "hint"), [("SM87", "build on the board"), ("SM90", "use full TensorRT"), ("90", "use full TensorRT")]
)
def test_a_gpu_without_kernels_is_refused_with_those_there_are(capability: str, hint: str) -> None:
    a = narrow("merino-52m")
    target = Target.named("rtx", "fp16")
    graph = to_bytes(build_stored(a, random_stored(a, target), target, 128))
    for refused in (partial(build_engine, RTX, graph, 128), partial(require_kernels, RTX)):
        with pytest.raises(UnsupportedError, match=f"has no kernels for {capability}") as refusal:
            refused(capability)
        assert "SM75, SM80, SM86, SM89, SM120, SM121" in refusal.value.message and hint in refusal.value.hint
    assert "1.7" in PLATFORMS["rtx"].known_issues[0] and "121" in PLATFORMS["rtx"].known_issues[0]
    require_kernels(TENSORRT, capability)  # full TensorRT is there for all


def attention_of(head_dim: int) -> Architecture:
    return Architecture(40, 64, 2 * head_dim, head_dim, (Block(2 * head_dim, 1, 2, 2, 24),))


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("head_dim", [8, 512])
def test_attention_that_no_single_kernel_fits_is_decomposed(head_dim: int) -> None:
    """Without the mark NVIDIA's compiler refuses it; and the graph that is exported has no such attribute."""
    a = attention_of(head_dim)
    graph = build_model(a, random_weights(a), "fp16", 48, "rtx", lowering="native")
    assert build_engine(RTX, to_bytes(graph), 48, "SM86").layers["ATTENTION_INPUT"] == 1
    onnx.checker.check_model(to_bytes(graph))


@pytest.mark.usefixtures("rtx")
@pytest.mark.filterwarnings("ignore")
def test_a_native_graph_that_does_not_compile_is_answered_with_the_primitive_one() -> None:
    a = attention_of(12)
    graphs = [
        to_bytes(build_model(a, random_weights(a), "fp16", 48, "rtx", lowering=name))
        for name in ("native", "primitive")
    ]
    with pytest.raises(UnsupportedError, match="cannot compile the graph") as refusal:
        build_engine(RTX, graphs[0], 48, "SM86")
    assert refusal.value.hint == "export it again with --lowering primitive"
    assert build_engine(RTX, graphs[1], 48, "SM86").plan


@pytest.mark.parametrize("precision", ["int8", "int4"])
@pytest.mark.parametrize("lowering", ["native", "primitive"])
def test_no_scale_for_tensorrt_is_zero(precision: str, lowering: str) -> None:
    """The factor of the query weights may take a scale below float16's range; its parser asks for positive ones."""
    a = Architecture(64, 64, 64, 64, (Block(64, 1, 1, 1, 64),))
    weights = random_weights(a)
    query = next(name for name in weights if name.endswith("attention.query.weight"))
    weights[query][:32] = np.geomspace(1e-9, 1e-3, 32, dtype=np.float32)[:, None]  # nearly dead outputs
    target = "jetpack-6.2" if lowering == "primitive" else "jetpack-7.2"
    model = build_model(a, weights, precision, 64, target, lowering=lowering)
    scales = {n: v.const_value.numpy() for n, v in model.graph.initializers.items() if n.endswith(".scale")}
    assert len(scales) > 3 and all((scale > 0).all() for scale in scales.values())


def engine_of(plan_bytes: int, weight_bytes: int, widening_bytes: int) -> Engine:
    sizes = {"weight_bytes": weight_bytes, "widening_bytes": widening_bytes}
    return Engine(b"0" * plan_bytes, RTX, "1", "SM86", 1.0, Counter(), [], b"", **sizes)


@pytest.mark.usefixtures("rtx")
@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_an_engine_is_compared_with_its_weights(precision: str, tmp_path: Path) -> None:
    """NVIDIA's compiler keeps quantised weights; an engine that had them at float16 would be named."""
    target = Target.named("rtx", precision)
    a = shrunk("cerebras-gpt-111m")
    model = build_stored(a, random_stored(a, target), target, 128)
    save(model, tmp_path / "model.onnx")
    saved, held = (build_engine(RTX, graph, 128, "SM86") for graph in (tmp_path / "model.onnx", to_bytes(model)))
    stored = (tmp_path / "model.onnx.data").stat().st_size
    assert abs(saved.weight_bytes - stored) < 1e-2 * stored and saved.weight_bytes == held.weight_bytes
    codes = sum(
        v.const_value.nbytes * {ir.DataType.INT8: 1, ir.DataType.INT4: 3}[v.dtype]
        for v in model.graph.initializers.values()
        if v.dtype in (ir.DataType.INT8, ir.DataType.INT4)
    )
    assert saved.widening_bytes == held.widening_bytes == codes and (codes > 0) == (precision != "fp16")
    assert saved.widened == ""


def test_an_engine_with_widened_weights_is_named() -> None:
    assert engine_of(130_000_000, 50_000_000, 100_000_000).widened.startswith("the engine has 130 MB for 50 MB of")
    assert engine_of(80_000_000, 50_000_000, 100_000_000).widened == ""
    assert engine_of(69_000_000, 50_000_000, 0).widened == ""
