"""Small architectures: one for training, and those of every family for property tests of what computes them."""

from __future__ import annotations

import torch
from hypothesis import strategies as st

from merino_edge.architecture import Architecture, Block

# Every part that training and distillation treat apart: two widths, shared weights, grouped heads, rotary positions.
TWO_WIDTHS = Architecture(
    vocab_size=400,
    max_positions=64,
    embedding_width=24,
    head_dim=8,
    blocks=(Block(16, 1, 2, 1, 32), Block(32, 2, 4, 2, 48, shared=True)),
    ffn="swiglu",
    norm="rmsnorm",
    positions="rotary",
    rotary_dim=8,
)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Small architectures of every family: changing widths, sharing, grouped heads, all norms and FFNs."""
    head_dim = draw(st.sampled_from((4, 8)))
    heads = sorted(draw(st.lists(st.sampled_from((1, 2, 4)), min_size=1, max_size=3)))
    blocks = tuple(
        Block(
            width=n * head_dim,
            layers=draw(st.integers(1, 3)),
            heads=n,
            kv_heads=draw(st.sampled_from([k for k in (1, 2, 4) if n % k == 0])),
            ffn_width=draw(st.sampled_from((6, 16))),
            shared=draw(st.booleans()),
        )
        for n in heads
    )
    rotary = draw(st.booleans())
    post = draw(st.booleans())
    return Architecture(
        vocab_size=31,
        max_positions=24,
        embedding_width=draw(st.sampled_from((8, 12, 32))),
        head_dim=head_dim,
        blocks=blocks,
        tied_head=draw(st.booleans()),
        norm=draw(st.sampled_from(("layernorm", "rmsnorm"))),
        norm_placement="post" if post else "pre",
        ffn=draw(st.sampled_from(("relu", "gelu", "gelu_tanh", "swiglu"))),
        positions="rotary" if rotary else "learned",
        position_offset=draw(st.sampled_from((0, 2))),
        rotary_dim=draw(st.sampled_from((2, head_dim))) if rotary else 0,
        bias=draw(st.sampled_from(("all", "qkv", "none"))),
        parallel_residual=False if post else draw(st.booleans()),
    )


def random_tokens(a: Architecture, batch: int, length: int) -> torch.Tensor:
    """Token ids [batch, length], equal for equal lengths."""
    return torch.randint(0, a.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))
