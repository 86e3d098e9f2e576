"""GPTQ rounds as well as nearest rounding where inputs say nothing, and better where they do."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge.architecture import Architecture, Block
from merino_edge.checkpoint import Checkpoint
from merino_edge.export.bundle_writer import write_bundle
from merino_edge.export.graph import cache_names
from merino_edge.export.prepare_weights import ExportOptions
from merino_edge.export.quantization.calibration import cache_absmax, collect_statistics
from merino_edge.export.quantization.gptq import gptq, inverse_hessian_factor
from merino_edge.export.quantization.rounding import int4_codes, search_scales
from merino_edge.export.quantization.stored_weights import store
from merino_edge.export.targets import Target
from merino_edge.presets import preset
from merino_edge.pytorch.model import Cache, Model
from merino_edge.runtime.engines.onnx_engine import FIRST_WITH_INT8_CACHE, OnnxEngine, installed_version
from merino_edge.weights import random_weights


def by_gptq(weight: np.ndarray, moments: np.ndarray, block: int = 32) -> np.ndarray:
    """What weight [N, K] is rounded to."""
    groups = weight.reshape(len(weight), -1, block)
    codes, scales = gptq(
        groups, moments, lambda group, w, importance: search_scales(w[:, None], importance[None])[:, 0]
    )
    return (codes * scales[..., None]).reshape(weight.shape)


def to_the_nearest(weight: np.ndarray, block: int = 32) -> np.ndarray:
    groups = weight.reshape(len(weight), -1, block)
    scales = search_scales(groups)[..., None]
    return (int4_codes(groups / scales) * scales).reshape(weight.shape)


def correlated(rng: np.random.Generator, inputs: int, count: int = 400) -> np.ndarray:
    """[count, inputs] of a few directions and some noise, as activations are."""
    directions = np.random.default_rng(inputs).standard_normal((8, inputs))  # always the same
    return rng.standard_normal((count, 8)) @ directions + 0.3 * rng.standard_normal((count, inputs))


@given(st.integers(0, 2**32 - 1), st.sampled_from((32, 64)), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_with_uncorrelated_inputs_it_is_rounding_to_the_nearest(seed: int, block: int, groups: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((5, block * groups)).astype(np.float32)
    found = by_gptq(weight, 3.0 * np.eye(block * groups, dtype=np.float32), block)
    np.testing.assert_array_equal(found, to_the_nearest(weight, block))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_outputs_on_correlated_inputs_are_closer_than_by_rounding_to_the_nearest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, x = rng.standard_normal((48, 96)).astype(np.float32), correlated(rng, 96).astype(np.float32)
    found, nearest = by_gptq(weight, x.T @ x), to_the_nearest(weight)
    unseen = correlated(rng, 96)
    error, plain = (np.square(unseen @ (weight - q).T).sum() for q in (found, nearest))
    assert error < 0.7 * plain


def test_the_factor_is_that_of_the_damped_inverse() -> None:
    x = correlated(np.random.default_rng(0), 32)
    moments = x.T @ x
    factor = inverse_hessian_factor(moments)
    damped = moments + 0.01 * np.diag(moments).mean() * np.eye(32)
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(32), atol=2e-3)
    assert np.allclose(factor, np.triu(factor))


def test_inputs_that_text_never_shows_do_no_harm() -> None:
    rng = np.random.default_rng(1)
    x = correlated(rng, 64)
    x[:, 10:20] = 0
    weight = rng.standard_normal((8, 64)).astype(np.float32)
    np.testing.assert_allclose(by_gptq(weight, (x.T @ x).astype(np.float32)), weight, atol=1.5)


def test_moments_are_those_of_the_inputs_that_the_model_sees() -> None:
    a = preset("merino-52m")
    blocks = tuple(dataclasses.replace(b, width=64, heads=1, kv_heads=1, ffn_width=96) for b in a.blocks[:2])
    a = dataclasses.replace(a, vocab_size=80, embedding_width=64, blocks=blocks, max_positions=32)
    weights = {name: 3 * w for name, w in random_weights(a).items()}
    found = collect_statistics(a, weights, sequences=3, length=20).moments
    assert set(found) == {name for name, w in weights.items() if w.ndim == 2 and name != "positions.weight"}
    assert found["blocks.0.layers.0.attention.key.weight"] is found["blocks.0.layers.0.attention.query.weight"]
    for name, moment in found.items():
        assert moment.shape == (weights[name].shape[1],) * 2
        assert np.linalg.eigvalsh(moment.astype(np.float64)).min() > -1e-2 * np.trace(moment)
    again = collect_statistics(a, weights, sequences=3, length=20).moments
    assert all(np.array_equal(found[name], again[name]) for name in found)
    # The head's are those of what leaves the last norm, whether or not it is a matrix of its own.
    untied = dataclasses.replace(a, tied_head=False)
    own = collect_statistics(untied, weights | {"head.weight": weights["embedding.weight"]}, sequences=3, length=20).moments
    assert "embedding.weight" not in own and np.array_equal(own["head.weight"], found["embedding.weight"])
    # The first matrix of a block of two shared layers saw 3 sequences of 20 positions twice.
    model, seen = Model.from_weights(a, weights), []
    model.blocks[0].layers[0].attention.query.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    model(torch.randint(80, (3, 20)))
    assert sum(map(len, seen)) == 3 * 20 * a.blocks[0].layers


@pytest.mark.parametrize("rotary_dim", [0, 16, 32])
def test_keys_and_values_stay_within_reach_wherever_a_rotation_turns_them(rotary_dim: int) -> None:
    kind = {"positions": "rotary", "rotary_dim": rotary_dim} if rotary_dim else {}
    a = Architecture(80, 100, 64, 32, (Block(64, 2, 2, 1, 96, True), Block(96, 1, 3, 3, 64)), **kind)
    weights = random_weights(a)
    assert list(collect_statistics(a, weights, sequences=2, length=9, with_moments=False).reach) == [n for n, _ in cache_names(a)]
    model, tokens = Model.from_weights(a, weights), torch.arange(80)[None]
    caches = [Cache(a), Cache(a)]
    with torch.inference_mode():
        model(tokens, caches[0])
        model(tokens.flip(1), caches[1])  # of the first layer the same keys, turned otherwise
    found = cache_absmax(a, caches[0])
    for layer in range(a.layers):
        for name, tensor in ((f"key_{layer}", caches[0].keys[layer]), (f"value_{layer}", caches[0].values[layer])):
            largest = tensor[0].abs().amax(dim=1).numpy()
            assert found[name].shape == largest.shape and (largest <= found[name]).all()
            turned = slice(0, rotary_dim if name.startswith("key") else 0)
            assert np.array_equal(np.delete(found[name], turned, 1), np.delete(largest, turned, 1))
    if rotary_dim:
        assert (caches[1].keys[0][0].abs().amax(dim=1).numpy() <= 1.0001 * found["key_0"]).all()


@pytest.mark.parametrize("target", ["onnxruntime", "rtx"])
def test_store_rounds_by_gptq_what_has_moments_and_the_rest_to_the_nearest(target: str) -> None:
    a = preset("merino-52m")
    blocks = (dataclasses.replace(a.blocks[0], width=64, heads=1, kv_heads=1, ffn_width=96, layers=1),)
    a = dataclasses.replace(a, vocab_size=80, embedding_width=64, blocks=blocks, max_positions=32)
    weights = random_weights(a)
    x = correlated(np.random.default_rng(0), 64)
    name, other = (f"blocks.0.layers.0.{part}.weight" for part in ("attention.query", "ffn.up"))
    chosen = Target.named(target, "int4")
    plain, found = store(a, weights, chosen), store(a, weights, chosen, {name: (x.T @ x).astype(np.float32)})
    assert not np.array_equal(plain.quantized[name].codes, found.quantized[name].codes)
    np.testing.assert_array_equal(plain.quantized[other].codes, found.quantized[other].codes)


def test_a_fast_bundle_says_what_it_is_and_is_smaller(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    a, made = tiny_checkpoint.architecture, {}
    for fast in (False, True):
        target = Target.named("onnxruntime", "int4", block=64 if fast else 32, fast=fast)
        rounding = "gptq" if fast else "nearest"
        made[fast] = write_bundle(
            tiny_checkpoint,
            tmp_path / rounding,
            ExportOptions(target, 96, rounding=rounding),
            lambda graph, n: OnnxEngine(graph, a, n, 1),
        )
        assert made[fast].manifest["int4"] == {"fast": fast, "block": target.block, "rounding": rounding}
    plain, small = (made[fast].manifest["files"]["model.onnx.data"]["bytes"] for fast in (False, True))
    assert small < plain - 300 * 64 // 4  # of the table's bytes half, less the scales of its blocks


@pytest.mark.skipif(installed_version() < FIRST_WITH_INT8_CACHE, reason="this ONNX Runtime has no cache of int8")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_cache_of_int8_changes_little_of_what_a_bundle_says(
    tiny_checkpoint: Checkpoint, tmp_path: Path, precision: str
) -> None:
    a, found = tiny_checkpoint.architecture, {}
    for cache in ("float", "int8"):
        target = Target.named("onnxruntime", precision, cache=cache)
        made = write_bundle(
            tiny_checkpoint, tmp_path / cache, ExportOptions(target, 96), lambda graph, n: OnnxEngine(graph, a, n, 1)
        )
        assert made.manifest["graph"]["cache"] == cache
        found[cache] = {check["check"]: check["value"] for check in made.manifest["parity"]}
        with contextlib.closing(OnnxEngine.from_bundle(made, 1)) as engine:
            assert engine.cache_dtype == {"float": np.float32, "int8": np.int8}[cache]
    assert found["int8"] != found["float"]
    assert found["int8"]["graph_kl"] < found["float"]["graph_kl"] + 1e-3
