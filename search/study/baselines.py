"""What people pick by hand, at a size to compare with: the shapes of public models, scaled to a latency.

A shape is what its family keeps at every size: width per layer, FFN ratio, query heads per key-value head, norm,
activation, positions. Scaled, it gets the table's head dimension and the comparison's vocabulary and context; its
embedding is as wide as its layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.presets import preset

SHAPES = {"GPT-2": "gpt2", "OPT": "opt-125m", "Pythia": "pythia-160m", "SmolLM": "smollm2-135m"}
MOST_LAYERS = 64
OFF_SHAPE = 1.5  # factor by which width per layer may differ from the family's own


def scaled(shape: str, width: int, layers: int, head_dim: int, vocab_size: int, context: int) -> Architecture:
    """The shape with so many layers of so much width. Raises InputError where the width makes no whole heads."""
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
    head_dim: int,
    vocab_size: int,
    context: int,
    widest: int,
) -> Architecture:
    """The most expensive one within `budget` whose width per layer is the family's own or nearly (a factor of 1.5); of
    several the one with the most parameters. `cost` is None for what it cannot price. Raises InputError where there is
    none."""
    model = preset(SHAPES[shape])
    own = math.log(model.blocks[0].width / model.layers)
    found = []
    for width in range(head_dim, widest + 1, head_dim):
        for layers in range(1, MOST_LAYERS + 1):
            if abs(math.log(width / layers) - own) > math.log(OFF_SHAPE):
                continue
            try:
                a = scaled(shape, width, layers, head_dim, vocab_size, context)
            except InputError:
                break
            value = cost(a)
            if value is not None and value <= budget:
                found.append((value, a.parameters, a))
    if not found:
        raise InputError(f"no model of {shape}'s shape costs {budget:g} or less", "change the budget")
    return max(found, key=lambda entry: entry[:2])[2]
