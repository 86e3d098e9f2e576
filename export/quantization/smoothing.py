"""Keys and values whose channels reach about equally far, so that one scale serves a whole cache of int8.

SmoothAttention (QServe, Lin et al. 2024): a key's channel is divided by the root of how far it reaches, and the queries
that meet it are multiplied by that, since both get rounded; of a pair that a rotation turns both reach equally far. A
value's channel is divided by how far it reaches, and the columns of the output matrix that read it are multiplied,
where that matrix can bear it: in a block of int4 a column that grows costs its neighbours more than the cache gains.
The function of the weights stays the same.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.export.quantization.rounding import nonzero

Arrays = dict[str, np.ndarray]


def smooth_attention(
    a: Architecture, weights: Mapping[str, np.ndarray], reach: Mapping[str, np.ndarray], smooth_values: bool
) -> tuple[Arrays, Arrays]:
    """The same function's weights, and how far its caches reach then (merino_edge.export.quantization.calibration).

    Layers that share weights share the factors, which the furthest of them decides.
    """
    weights, reach = dict(weights), dict(reach)
    first = 0  # of the computed layers that use the stored one
    for index, block in enumerate(a.blocks):
        uses, queries = block.layers // block.weight_layers, block.heads // block.kv_heads
        for depth in range(block.weight_layers):
            prefix, layers = f"blocks.{index}.layers.{depth}.attention.", range(first, first + uses)
            keys = _evened(reach, [f"key_{layer}" for layer in layers], 0.5)
            _scale_rows(weights, f"{prefix}key", 1 / keys.ravel())
            _scale_rows(weights, f"{prefix}query", keys.repeat(queries, axis=0).ravel())
            if smooth_values:
                values = _evened(reach, [f"value_{layer}" for layer in layers], 1.0)
                _scale_rows(weights, f"{prefix}value", 1 / values.ravel())
                columns = values.repeat(queries, axis=0).ravel()
                weights[f"{prefix}output.weight"] = weights[f"{prefix}output.weight"] * columns
            first += uses
    return weights, reach


def _evened(reach: Arrays, caches: Sequence[str], power: float) -> np.ndarray:
    """Factors [Hkv, D] around 1 that the caches are divided by, in `reach` already."""
    furthest = nonzero(np.max([reach[name] for name in caches], axis=0)) ** power
    factors = np.asarray(furthest / np.exp(np.log(furthest).mean()), np.float32)
    reach.update({name: reach[name] / factors for name in caches})
    return factors


def _scale_rows(weights: Arrays, name: str, factors: np.ndarray) -> None:
    """Of the matrix [N, K], and its bias [N] where it has one."""
    weights[f"{name}.weight"] = weights[f"{name}.weight"] * factors[:, None]
    if f"{name}.bias" in weights:
        weights[f"{name}.bias"] = weights[f"{name}.bias"] * factors
