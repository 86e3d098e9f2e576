"""SmoothAttention (QServe, Lin et al. 2024): even out the channels of keys and values for an int8 KV cache.

After it, one scale serves a whole cache. The function of the weights stays the same.
A key's channel is divided by the root of its largest magnitude, and the query's channel is multiplied by that root;
the root splits the error, since both get rounded. The two channels of a rotary pair have the same magnitude.
A value's channel is divided by its whole magnitude, and the output matrix's columns that read it are multiplied.
Only an int8 output matrix can bear that: in an int4 block, a column that grows costs its neighbours too much.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.export.quantization.rounding import nonzero

Arrays = dict[str, np.ndarray]


def smooth_attention(
    a: Architecture, weights: Mapping[str, np.ndarray], absmax: Mapping[str, np.ndarray], *, smooth_values: bool
) -> tuple[Arrays, Arrays]:
    """The smoothed weights, and the `absmax` [Hkv, D] that their caches have, by cache name.

    `absmax` is that of `CalibrationStatistics`. Layers that share weights share the factors, which come from the
    largest magnitude of all of them.
    """
    weights, absmax = dict(weights), dict(absmax)
    first = 0  # index of the first computed layer that uses the stored layer
    for index, block in enumerate(a.blocks):
        uses, queries_per_key = block.layers // block.weight_layers, block.heads // block.kv_heads
        if block.convolution:
            first += block.layers
            continue
        for depth in range(block.weight_layers):
            prefix, layers = f"blocks.{index}.layers.{depth}.attention.", range(first, first + uses)
            if a.qk_norm == "none":  # a norm behind the matrix would undo the scaling
                keys = _smoothing_factors(absmax, [f"key_{layer}" for layer in layers], 0.5)
                _scale_rows(weights, f"{prefix}key", 1 / keys.ravel())
                _scale_rows(weights, f"{prefix}query", keys.repeat(queries_per_key, axis=0).ravel())
            if smooth_values:
                values = _smoothing_factors(absmax, [f"value_{layer}" for layer in layers], 1.0)
                _scale_rows(weights, f"{prefix}value", 1 / values.ravel())
                columns = values.repeat(queries_per_key, axis=0).ravel()
                weights[f"{prefix}output.weight"] = weights[f"{prefix}output.weight"] * columns
            first += uses
    return weights, absmax


def _smoothing_factors(absmax: Arrays, caches: Sequence[str], power: float) -> np.ndarray:
    """Factors [Hkv, D] with a geometric mean of 1 that divide the caches; `absmax` is divided by them in place."""
    largest = nonzero(np.max([absmax[name] for name in caches], axis=0)) ** power
    factors = np.asarray(largest / np.exp(np.log(largest).mean()), np.float32)
    absmax.update({name: absmax[name] / factors for name in caches})
    return factors


def _scale_rows(weights: Arrays, name: str, factors: np.ndarray) -> None:
    """Multiply the rows of the matrix [N, K], and its bias [N] where there is one, by `factors` [N]."""
    weights[f"{name}.weight"] = weights[f"{name}.weight"] * factors[:, None]
    if f"{name}.bias" in weights:
        weights[f"{name}.bias"] = weights[f"{name}.bias"] * factors
