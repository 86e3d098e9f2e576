"""Baselines as people choose them by hand: the shapes of public models, scaled to a cost.

A shape is what a model family keeps at every size. It has a width per layer, an FFN ratio, query heads per KV head, a
norm, an activation and position embeddings. A scaled shape gets the table's head dimension, and the comparison's
vocabulary and context. Its embedding is as wide as its layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.presets import preset

SHAPES = {"GPT-2": "gpt2", "OPT": "opt-125m", "Pythia": "pythia-160m", "SmolLM": "smollm2-135m"}
MAX_LAYERS = 64
OFF_SHAPE = 1.5  # largest factor between a model's width per layer and its family's


def scaled(shape: str, width: int, layers: int, *, head_dim: int, vocab_size: int, context: int) -> Architecture:
    """The shape at another width and number of layers. Raises InputError if heads do not divide the width."""
    if shape not in SHAPES:
        raise InputError(f"there is no shape {shape!r}", f"choose one of {', '.join(SHAPES)}")
    model = preset(SHAPES[shape])
    (block,) = model.blocks
    heads, group = width // head_dim, block.heads // block.kv_heads
    if heads * head_dim != width or heads % group:
        raise InputError(f"{shape} has no width {width} of heads of {head_dim}", "choose another width")
    ffn_width = round(block.ffn_width / block.width * width)
    return dataclasses.replace(
        model,
        vocab_size=vocab_size,
        max_positions=context,
        embedding_width=width,
        head_dim=head_dim,
        position_offset=0,
        rotary_dim=model.rotary_dim * head_dim // model.head_dim,
        blocks=(Block(width, layers, heads, heads // group, ffn_width),),
    )


def largest(
    shape: str,
    cost: Callable[[Architecture], float | None],
    budget: float,
    *,
    head_dim: int,
    vocab_size: int,
    context: int,
    max_width: int,
) -> Architecture:
    """The most expensive scaled shape within `budget`; of several, the one with the most parameters.

    Its width per layer is within a factor of 1.5 of the family's. `cost` returns None for a model that it cannot
    answer. Raises InputError if no scaled shape is within the budget.
    """
    model = preset(SHAPES[shape])
    usual = math.log(model.blocks[0].width / model.layers)
    candidates = []
    for width in range(head_dim, max_width + 1, head_dim):
        for layers in range(1, MAX_LAYERS + 1):
            if abs(math.log(width / layers) - usual) > math.log(OFF_SHAPE):
                continue
            try:
                a = scaled(shape, width, layers, head_dim=head_dim, vocab_size=vocab_size, context=context)
            except InputError:
                break
            value = cost(a)
            if value is not None and value <= budget:
                candidates.append((value, a.parameters, a))
    if not candidates:
        raise InputError(f"no model of {shape}'s shape costs {budget:g} or less", "change the budget")
    return max(candidates, key=lambda entry: entry[:2])[2]
