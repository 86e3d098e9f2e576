"""A feed-forward network that overflows float16 computes in float32; an overflow anywhere else is refused."""

from __future__ import annotations

import warnings
from dataclasses import replace

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from helpers.random_model import random_model
from helpers.tiny_checkpoint import TINY
from merino_edge import tensorrt_library
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.parity import mean_kl, stored_reference
from merino_edge.export.quantization.fp16_overflow import find_fp32_ffns
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.graph_io import LOGIT_ROWS

TOKENS = np.arange(40) * 7 % TINY.vocab_size
LOUD = "blocks.1.layers.0.ffn."
RTX = [("fp16", "native"), ("int8", "native"), ("int4", "native"), ("fp16", "primitive"), ("int4", "primitive")]


def loud_model(name: str = LOUD) -> dict[str, np.ndarray]:
    """The FFN `name` has products of 1e6 inside, and its output is as usual."""
    weights = random_model(TINY, strength=1.0)
    for part in ("gate", "up"):
        weights[f"{name}{part}.weight"] *= 300
    weights[f"{name}down.weight"] /= 90_000
    return weights


def test_only_ffns_that_overflow_are_named() -> None:
    assert find_fp32_ffns(TINY, random_model(TINY, strength=1.0), TOKENS) == frozenset()
    assert find_fp32_ffns(TINY, loud_model(), TOKENS) == {LOUD}
    shared = "blocks.0.layers.0.ffn."
    assert find_fp32_ffns(TINY, loud_model(shared), TOKENS) == {shared}


def test_attention_that_overflows_is_refused() -> None:
    weights = random_model(TINY, strength=1.0)
    weights["blocks.0.layers.0.attention.value.weight"] *= 1e6
    with pytest.raises(UnsupportedError, match=r"attention\.value reaches .* export --precision fp32"):
        find_fp32_ffns(TINY, weights, TOKENS)


def run_in_float16(model: ir.Model) -> np.ndarray:
    """Logits [1, V] by ONNX's reference, which rounds to float16 as the graph says; ONNX Runtime's CPU does not."""
    proto = ir.to_proto(model)
    feeds = {"tokens": TOKENS[None], "positions": np.arange(len(TOKENS))[None], LOGIT_ROWS: np.array([len(TOKENS) - 1])}
    for value in proto.graph.input[len(feeds) :]:
        feeds[value.name] = np.zeros([size.dim_value for size in value.type.tensor_type.shape.dim], np.float16)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about overflows
        return np.asarray(ReferenceEvaluator(proto).run(["logits"], feeds)[0])


@pytest.mark.parametrize(("precision", "lowering"), RTX)
def test_the_network_computes_in_float32(precision: str, lowering: str) -> None:
    target, weights = Target.named("rtx", precision, lowering), loud_model()
    outcomes = []
    for fp32_ffns in (frozenset({LOUD}), frozenset[str]()):
        stored = replace(store(TINY, weights, target), fp32_ffns=fp32_ffns)
        expected = stored_reference(TINY, stored).logits(TOKENS)[-1:]  # [1, V]
        got = run_in_float16(build_stored(TINY, stored, target, 64))
        outcomes.append(mean_kl(expected, got))
    assert outcomes[0] < 1e-4
    assert np.isnan(outcomes[1])


@pytest.mark.parametrize(("precision", "lowering"), RTX)
def test_it_compiles(precision: str, lowering: str) -> None:
    pytest.importorskip(tensorrt_library.RTX)
    target = Target.named("rtx", precision, lowering)
    stored = replace(store(TINY, loud_model(), target), fp32_ffns=frozenset({LOUD}))
    assert build_engine(tensorrt_library.RTX, to_bytes(build_stored(TINY, stored, target, 64)), 64, "SM86").plan
