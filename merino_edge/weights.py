"""The names and shapes of a model's weights, as stored in a checkpoint's `model.safetensors`.

The PyTorch module, the importers, the exporter and the profiler all use these. Linear weights are [out, in] as in
PyTorch. A shared block stores only `layers.0`.

    embedding.weight [V, E]            positions.weight [rows, W_0]      projection_in.weight [W_0, E]
    blocks.B.projection.weight [W_B, W_B-1]
    blocks.B.layers.L.attention_norm.weight|bias [W]      ...ffn_norm.weight|bias [W]
    blocks.B.layers.L.attention_output_norm...   ...ffn_output_norm...   (norm_placement both)
    blocks.B.layers.L.attention.query|key|value|output.weight [out, in], .bias [out]
    blocks.B.layers.L.attention.query_norm|key_norm.weight [D], or as wide as query and key (qk_norm)
    blocks.B.layers.L.convolution.input.weight [3 W, W], .taps.weight [W, K], .output.weight [W, W], .bias of each
    blocks.B.layers.L.ffn.gate|up|down.weight [out, in], .bias [out]
    final_norm.weight|bias [W_N]       projection_out.weight [E, W_N]    head.weight [V, E]
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from merino_edge.architecture import Architecture, Block

Shape = tuple[int, ...]
TAPS = "convolution.taps.weight"  # how the names end of a convolution's taps, [W, K], which stay float32

SHARES_INPUT_OF = {"key": "query", "value": "query", "up": "gate"}  # where the layer has the latter


def group_by_input(names: Iterable[str]) -> list[tuple[str, ...]]:
    """Names of matrices, grouped where they multiply the same input: query, key and value; gate and up."""
    names, groups = list(names), dict[str, tuple[str, ...]]()
    for name in names:
        stem, _, last = name.removesuffix(".weight").rpartition(".")
        first = f"{stem}.{SHARES_INPUT_OF.get(last, last)}.weight"
        first = first if first in names else name
        groups[first] = (*groups.get(first, ()), name)
    return list(groups.values())


def _norm(name: str, width: int, a: Architecture) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (width,)
    if a.norm == "layernorm":
        yield f"{name}.bias", (width,)


def _linear(name: str, out: int, into: int, *, bias: bool) -> Iterator[tuple[str, Shape]]:
    yield f"{name}.weight", (out, into)
    if bias:
        yield f"{name}.bias", (out,)


def layer_shapes(a: Architecture, block: Block, prefix: str) -> Iterator[tuple[str, Shape]]:
    """Names and shapes of one layer's weights. Each name starts with `prefix`."""
    width, everywhere, both = block.width, a.bias == "all", a.norm_placement == "both"
    yield from _norm(f"{prefix}attention_norm", width, a)
    yield from _convolution_shapes(a, block, prefix) if block.convolution else _attention_shapes(a, block, prefix)
    if both:
        yield from _norm(f"{prefix}attention_output_norm", width, a)
    yield from _norm(f"{prefix}ffn_norm", width, a)
    for name in ("gate", "up") if a.gated else ("up",):
        yield from _linear(f"{prefix}ffn.{name}", block.ffn_width, width, bias=everywhere)
    yield from _linear(f"{prefix}ffn.down", width, block.ffn_width, bias=everywhere)
    if both:
        yield from _norm(f"{prefix}ffn_output_norm", width, a)


def _attention_shapes(a: Architecture, block: Block, prefix: str) -> Iterator[tuple[str, Shape]]:
    width, query_width, kv_width = block.width, block.heads * a.head_dim, block.kv_heads * a.head_dim
    for name, out in (("query", query_width), ("key", kv_width), ("value", kv_width)):
        yield from _linear(f"{prefix}attention.{name}", out, width, bias=a.bias != "none")
    if a.qk_norm != "none":
        for name, out in (("query", query_width), ("key", kv_width)):
            yield f"{prefix}attention.{name}_norm.weight", (a.head_dim if a.qk_norm == "head" else out,)
    yield from _linear(f"{prefix}attention.output", width, query_width, bias=a.bias == "all")


def _convolution_shapes(a: Architecture, block: Block, prefix: str) -> Iterator[tuple[str, Shape]]:
    width = block.width
    for name, out, into in (("input", 3 * width, width), ("taps", width, block.convolution), ("output", width, width)):
        yield from _linear(f"{prefix}convolution.{name}", out, into, bias=a.convolution_bias)


def is_matrix(name: str, shape: Shape) -> bool:
    """Whether a weight is multiplied as a matrix, or looked up as a table. The taps of a convolution are neither."""
    return len(shape) > 1 and not name.endswith(TAPS)


def weight_shapes(a: Architecture) -> dict[str, Shape]:
    """The name and shape of every stored weight, in file order."""

    def walk() -> Iterator[tuple[str, Shape]]:
        first, last = a.blocks[0].width, a.blocks[-1].width
        yield "embedding.weight", (a.vocab_size, a.embedding_width)
        if a.positions == "learned":
            yield "positions.weight", (a.position_rows, first)
        if a.embedding_width != first:
            yield from _linear("projection_in", first, a.embedding_width, bias=False)
        previous = first
        for index, block in enumerate(a.blocks):
            if block.width != previous:
                yield from _linear(f"blocks.{index}.projection", block.width, previous, bias=False)
            previous = block.width
            for layer in range(block.weight_layers):
                yield from layer_shapes(a, block, f"blocks.{index}.layers.{layer}.")
        if a.final_norm:
            yield from _norm("final_norm", last, a)
        if a.embedding_width != last:
            yield from _linear("projection_out", a.embedding_width, last, bias=False)
        if not a.tied_head:
            yield "head.weight", (a.vocab_size, a.embedding_width)

    return dict(walk())


def random_weights(a: Architecture, seed: int = 0) -> dict[str, np.ndarray]:
    """Random float32 weights for timing: N(0, 0.02), norms 1 and biases 0. Latency does not depend on the values."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in weight_shapes(a).items():
        if "norm" in name or name.endswith(".bias"):
            weights[name] = np.full(shape, 1.0 if name.endswith("norm.weight") else 0.0, np.float32)
        else:
            weights[name] = rng.standard_normal(shape, np.float32) * np.float32(0.02)
    return weights
