"""Shapes as people pick them, beside which a search's result is shown: every layer is alike.

They have the template of the architecture that was found (FFN kind, vocabulary, embedding, context). They have full
attention where the space has it, and weights of their own where the space has them. The FFN is as wide as is usual.
"""

from __future__ import annotations

import itertools
import math

from merino_edge.search.space import Candidate, Space

USUAL_RATIO, USUAL_GATED_RATIO = 4.0, 8 / 3  # FFN width over model width, in most published models


def hand_shapes(space: Space, template: int) -> list[Candidate]:
    """One candidate for each width and each depth that blocks of equal layers can have, the smallest first."""
    shapes: dict[tuple[int, int], Candidate] = {}
    for w in space.width_range(template):
        usual = [_usual_choice(space, template, w, layers) for layers in space.layers]
        for blocks in space.blocks:
            for choices in itertools.combinations_with_replacement(usual, blocks):
                depth = sum(space.block_choices[choice].layers for choice in choices)
                shapes.setdefault((w, depth), Candidate(template, tuple(sorted(choices))))
    return [shapes[key] for key in sorted(shapes)]


def _usual_choice(space: Space, template: int, width: int, layers: int) -> int:
    """The block choice of a width index and a number of layers that is most usual."""
    ratio = USUAL_GATED_RATIO if space.models[template].gated else USUAL_RATIO

    def unusual(choice: int) -> tuple[object, ...]:
        block = space.block_choices[choice]
        return (
            block.shared and block.layers > 1,
            block.heads - block.kv_heads,
            abs(block.ffn_width / block.width - ratio),
            -block.window if block.window else -math.inf,
        )

    of_width = range(space.first_choice[width], space.first_choice[width + 1])
    return min((c for c in of_width if space.block_choices[c].layers == layers), key=unusual)
