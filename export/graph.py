"""A checkpoint's weights as an ONNX graph, written node by node without tracing.

A graph runs one step of one sequence with a static, preallocated KV cache:

    tokens int64 [1, T]    positions int64 [1, T] (consecutive)    key_L, value_L  [1, Hkv, C, D]  per layer
    logit_rows int64 [N] (indices of tokens); for `ort` `wanted` int64 [1] (the last N tokens)
    -> logits float32 [N, V] of those tokens                       new cache contents, per layer

A lowering decides how attention and the cache are written, and what the cache outputs hold:

| lowering | outputs | the runtime |
|---|---|---|
| native, ort | `new_key_L`, `new_value_L`: the caches | binds them to the caches' memory |
| primitive | `row_key_L`, `row_value_L` [1, Hkv, T, D]: the new keys and values | copies them into the caches |

A layer with a short convolution has no caches. Every lowering gives it the input `state_L` [1, K - 1, W] and the output
`gated_L` [1, T, W], float32 (merino_edge.export.lowerings.short_convolution).

Residual stream, norms, softmax and logits stay float32 at every precision. The 1/sqrt(D) of attention is multiplied
into the query weights, because TensorRT's attention layer has no scale of its own.
This module knows no precision's storage form and no runtime.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir

from merino_edge.architecture import Architecture
from merino_edge.export.fitting import fitted, require_fit
from merino_edge.export.lowerings.builder import GraphBuilder
from merino_edge.export.lowerings.weight_writer import ALIAS
from merino_edge.export.quantization.stored_weights import StoredWeights, store
from merino_edge.export.targets import Target
from merino_edge.graph_io import GATED_PREFIX, STATE_PREFIX

MIN_EXTERNAL_BYTES = 1024  # smaller tensors stay inside model.onnx


def build_model(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    precision: str = "fp32",
    context: int = 1024,
    target: str = "onnxruntime",
    *,
    lowering: str = "",
) -> ir.Model:
    """The graph of `a` with `weights` (by the names of merino_edge.weights) at `precision`.

    `context` is the largest number of positions C of the cache. An empty `lowering` takes the first of the target's
    that fits the model. Raises UnsupportedError where the target cannot run the precision or the lowering.
    """
    resolved = Target.named(target, precision, lowering)
    if not lowering:
        resolved = fitted(resolved, a, context)
    return build_stored(a, store(a, weights, resolved), resolved, context)


def build_stored(
    a: Architecture, stored: StoredWeights, target: Target, context: int, capacity: int | None = None
) -> ir.Model:
    """The graph over weights that are already in the form `target` stores.

    `capacity`: positions C of the cache where the graph fixes them, at most `context`. The weights are the same for
    every capacity, so that graphs of several share one file. Raises UnsupportedError where the lowering has no kernels
    for the model.
    """
    require_fit(target, a)
    return lowering(target.lowering)(a, stored, target, context, capacity).build()


def lowering(name: str) -> type[GraphBuilder]:
    """The builder that writes the lowering `name`."""
    from merino_edge.export.lowerings.native import NativeBuilder
    from merino_edge.export.lowerings.ort import OrtBuilder
    from merino_edge.export.lowerings.primitive import PrimitiveBuilder

    return {"native": NativeBuilder, "ort": OrtBuilder, "primitive": PrimitiveBuilder}[name]


def to_bytes(model: ir.Model) -> bytes:
    """The model as one serialized ONNX file with its weights (at most 2 GB), for timing and tests."""
    return bytes(ir.to_proto(model).SerializeToString())


def save(model: ir.Model, path: Path) -> None:
    """Write the model as `path` and its weights beside it (`model.onnx.data`); an alias shares its original's bytes."""
    aliases = [value for name, value in model.graph.initializers.items() if name.endswith(ALIAS)]
    for alias in aliases:
        alias.const_value = ir.tensor(np.empty(0, np.uint8))
    ir.save(model, path, external_data=f"{path.name}.data", size_threshold_bytes=MIN_EXTERNAL_BYTES)
    if aliases:
        save_beside(model, path, path)


def save_beside(model: ir.Model, path: Path, saved: Path) -> None:
    """Write the model as `path` over the weights of the graph `saved` in the same folder.

    Weights with the same name must be the same.
    """
    stored = ir.load(saved).graph.initializers
    for name, value in model.graph.initializers.items():
        original = stored.get(name.removesuffix(ALIAS))
        if original is not None and isinstance(original.const_value, ir.ExternalTensor):
            value.const_value = original.const_value
    ir.save(model, path)


def cache_names(a: Architecture, prefix: str = "new_") -> list[tuple[str, str]]:
    """(input, output) names of the caches: key and value of every computed layer with attention, in order."""
    attends = [layer for layer, block in enumerate(a.layer_blocks()) if not block.convolution]
    return [(f"{kind}_{layer}", f"{prefix}{kind}_{layer}") for layer in attends for kind in ("key", "value")]


def state_names(a: Architecture) -> list[tuple[str, str]]:
    """(input, output) names of the states of convolutions, in order."""
    convolves = [layer for layer, block in enumerate(a.layer_blocks()) if block.convolution]
    return [(f"{STATE_PREFIX}{layer}", f"{GATED_PREFIX}{layer}") for layer in convolves]
