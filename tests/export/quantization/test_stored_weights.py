"""Quantisation never does worse than plain rounding, and the graph multiplies by exactly what was stored."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx_ir.tape import Tape

from merino_edge.architecture import Architecture, Block
from merino_edge.counts import PRECISIONS
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.lowerings.weight_writer import WeightWriter
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix, stacked
from merino_edge.export.quantization.rounding import int4_codes, scales_from_bytes, scales_to_bytes, search_scales
from merino_edge.export.quantization.stored_weights import (
    WORTH_OFFSETS,
    StoredWeights,
    odd_matrices,
    quantize_matrix,
    random_stored,
    store,
)
from merino_edge.export.targets import Target
from merino_edge.weights import random_weights

INT4, INT8 = (Target.named("onnxruntime", precision) for precision in ("int4", "int8"))
FORMS = [("onnxruntime", precision) for precision in PRECISIONS] + [("rtx", p) for p in PRECISIONS if p != "fp32"]


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Small architectures of every family, with matrices that blocks of 32 inputs divide."""
    blocks = tuple(
        Block(width, draw(st.integers(1, 2)), width // 32, 1, 32 * draw(st.integers(1, 3)), draw(st.booleans()))
        for width in sorted(draw(st.lists(st.sampled_from((32, 64, 96)), min_size=1, max_size=2)))
    )
    rotary = draw(st.booleans())
    return Architecture(
        vocab_size=50,
        max_positions=16,
        embedding_width=draw(st.sampled_from((32, 64))),
        head_dim=32,
        blocks=blocks,
        tied_head=draw(st.booleans()),
        norm=draw(st.sampled_from(("layernorm", "rmsnorm"))),
        norm_placement=draw(st.sampled_from(("pre", "post"))),
        ffn=draw(st.sampled_from(("relu", "gelu", "swiglu"))),
        positions="rotary" if rotary else "learned",
        rotary_dim=32 if rotary else 0,
        bias=draw(st.sampled_from(("all", "qkv", "none"))),
    )


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 4), spread=st.floats(-6, 3))
@settings(max_examples=40, deadline=None)
def test_searched_scales_are_no_worse_than_plain_ones(seed: int, rows: int, blocks: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_t(4, (rows, 32 * blocks)) * 10**spread).astype(np.float32)
    groups = weight.reshape(rows, blocks, 32)
    plain, searched = np.abs(groups).max(axis=-1) / 7.5, search_scales(groups)
    errors = [
        np.square(groups - int4_codes(groups / scales[..., None]) * scales[..., None]).sum(axis=-1)
        for scales in (searched, plain)
    ]
    assert (errors[0] <= errors[1] * 1.0001).all()


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(1, 5), blocks=st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_scales_of_either_sign_give_the_larger_end_the_longer_side(seed: int, rows: int, blocks: int) -> None:
    rng = np.random.default_rng(seed)
    groups = rng.standard_normal((rows, blocks, 32)).astype(np.float32)
    scales = search_scales(groups, signed=True)
    largest = np.take_along_axis(groups, np.abs(groups).argmax(-1, keepdims=True), -1)[..., 0]
    np.testing.assert_array_equal(np.sign(scales), -np.sign(largest))
    mirrored = search_scales(-groups, signed=True)
    np.testing.assert_array_equal(mirrored, -scales)


def test_scales_of_either_sign_leave_less_error() -> None:
    groups = np.random.default_rng(0).standard_normal((400, 8, 32)).astype(np.float32)
    errors = [
        np.square(groups - int4_codes(groups / scales[..., None]) * scales[..., None]).sum()
        for scales in (search_scales(groups), search_scales(groups, signed=True))
    ]
    assert errors[1] < 0.97 * errors[0]


def test_what_matters_more_is_rounded_better() -> None:
    rng = np.random.default_rng(0)
    groups, importance = rng.standard_normal((400, 1, 32)).astype(np.float32), np.ones((1, 32), np.float32)
    importance[0, :4] = 50
    plain, weighted = (
        np.square(groups - int4_codes(groups / scales[..., None]) * scales[..., None])[..., :4].sum()
        for scales in (search_scales(groups), search_scales(groups, importance))
    )
    assert weighted < 0.8 * plain


def test_groups_of_zeros_stay_zero() -> None:
    weight = np.zeros((2, 64), np.float32)
    weight[1, 40] = 1.0
    for quantized in (quantize_matrix("m", weight, 4, INT4), quantize_matrix("m", weight, 8, INT8)):
        assert (quantized.scales != 0).all()
        np.testing.assert_allclose(quantized.dequantize(), weight, atol=0.02)


def test_the_fast_form_has_no_offsets_and_its_table_at_int4() -> None:
    weight = between_two_ends(0, 70, 4)
    fast = Target.named("onnxruntime", "int4", block=64, fast=True)
    quantized = quantize_matrix("m", weight, 4, fast)
    assert quantized.offsets is None and quantized.codes.shape == (70, 2, 64)
    assert quantize_matrix("m", weight, 4, INT4).offsets is not None
    for tied in (True, False):
        a = Architecture(96, 32, 128, 32, (Block(64, 1, 2, 1, 96),), tied_head=tied)
        plain, stored = (store(a, random_weights(a), target).quantized for target in (INT4, fast))
        tables = {"embedding.weight"} | ({"head.weight"} if not tied else set())
        assert {name for name, q in plain.items() if q.bits == 8} == tables
        assert {q.bits for q in stored.values()} == {4}
        assert {stored[name].codes.shape for name in tables} == {(96, 2, 64)}
    for precision, target in (("int8", "onnxruntime"), ("int4", "rtx")):
        with pytest.raises(UnsupportedError, match="one form only"):
            Target.named(target, precision, fast=True)


@pytest.mark.parametrize(
    ("platform", "precision", "lowering"),
    [("onnxruntime", "fp32", ""), ("onnxruntime", "fp16", ""), ("onnxruntime", "int4", "native"), ("rtx", "int4", "")],
)
def test_an_int8_cache_goes_with_rounded_weights_and_onnx_runtimes_own_attention(
    platform: str, precision: str, lowering: str
) -> None:
    assert Target.named("onnxruntime", "int8", cache="int8").int8_cache
    with pytest.raises(UnsupportedError, match="an int8 cache goes with int8 or int4 weights by the ort lowering"):
        Target.named(platform, precision, lowering, cache="int8")
    with pytest.raises(UnsupportedError, match="unknown cache 'int4'") as caught:
        Target.named(platform, precision, lowering, cache="int4")
    assert "float, int8" in caught.value.hint


def test_int8_error_is_at_most_half_a_step() -> None:
    weight = np.random.default_rng(0).standard_normal((8, 96)).astype(np.float32)
    quantized = quantize_matrix("m", weight, 8, INT8)
    steps = np.repeat(quantized.scales, 32, axis=1)
    # A scale is rounded to float16, so the largest weight may lie a little beyond 127 steps.
    allowed = np.where(np.abs(quantized.codes.reshape(weight.shape)) == 127, 0.5 + 127 / 2048, 0.5001)
    assert (np.abs(weight - quantized.dequantize()) <= steps * allowed).all()


def between_two_ends(seed: int, rows: int, blocks: int) -> np.ndarray:
    """A matrix [rows, 32 * blocks] with 16 steps between the ends of each block, as in a Q4_1 file."""
    rng = np.random.default_rng(seed)
    normal = rng.standard_normal((rows, blocks, 32))
    least, most = normal.min(axis=-1, keepdims=True), normal.max(axis=-1, keepdims=True)
    step = (most - least) / 15
    return np.asarray((np.rint((normal - least) / step) * step + least).reshape(rows, -1), np.float32)


@given(seed=st.integers(0, 2**32 - 1), rows=st.integers(8, 70), blocks=st.integers(2, 40))
@settings(max_examples=20, deadline=None)
def test_blocks_between_two_ends_keep_their_steps(seed: int, rows: int, blocks: int) -> None:
    weight = between_two_ends(seed, rows, blocks)
    for target in ("onnxruntime", "rtx"):
        quantized = quantize_matrix("m", weight, 4, Target.named(target, "int4"))
        assert quantized.offsets is not None and quantized.extended_inputs == 33 * blocks
        groups = weight.reshape(rows, blocks, 32)
        scales = search_scales(groups)
        plain = np.square(groups - int4_codes(groups / scales[..., None]) * scales[..., None]).sum()
        assert np.square(weight - quantized.dequantize()).sum() < WORTH_OFFSETS * plain  # otherwise it would have none


def test_normal_weights_need_no_offsets() -> None:
    weight = np.random.default_rng(0).standard_normal((200, 256)).astype(np.float32)
    assert quantize_matrix("m", weight, 4, INT4).offsets is None


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(-5, 3))
@settings(max_examples=40, deadline=None)
def test_scales_in_bytes_stay_what_they_are(seed: int, spread: float) -> None:
    scales = (np.random.default_rng(seed).random((5, 19)) * 10**spread).astype(np.float32)
    read = scales_from_bytes(*scales_to_bytes(scales))
    assert (np.abs(read - scales) <= scales.max(axis=1, keepdims=True) / 250 + 2.0**-24).all() and (read > 0).all()
    np.testing.assert_array_equal(scales_from_bytes(*scales_to_bytes(read)), read)


def test_matrices_are_stacked_and_scaled_with_their_offsets() -> None:
    with_offsets = quantize_matrix("m", between_two_ends(0, 20, 3), 4, INT4)
    without = quantize_matrix("m", np.random.default_rng(0).standard_normal((30, 96)).astype(np.float32), 4, INT4)
    assert without.offsets is None
    whole = stacked([without, with_offsets.scaled(0.5)])
    np.testing.assert_array_equal(
        whole.dequantize(), np.concatenate([without.dequantize(), with_offsets.dequantize() / 2])
    )
    assert isinstance(whole.extended(), QuantizedMatrix) and whole.extended().codes.shape == (50, 4, 32)
    assert stacked([without, without]).offsets is None


def multiply(x: np.ndarray, weight: np.ndarray, target: Target, *, fused: bool, unfused: bool = False) -> np.ndarray:
    """x [.., K] times weight [N, K] in a graph by WeightWriter; `fused`: ONNX Runtime may optimize it."""
    tape = Tape()
    dtype = target.compute_dtype
    value = ir.val("x", dtype, list(x.shape))
    bits = 4 if target.precision == "int4" else 8
    stored = StoredWeights({}, {"m.weight": quantize_matrix("m.weight", weight, bits, target)})
    y = WeightWriter(tape, target, stored).matmul(value, ["m"], unfused=unfused)
    y.name, y.dtype, y.shape = "y", dtype, ir.Shape([*x.shape[:-1], len(weight)])
    graph = ir.Graph(
        [value], [y], nodes=tape.nodes, initializers=tape.initializers, opset_imports={"": 24, "com.microsoft": 1}
    )
    options = ort.SessionOptions()
    if not fused:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    model = ir.to_proto(ir.Model(graph, ir_version=11)).SerializeToString()
    session = ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(["y"], {"x": x.astype(dtype.numpy())})[0], np.float32)


@pytest.mark.parametrize("target", ["onnxruntime", "rtx"])
@pytest.mark.parametrize("blocks", [2, 32, 33])
def test_graph_multiplies_offsets(target: str, blocks: int) -> None:
    resolved = Target.named(target, "int4", "native")
    weight = between_two_ends(1, 40, blocks) + np.repeat(np.linspace(-3, 3, blocks, dtype=np.float32), 32)
    x = np.random.default_rng(3).standard_normal((1, 3, weight.shape[1])).astype(np.float32)
    quantized = quantize_matrix("m.weight", weight, 4, resolved)
    assert quantized.offsets is not None
    expected = x @ quantized.dequantize().T
    got = multiply(x, weight, resolved, fused=True)
    assert np.abs(got - expected).max() <= 0.01 * np.abs(expected).max()
    without = x @ QuantizedMatrix(quantized.codes, quantized.scales, 4).dequantize().T
    assert np.abs(got - without).max() > 0.1 * np.abs(expected).max()  # so the check would fail without them


@pytest.mark.parametrize("target", ["onnxruntime", "rtx"])
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_graph_multiplies_the_dequantized_matrix(target: str, precision: str) -> None:
    rng = np.random.default_rng(3)
    x, weight = rng.standard_normal((3, 128)).astype(np.float32), rng.standard_normal((40, 128)).astype(np.float32)
    resolved = Target.named(target, precision, "native")
    stored = quantize_matrix("m.weight", weight, 4 if precision == "int4" else 8, resolved).dequantize()
    exact = multiply(x, weight, resolved, fused=False)
    half_rounding = 0.15 if target == "rtx" else 1e-4  # sums of 128 products of float16 numbers of order 10
    np.testing.assert_allclose(exact, x @ stored.T, atol=half_rounding)
    fused = multiply(x, weight, resolved, fused=True)  # also rounds x to int8
    assert np.abs(fused - x @ stored.T).max() <= 0.02 * np.abs(x @ stored.T).max()
    if target == "onnxruntime":  # the unfused form is the very kernel that fusing makes
        np.testing.assert_array_equal(multiply(x, weight, resolved, fused=True, unfused=True), fused)


@pytest.mark.parametrize(("target", "precision"), [("onnxruntime", "fp16"), ("jetpack-6.2", "int8")])
def test_a_matrix_whose_inputs_blocks_do_not_divide_has_another_form_alone(target: str, precision: str) -> None:
    a, resolved = Architecture(40, 16, 32, 32, (Block(32, 1, 1, 1, 40),)), Target.named(target, "int4")
    odd = "blocks.0.layers.0.ffn.down.weight"
    stored = store(a, random_weights(a), resolved)
    assert odd_matrices(a, resolved) == {odd: precision}
    bits = {name: matrix.bits for name, matrix in stored.quantized.items() if ".layers." in name}
    assert bits.pop(odd, 16) == int(precision[-2:].lstrip("t")) and set(bits.values()) == {4} and len(bits) > 4


@pytest.mark.parametrize("precision", ["fp16", "int8", "int4"])
def test_weights_beyond_float16_are_refused(precision: str) -> None:
    a = Architecture(40, 16, 32, 32, (Block(32, 1, 1, 1, 32),))
    name = "blocks.0.layers.0.ffn.up.weight"
    resolved = Target.named("onnxruntime", precision)
    for large in (6e4, 1e8):
        weights = random_weights(a)
        weights[name] = weights[name] * 0 + np.float32(large)
        if large < 65504:
            assert all(np.isfinite(array).all() for array in store(a, weights, resolved).dequantize().values())
        else:
            with pytest.raises(UnsupportedError, match="float16 ends at 65504; export --precision fp32"):
                store(a, weights, resolved)


def structure(model: ir.Model) -> list[object]:
    """A graph without the values of its weights."""
    graph = model.graph
    ends = [(v.name, v.dtype, v.shape) for v in (*graph.inputs, *graph.outputs)]
    nodes = [
        (n.domain, n.op_type, [v and v.name for v in n.inputs], [v.name for v in n.outputs], str(dict(n.attributes)))
        for n in graph
    ]
    tensors = [(name, value.dtype, value.shape) for name, value in graph.initializers.items()]
    return [dict(graph.opset_imports), ends, nodes, tensors]


@pytest.mark.parametrize(("target", "precision"), FORMS)
@given(a=architectures(), seed=st.integers(0, 3))
@settings(max_examples=15, deadline=None)
def test_random_storage_makes_the_graph_that_quantising_makes(
    target: str, precision: str, a: Architecture, seed: int
) -> None:
    resolved = Target.named(target, precision)
    real, random = store(a, random_weights(a), resolved), random_stored(a, resolved, seed)
    assert list(random.arrays) == list(real.arrays) and list(random.quantized) == list(real.quantized)
    for name, quantized in random.quantized.items():
        assert quantized.codes.dtype == np.int8 and quantized.codes.shape == real.quantized[name].codes.shape
        assert np.abs(quantized.codes).max() == (1 << (quantized.bits - 1)) - 1
        np.testing.assert_array_equal(quantized.scales, quantized.scales.astype(np.float16))
    drawn = build_stored(a, random, resolved, a.max_positions)
    assert structure(drawn) == structure(build_stored(a, real, resolved, a.max_positions))
    assert len(to_bytes(drawn)) == len(to_bytes(build_stored(a, real, resolved, a.max_positions)))


@pytest.mark.parametrize(("target", "precision"), FORMS)
def test_random_storage_stands_for_the_same_weights(target: str, precision: str) -> None:
    a = Architecture(512, 64, 128, 64, (Block(128, 1, 2, 2, 256),), tied_head=False)
    drawn, weights = random_stored(a, Target.named(target, precision)).dequantize(), random_weights(a)
    assert set(drawn) == set(weights)
    for name, values in drawn.items():
        assert values.shape == weights[name].shape
        np.testing.assert_allclose(
            [values.mean(), values.std()], [weights[name].mean(), weights[name].std()], atol=2e-3
        )
        if values.ndim == 2:
            assert np.abs(values).max() < 0.05
    again = random_stored(a, Target.named(target, precision)).dequantize()
    assert all(np.array_equal(again[name], values) for name, values in drawn.items())
