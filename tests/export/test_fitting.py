"""Every model gets a lowering that computes it, and a matrix that blocks do not divide gets another precision alone."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from helpers.random_model import random_model
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.export import genai
from merino_edge.export.fitting import fitted, notes, require_fit
from merino_edge.export.graph import build_model, build_stored, lowering, to_bytes
from merino_edge.export.parity import LIMITS, TorchReference, mean_kl, stored_reference
from merino_edge.export.quantization.stored_weights import odd_matrices, random_stored, store
from merino_edge.export.targets import TARGETS, Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.storage import why_unfit
from merino_edge.tensorrt_library import RTX

TOKENS = np.random.default_rng(1).integers(0, 48, 24)
PUBLIC = {"pythia-14m": (32, 8), "pythia-2.8b": (80, 20), "open_llama_3b": (100, 100)}


def heads_of(head_dim: int, rotary_dim: int) -> Architecture:
    positions = {"positions": "rotary", "rotary_dim": rotary_dim} if rotary_dim else {}
    return Architecture(48, 64, 32, head_dim, (Block(2 * head_dim, 1, 2, 1, 32),), **positions)  # type: ignore[arg-type]


def run(graph: bytes, a: Architecture) -> np.ndarray:
    """Logits [T, V] of a prompt's last token and of the tokens after it, one by one."""
    engine = OnnxEngine(graph, a, 64, threads=1)
    return np.stack(
        [engine.forward(TOKENS[: len(TOKENS) - 8], 0).copy()]
        + [engine.forward(TOKENS[i : i + 1], i).copy() for i in range(len(TOKENS) - 8, len(TOKENS))]
    )


def expected(reference: TorchReference) -> np.ndarray:
    return reference.logits(TOKENS)[len(TOKENS) - 9 :]


@pytest.mark.parametrize("head_dim", [8, 12, 16, 24, 32, 40, 48])
@pytest.mark.parametrize("rotary_dim", [0, 2, 8, 16, 32])
def test_the_rule_is_onnx_runtimes_own(head_dim: int, rotary_dim: int) -> None:
    """A graph that the rule refuses does not run, and one that it takes does."""
    if rotary_dim > head_dim:
        return
    a, target = heads_of(head_dim, rotary_dim), Target.named("onnxruntime", "fp32", "ort")
    graph = to_bytes(lowering("ort")(a, random_stored(a, target), target, 64).build())
    if why_unfit("ort", head_dim, rotary_dim):
        with pytest.raises(ArtefactError):
            run(graph, a)
    else:
        run(graph, a)


@pytest.mark.parametrize("name", PUBLIC)
@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_model_that_the_usual_lowering_cannot_compute_gets_the_next(name: str, precision: str) -> None:
    a = heads_of(*PUBLIC[name])
    weights, usual = random_model(a), Target.named("onnxruntime", precision)
    target = fitted(usual, a, 64)
    assert target == replace(usual, lowering="native")
    (line, *_) = notes(target, a, usual, 64)
    assert line.startswith("the native lowering is taken, not ort: ONNX Runtime's attention rotates multiples of 16")
    stored = store(a, weights, target)
    got = run(to_bytes(build_stored(a, stored, target, 64)), a)
    assert mean_kl(expected(stored_reference(a, stored)), got) < LIMITS[precision]["graph_kl"]
    np.testing.assert_array_equal(got, run(to_bytes(build_model(a, weights, precision, 64)), a))


def test_a_lowering_that_was_asked_for_is_kept_or_refused() -> None:
    a = heads_of(*PUBLIC["pythia-14m"])
    with pytest.raises(UnsupportedError, match="multiples of 16 channels, not 8") as refusal:
        build_model(a, random_model(a), "fp32", 64, lowering="ort")
    assert refusal.value.hint == "choose --lowering native or primitive"
    primitive = Target.named("onnxruntime", "fp32", "primitive")
    require_fit(primitive, a)
    assert notes(primitive, a, primitive, 64) == []


def test_what_only_the_first_lowering_has_is_refused_by_its_option() -> None:
    a = heads_of(*PUBLIC["pythia-14m"])
    with pytest.raises(UnsupportedError) as refusal:
        fitted(Target.named("onnxruntime", "int8", cache="int8"), a, 64)
    assert refusal.value.hint == "leave --cache out"
    with pytest.raises(UnsupportedError) as refusal:
        fitted(Target.named("onnxruntime-cuda", "fp16"), a, 64)
    assert refusal.value.hint == "choose --target onnxruntime"


def test_short_convolutions_fit_every_target_but_not_genai() -> None:
    convolving = replace(heads_of(32, 32), blocks=(Block(64, 1, 2, 1, 64, convolution=3), Block(64, 1, 2, 1, 64)))
    for name in TARGETS:
        require_fit(Target.named(name, "int4"), convolving)
    with pytest.raises(UnsupportedError, match="onnxruntime-genai keeps no states"):
        genai.check(convolving, Target.named("onnxruntime", "fp32"))


def test_windows_that_leave_little_of_a_cache_get_the_lowering_that_keeps_rings() -> None:
    blocks = (Block(64, 5, 2, 1, 64, window=64), Block(64, 1, 2, 1, 64))
    a = replace(heads_of(32, 32), blocks=blocks, max_positions=4096)
    for name in ("jetpack-7.2", "tensorrt-11", "rtx"):
        usual = Target.named(name, "int4")
        assert fitted(usual, a, 256) == usual  # of 256 positions a ring keeps 192
        assert notes(usual, a, usual, 256) == [
            "layers with a window keep the whole context: 0 MB of cache; with --lowering primitive 0 MB"
        ]
        target = fitted(usual, a, 4096)
        assert target == replace(usual, lowering="primitive") and not target.has_fallback
        assert notes(target, a, usual, 4096) == [
            "the primitive lowering is taken, not native: layers with a window keep only that, 1 MB of cache, not 3"
        ]
        assert notes(usual, a, usual, 4096)[0].endswith("3 MB of cache; with --lowering primitive 1 MB")
    for usual in (Target.named("jetpack-6.2", "int4"), Target.named("onnxruntime", "int4")):
        assert fitted(usual, a, 4096) == usual and notes(usual, a, usual, 4096) == []
    inputs = {v.name: v.shape for v in build_model(a, random_model(a), "fp16", 4096, "rtx").graph.inputs}
    assert [inputs[name] for name in ("key_0", "value_4", "key_5")] == [[1, 1, n, 32] for n in (192, 192, 4096)]


# Each has some matrices that 32 does not divide: the FFN's second, or all that read the residual stream.
ODD = {
    "down": Architecture(48, 64, 64, 32, (Block(64, 1, 2, 1, 72),)),
    "width": Architecture(48, 64, 48, 16, (Block(48, 1, 3, 1, 64),), tied_head=False, ffn="swiglu", norm="rmsnorm"),
    "table": Architecture(48, 64, 40, 32, (Block(64, 2, 2, 1, 64, shared=True),)),
}


@pytest.mark.parametrize("target", ["onnxruntime", "jetpack-6.2", "rtx"])
@pytest.mark.parametrize("precision", ["int4", "int8"])
@pytest.mark.parametrize("name", ODD)
def test_a_matrix_that_blocks_do_not_divide_is_the_only_one_of_another_precision(
    name: str, precision: str, target: str
) -> None:
    a, resolved = ODD[name], Target.named(target, precision)
    stored, odd = store(a, random_model(a), resolved), odd_matrices(a, resolved)
    for matrix, own in odd.items():
        assert own == ("fp16" if target == "onnxruntime" else "int8")
        assert stored.quantized[matrix].bits == 8 if own == "int8" else stored.arrays[matrix].dtype == np.float16
    bits = {q.bits for matrix, q in stored.quantized.items() if matrix not in odd and "layers" in matrix}
    assert bits == {4 if precision == "int4" else 8}
    assert bool(odd) == (target == "onnxruntime" or precision == "int4")
    assert any("32 does not divide" in line for line in notes(resolved, a, resolved, 64)) == bool(odd)
    got = run(to_bytes(build_stored(a, stored, resolved, 64)), a)
    assert mean_kl(expected(stored_reference(a, stored)), got) < LIMITS[precision]["graph_kl"]


@pytest.mark.parametrize("name", ["down", "width"])
def test_odd_matrices_compile(name: str) -> None:
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    a, target = ODD[name], Target.named("rtx", "int4")
    assert build_engine(RTX, to_bytes(build_stored(a, random_stored(a, target), target, 48)), 48, "SM86").plan
