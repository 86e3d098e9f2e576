"""Hand-picked shapes: every layer alike, each depth that a space has, as usual as the space allows."""

from __future__ import annotations

import dataclasses
import itertools

import pytest

from merino_edge.architecture import Ffn
from merino_edge.search.builtin_spaces import DEMO, EDGE, PAPER
from merino_edge.search.hand_shapes import hand_shapes
from merino_edge.search.space import Space


@pytest.mark.parametrize("space", [DEMO, PAPER, EDGE])
def test_layers_are_alike_and_every_depth_is_there(space: Space) -> None:
    template = len(space.templates) - 1
    shapes = [space.architecture(candidate) for candidate in hand_shapes(space, template)]
    for a in shapes:
        assert len({(b.width, b.heads, b.kv_heads, b.ffn_width) for b in a.blocks}) == 1
        assert a.embedding_width == space.templates[template].embedding_width
    depths = {sum(layers) for n in space.blocks for layers in itertools.product(space.layers, repeat=n)}
    widths = [space.widths[w] for w in space.width_range(template)]
    assert [(a.blocks[0].width, a.layers) for a in shapes] == list(itertools.product(widths, sorted(depths)))


@pytest.mark.parametrize(("ffn", "ratio"), [("gelu", 4), ("gelu_tanh", 4), ("swiglu", 2.5)])
def test_every_kind_of_ffn_has_a_usual_width(ffn: Ffn, ratio: float) -> None:
    space = dataclasses.replace(EDGE, ffn=(ffn,))
    shapes = [space.architecture(candidate) for candidate in hand_shapes(space, 0)]
    assert {b.ffn_width / b.width for a in shapes for b in a.blocks} == {ratio}


def test_they_are_as_usual_as_the_space_allows() -> None:
    for template in range(len(EDGE.templates)):
        for candidate in hand_shapes(EDGE, template):
            a = EDGE.architecture(candidate)
            ratio = {"relu": 4, "swiglu": 2.5}[a.ffn]
            assert all(b.kv_heads == b.heads and b.ffn_width == ratio * b.width for b in a.blocks)
            assert not any(b.shared and b.layers > 1 for b in a.blocks)
    assert any(b.shared for c in hand_shapes(PAPER, 0) for b in PAPER.architecture(c).blocks)  # it has no others
