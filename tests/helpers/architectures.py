"""Small architectures: one for training, and those of every family for property tests of what computes them."""

from __future__ import annotations

from dataclasses import replace
from typing import get_args

import torch
from hypothesis import strategies as st

from merino_edge.architecture import Architecture, Block, Ffn, QkNorm

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

# Every part that only the later families have: windows, two kinds of rotary positions and layers without, caps, four
# norms a layer, query and key norms, heads wider than the residual stream.
LATER_PARTS = Architecture(
    vocab_size=256,
    max_positions=128,
    embedding_width=64,
    head_dim=64,
    blocks=(
        Block(64, 1, 2, 1, 96, window=16, rotary="local"),
        Block(64, 1, 2, 1, 96),
        Block(64, 1, 2, 2, 96, window=32, rotary="none"),
    ),
    ffn="geglu_tanh",
    norm="rmsnorm",
    norm_placement="both",
    positions="rotary",
    rotary_dim=64,
    bias="none",
    qk_norm="head",
    rotary_factors=(8.0,) * 32,
    local_rotary_base=100.0,
    attention_cap=50.0,
    logit_cap=30.0,
)


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Small architectures of every family: changing widths, sharing, grouped heads, windows, all norms and FFNs."""
    head_dim = draw(st.sampled_from((4, 8)))
    heads = sorted(draw(st.lists(st.sampled_from((1, 2, 4)), min_size=1, max_size=3)))
    rotary, local = draw(st.booleans()), draw(st.booleans())
    kinds = ("global", "none", *(("local",) if local else ())) if rotary else ("global",)
    widening = draw(st.sampled_from((1, 1, 2)))  # of the residual stream over the heads
    blocks = tuple(
        Block(
            width=n * head_dim * widening,
            layers=draw(st.integers(1, 3)),
            heads=n,
            kv_heads=draw(st.sampled_from([k for k in (1, 2, 4) if n % k == 0])),
            ffn_width=draw(st.sampled_from((6, 16))),
            shared=draw(st.booleans()),
            window=draw(st.sampled_from((0, 0, 5))),
            rotary=draw(st.sampled_from(kinds)),
        )
        for n in heads
    )
    # A short convolution in place of attention, but not everywhere.
    convolves = [b.window == 0 and b.rotary == "global" and draw(st.sampled_from((False, False, True))) for b in blocks]
    convolves[-1] &= not all(convolves)
    blocks = tuple(replace(b, convolution=3 if c else 0) for b, c in zip(blocks, convolves, strict=True))
    placement = draw(st.sampled_from(("pre", "pre", "post", "after", "both")))
    rotary_dim = draw(st.sampled_from((2, head_dim))) if rotary else 0
    factors = tuple(1.0 + pair for pair in range(rotary_dim // 2)) if draw(st.booleans()) else ()
    return Architecture(
        vocab_size=31,
        max_positions=24,
        embedding_width=draw(st.sampled_from((8, 12, 32))),
        head_dim=head_dim,
        blocks=blocks,
        tied_head=draw(st.booleans()),
        norm=draw(st.sampled_from(("layernorm", "rmsnorm"))),
        norm_placement=placement,
        ffn=draw(st.sampled_from(get_args(Ffn))),
        positions="rotary" if rotary else "learned",
        position_offset=draw(st.sampled_from((0, 2))),
        rotary_dim=rotary_dim,
        bias=draw(st.sampled_from(("all", "qkv", "none"))),
        parallel_residual=placement == "pre" and draw(st.booleans()),
        qk_norm=draw(st.sampled_from(get_args(QkNorm))),
        rotary_factors=factors,
        local_rotary_base=50.0 if rotary and local else 0.0,
        attention_cap=draw(st.sampled_from((0.0, 2.0))),
        logit_cap=draw(st.sampled_from((0.0, 3.0))),
        convolution_bias=any(convolves) and draw(st.booleans()),
    )


def random_tokens(a: Architecture, batch: int, length: int) -> torch.Tensor:
    """Token ids [batch, length], equal for equal lengths."""
    return torch.randint(0, a.vocab_size, (batch, length), generator=torch.Generator().manual_seed(length))
