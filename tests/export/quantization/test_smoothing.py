"""Smoothed weights compute the same logits, and their caches have the returned `absmax`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from helpers.random_model import random_model
from merino_edge.architecture import Architecture, Block
from merino_edge.export.quantization.calibration import collect_statistics
from merino_edge.export.quantization.smoothing import smooth_attention
from merino_edge.pytorch.model import Model

BLOCKS = (Block(64, 2, 2, 1, 96, shared=True), Block(128, 2, 4, 2, 96))


@pytest.mark.parametrize("smooth_values", [False, True])
@pytest.mark.parametrize("bias", ["none", "all"])
@pytest.mark.parametrize("rotary_dim", [0, 16, 32])
def test_logits_stay_and_channels_become_even(rotary_dim: int, bias: str, *, smooth_values: bool) -> None:
    positions = {"positions": "rotary", "rotary_dim": rotary_dim} if rotary_dim else {}
    a = Architecture(80, 100, 64, 32, BLOCKS, bias=bias, **positions)
    weights = random_model(a)
    for name in [name for name in weights if "key" in name or "value" in name]:  # as some models' keys do
        rows = np.linspace(0.2, 3, len(weights[name])).reshape(-1, *[1] * (weights[name].ndim - 1))
        weights[name] = (weights[name] * rows).astype(np.float32)
    before = collect_statistics(a, weights, sequences=4, length=20, with_moments=False).absmax
    smooth, absmax = smooth_attention(a, weights, before, smooth_values=smooth_values)
    tokens = torch.arange(80)[None]
    with torch.inference_mode():
        logits, expected = (Model.from_weights(a, w).eval()(tokens).numpy() for w in (smooth, weights))
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4 * np.abs(expected).max())
    after = collect_statistics(a, smooth, sequences=4, length=20, with_moments=False).absmax  # draws the same text
    for name, channels in absmax.items():
        np.testing.assert_allclose(channels, after[name], rtol=1e-3)
    for kind, power in (("key", 0.5), ("value", float(not smooth_values))):  # the spread that is left
        for layers in ((0, 1), (2,), (3,)):  # the first two share weights
            furthest, unsmoothed = (np.max([r[f"{kind}_{i}"] for i in layers], axis=0) for r in (absmax, before))
            left = furthest / unsmoothed**power
            np.testing.assert_allclose(left, np.full_like(left, left.mean()), rtol=1e-4)


def test_channels_of_zeros_stay_zeros() -> None:
    a = Architecture(80, 100, 64, 32, BLOCKS)
    weights = random_model(a)
    name = "blocks.1.layers.0.attention.key"
    weights[f"{name}.weight"][:5] = 0
    if f"{name}.bias" in weights:
        weights[f"{name}.bias"][:5] = 0
    before = collect_statistics(a, weights, 2, 9, with_moments=False).absmax
    smooth, absmax = smooth_attention(a, weights, before, smooth_values=True)
    assert all(np.isfinite(w).all() for w in smooth.values()) and not absmax["key_2"][0, :5].any()
