"""GPTQ equals rounding to the nearest on uncorrelated inputs, and has less output error on correlated ones."""

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
from merino_edge.pytorch.model import KVCache, Model
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.runtime.engines.onnx_session import FIRST_WITH_INT8_CACHE, installed_version
from merino_edge.weights import random_weights


def choose_scales(group: int, w: np.ndarray, importance: np.ndarray) -> np.ndarray:
    """Scales [N] of the block w [N, B]."""
    return search_scales(w[:, None], importance[None])[:, 0]


def by_gptq(weight: np.ndarray, moments: np.ndarray, block: int = 32) -> np.ndarray:
    """weight [N, K] rounded by GPTQ."""
    codes, scales = gptq(weight.reshape(len(weight), -1, block), moments, choose_scales)
    return (codes * scales[..., None]).reshape(weight.shape)


def by_the_papers_formula(weight: np.ndarray, moments: np.ndarray, block: int = 32) -> np.ndarray:
    """weight [N, K] rounded by GPTQ in float64, column by column, with a new inverse Hessian for every column.

    This is equation 2 of Frantar et al. (2023) without the Cholesky factor and without lazy updates of later blocks.
    """
    w, h = weight.astype(np.float64), moments.astype(np.float64)
    h += 0.01 * np.diag(h).mean() * np.eye(len(h))
    inverses = [np.linalg.inv(h[j:, j:]) for j in range(len(h))]  # of the columns that are not rounded yet
    importance = np.array([1 / inverse[0, 0] for inverse in inverses])
    rounded = np.empty_like(w)
    for j, inverse in enumerate(inverses):
        if j % block == 0:
            part = slice(j, j + block)
            scales = choose_scales(
                j // block, w[:, part].astype(np.float32), importance[part] / importance[part].mean()
            )
        rounded[:, j] = int4_codes(w[:, j] / scales) * scales
        w[:, j + 1 :] -= np.outer((w[:, j] - rounded[:, j]) / inverse[0, 0], inverse[0, 1:])
    return rounded


def to_the_nearest(weight: np.ndarray, block: int = 32) -> np.ndarray:
    """weight [N, K] rounded to the nearest codes."""
    groups = weight.reshape(len(weight), -1, block)
    scales = search_scales(groups)[..., None]
    return (int4_codes(groups / scales) * scales).reshape(weight.shape)


def correlated(rng: np.random.Generator, inputs: int, count: int = 400) -> np.ndarray:
    """[count, inputs] that are sums of 8 fixed directions and some noise, as activations are."""
    directions = np.random.default_rng(inputs).standard_normal((8, inputs))
    return rng.standard_normal((count, 8)) @ directions + 0.3 * rng.standard_normal((count, inputs))


@given(st.integers(0, 2**32 - 1), st.sampled_from((32, 64)), st.integers(1, 3))
@settings(max_examples=20, deadline=None)
def test_with_uncorrelated_inputs_it_is_rounding_to_the_nearest(seed: int, block: int, groups: int) -> None:
    weight = np.random.default_rng(seed).standard_normal((5, block * groups)).astype(np.float32)
    rounded = by_gptq(weight, 3.0 * np.eye(block * groups, dtype=np.float32), block)
    np.testing.assert_array_equal(rounded, to_the_nearest(weight, block))


@given(st.integers(0, 2**32 - 1))
@settings(max_examples=20, deadline=None)
def test_outputs_on_correlated_inputs_are_closer_than_by_rounding_to_the_nearest(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weight, x = rng.standard_normal((48, 96)).astype(np.float32), correlated(rng, 96).astype(np.float32)
    rounded, nearest = by_gptq(weight, x.T @ x), to_the_nearest(weight)
    unseen = correlated(rng, 96)
    error, plain = (np.square(unseen @ (weight - q).T).sum() for q in (rounded, nearest))
    assert error < 0.7 * plain


def test_it_rounds_as_the_papers_formula_does() -> None:
    """Over two blocks: nearly all weights agree, though float32 decides a few ties otherwise."""
    rng = np.random.default_rng(3)
    weight, x = rng.standard_normal((48, 64)).astype(np.float32), correlated(rng, 64).astype(np.float32)
    rounded, expected = by_gptq(weight, x.T @ x), by_the_papers_formula(weight, x.T @ x)
    for block in (slice(0, 32), slice(32, 64)):
        assert (np.abs(rounded[:, block] - expected[:, block]) < 1e-3).mean() > 0.98


def test_an_error_is_passed_on_to_later_blocks() -> None:
    """The second block makes up for the first: less output error than with GPTQ inside each block alone."""
    rng = np.random.default_rng(3)
    weight, x = rng.standard_normal((48, 64)).astype(np.float32), correlated(rng, 64).astype(np.float32)
    moments = x.T @ x
    rounded = by_gptq(weight, moments)
    blocks = (slice(0, 32), slice(32, 64))
    independent = np.hstack([by_gptq(weight[:, block], moments[block, block]) for block in blocks])
    error, independent_error = (np.square(x @ (weight - q).T).sum() for q in (rounded, independent))
    assert error < 0.8 * independent_error


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


def test_moments_are_those_of_the_inputs_that_matrices_get() -> None:
    a = preset("merino-52m")
    blocks = tuple(dataclasses.replace(b, width=64, heads=1, kv_heads=1, ffn_width=96) for b in a.blocks[:2])
    a = dataclasses.replace(a, vocab_size=80, embedding_width=64, blocks=blocks, max_positions=32)
    weights = {name: 3 * w for name, w in random_weights(a).items()}
    moments = collect_statistics(a, weights, sequences=3, length=20).moments
    assert set(moments) == {name for name, w in weights.items() if w.ndim == 2 and name != "positions.weight"}
    assert moments["blocks.0.layers.0.attention.key.weight"] is moments["blocks.0.layers.0.attention.query.weight"]
    for name, moment in moments.items():
        assert moment.shape == (weights[name].shape[1],) * 2
        assert np.linalg.eigvalsh(moment.astype(np.float64)).min() > -1e-2 * np.trace(moment)
    again = collect_statistics(a, weights, sequences=3, length=20).moments
    assert all(np.array_equal(moments[name], again[name]) for name in moments)
    # The head's moments are those of the last norm's output, also where the head is a matrix of its own.
    untied = dataclasses.replace(a, tied_head=False)
    own = collect_statistics(
        untied, weights | {"head.weight": weights["embedding.weight"]}, sequences=3, length=20
    ).moments
    assert "embedding.weight" not in own and np.array_equal(own["head.weight"], moments["embedding.weight"])
    # The first matrix of a block of two shared layers saw 3 sequences of 20 positions twice.
    model, seen = Model.from_weights(a, weights), []
    model.blocks[0].layers[0].attention.query.register_forward_pre_hook(lambda _, x: seen.append(x[0].flatten(0, -2)))
    model(torch.randint(80, (3, 20)))
    assert sum(map(len, seen)) == 3 * 20 * a.blocks[0].layers


@pytest.mark.parametrize("rotary_dim", [0, 16, 32])
def test_absmax_bounds_keys_and_values_wherever_a_rotation_turns_them(rotary_dim: int) -> None:
    kind = {"positions": "rotary", "rotary_dim": rotary_dim} if rotary_dim else {}
    a = Architecture(80, 100, 64, 32, (Block(64, 2, 2, 1, 96, shared=True), Block(96, 1, 3, 3, 64)), **kind)
    weights = random_weights(a)
    assert list(collect_statistics(a, weights, sequences=2, length=9, with_moments=False).absmax) == [
        n for n, _ in cache_names(a)
    ]
    model, tokens = Model.from_weights(a, weights), torch.arange(80)[None]
    caches = [KVCache(a), KVCache(a)]
    with torch.inference_mode():
        model(tokens, caches[0])
        model(tokens.flip(1), caches[1])  # the first layer has the same keys, at other angles
    absmax = cache_absmax(a, caches[0])
    for layer in range(a.layers):
        for name, tensor in ((f"key_{layer}", caches[0].keys[layer]), (f"value_{layer}", caches[0].values[layer])):
            largest = tensor[0].abs().amax(dim=1).numpy()
            assert absmax[name].shape == largest.shape and (largest <= absmax[name]).all()
            turned = slice(0, rotary_dim if name.startswith("key") else 0)
            assert np.array_equal(np.delete(absmax[name], turned, 1), np.delete(largest, turned, 1))
    if rotary_dim:
        assert (caches[1].keys[0][0].abs().amax(dim=1).numpy() <= 1.0001 * absmax["key_0"]).all()


@pytest.mark.parametrize("target", ["onnxruntime", "rtx"])
def test_store_rounds_by_gptq_what_has_moments_and_the_rest_to_the_nearest(target: str) -> None:
    a = preset("merino-52m")
    blocks = (dataclasses.replace(a.blocks[0], width=64, heads=1, kv_heads=1, ffn_width=96, layers=1),)
    a = dataclasses.replace(a, vocab_size=80, embedding_width=64, blocks=blocks, max_positions=32)
    weights = random_weights(a)
    x = correlated(np.random.default_rng(0), 64)
    name, other = (f"blocks.0.layers.0.{part}.weight" for part in ("attention.query", "ffn.up"))
    int4 = Target.named(target, "int4")
    plain, by_moments = store(a, weights, int4), store(a, weights, int4, {name: (x.T @ x).astype(np.float32)})
    assert not np.array_equal(plain.quantized[name].codes, by_moments.quantized[name].codes)
    np.testing.assert_array_equal(plain.quantized[other].codes, by_moments.quantized[other].codes)


def test_a_fast_bundle_says_what_it_is_and_is_smaller(tiny_checkpoint: Checkpoint, tmp_path: Path) -> None:
    a, bundles = tiny_checkpoint.architecture, {}
    for fast in (False, True):
        target = Target.named("onnxruntime", "int4", block=64 if fast else 32, fast=fast)
        rounding = "gptq" if fast else "nearest"
        bundles[fast] = write_bundle(
            tiny_checkpoint,
            tmp_path / rounding,
            ExportOptions(target, 96, rounding=rounding),
            lambda graph, n: OnnxEngine(graph, a, n, 1),
        )
        assert bundles[fast].manifest["int4"] == {"fast": fast, "block": target.block, "rounding": rounding}
    plain, small = (bundles[fast].manifest["files"]["model.onnx.data"]["bytes"] for fast in (False, True))
    assert small < plain - 300 * 64 // 4  # half of the table's bytes, less the scales of its blocks


@pytest.mark.skipif(installed_version() < FIRST_WITH_INT8_CACHE, reason="this ONNX Runtime has no int8 cache")
@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_an_int8_cache_changes_a_bundles_checks_little(
    tiny_checkpoint: Checkpoint, tmp_path: Path, precision: str
) -> None:
    a, checks = tiny_checkpoint.architecture, {}
    for cache in ("float", "int8"):
        target = Target.named("onnxruntime", precision, cache=cache)
        bundle = write_bundle(
            tiny_checkpoint, tmp_path / cache, ExportOptions(target, 96), lambda graph, n: OnnxEngine(graph, a, n, 1)
        )
        assert bundle.manifest["graph"]["cache"] == cache
        checks[cache] = {check["check"]: check["value"] for check in bundle.manifest["parity"]}
        with contextlib.closing(OnnxEngine.from_bundle(bundle, 1)) as engine:
            assert engine.cache_dtype == {"float": np.float32, "int8": np.int8}[cache]
    assert checks["int8"] != checks["float"]
    assert checks["int8"]["graph_kl"] < checks["float"]["graph_kl"] + 1e-3
