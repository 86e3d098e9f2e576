"""The tensors of a plan: the inputs and outputs of a graph for TensorRT, as its parser reads them, and their memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from merino_edge import cache_rings
from merino_edge.architecture import Architecture
from merino_edge.graph_io import GATED_PREFIX, LOGIT_ROWS, NEW_KV_PREFIX, STATE_PREFIX


class Tensor(NamedTuple):
    """One input or output of a plan; -1 in its shape is the number of tokens, or of rows of logits."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as numpy spells it


def bound_tensors(
    a: Architecture,
    capacity: int,
    prefix: str = "new_",
    dtype: str = "float16",
    *,
    one_row: bool = False,
    rings: bool = False,
) -> list[Tensor]:
    """All inputs and outputs of the graph of `a`.

    `prefix` is that of the cache outputs: `new_` (native) or NEW_KV_PREFIX (primitive). `one_row`: a graph of an older
    bundle, which returns only the last row of logits. `rings`: whether layers with a window keep rings, as `primitive`
    graphs do, but for those of older bundles.
    """
    layers = list(enumerate(a.layer_blocks()))
    caches = [
        Tensor(f"{output}{kind}_{layer}", (1, block.kv_heads, rows, a.head_dim), dtype)
        for layer, block in layers
        if not block.convolution
        for kind in ("key", "value")
        for length in [cache_rings.ring_positions(block.window, capacity) if rings else capacity]
        for output, rows in (("", length), (prefix, -1 if prefix == NEW_KV_PREFIX else length))
    ]
    states = [
        Tensor(f"{name}{layer}", (1, rows, block.width), "float32")
        for layer, block in layers
        if block.convolution
        for name, rows in ((STATE_PREFIX, block.convolution - 1), (GATED_PREFIX, -1))
    ]
    others = [Tensor("tokens", (1, -1), "int64"), Tensor("positions", (1, -1), "int64")]
    others += [] if one_row else [Tensor(LOGIT_ROWS, (-1,), "int64")]
    return [*others, *caches, *states, Tensor("logits", (1 if one_row else -1, a.vocab_size), "float32")]


def owner(name: str) -> str:
    """The tensor whose memory `name` uses: an updated cache has the address of the cache."""
    return name.removeprefix("new_")


def buffer_bytes(tensors: Iterable[Tensor], longest: int, rows: int) -> dict[str, int]:
    """The size of each buffer by its owner, for steps of up to `longest` tokens and `rows` rows of logits."""
    sizes = {}
    for name, shape, dtype in tensors:
        most = rows if name in (LOGIT_ROWS, "logits") else longest
        sizes[owner(name)] = math.prod(most if extent == -1 else extent for extent in shape) * np.dtype(dtype).itemsize
    return sizes
