"""What is folded into weights at import comes out again at export."""

from __future__ import annotations

import dataclasses

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.architectures import architectures
from helpers.random_model import random_model
from merino_edge.architecture import Architecture
from merino_edge.convert.folding import Folding

FACTORS = st.sampled_from((1.0, 0.22, 12.0))


@settings(max_examples=25, deadline=None)
@given(
    a=architectures(),
    folding=st.builds(
        Folding,
        **dict.fromkeys(("embedding", "logits", "residual", "scores", "rotated"), FACTORS),
        norm_offset=st.sampled_from((0.0, 1.0)),
        pairs=st.sampled_from(("halves", "neighbours", "exchanged")),
    ),
)
def test_undo_is_the_inverse_of_apply(a: Architecture, folding: Folding) -> None:
    for name, weight in random_model(a).items():
        folded = folding.apply(a, name, weight)
        assert folded.shape == weight.shape and folded.dtype == np.float32
        np.testing.assert_allclose(folding.undo(a, name, folded), weight, rtol=1e-5, atol=1e-5)


def test_a_family_that_lacks_weights_gets_constants() -> None:
    folding = Folding(constants={"ffn.up.bias": 0.0, "norm.weight": 1.0})
    assert folding.constant("blocks.0.layers.0.ffn.up.bias", (3,)).tolist() == [0, 0, 0]  # type: ignore[union-attr]
    assert folding.constant("final_norm.weight", (2,)).tolist() == [1, 1]  # type: ignore[union-attr]
    assert dataclasses.replace(folding, constants={}).constant("final_norm.weight", (2,)) is None
