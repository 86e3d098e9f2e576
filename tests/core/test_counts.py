"""Counts: the closed forms equal a count weight by weight, for presets and random architectures."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.presets import PRESETS, preset
from merino_edge.storage import NORM_BYTES
from merino_edge.weights import weight_shapes


@st.composite
def architectures(draw: st.DrawFn) -> Architecture:
    """Architectures of any family, with mixed widths, grouped heads and shared blocks."""
    head_dim = draw(st.sampled_from([8, 16]))
    heads = sorted(draw(st.lists(st.integers(1, 6), min_size=1, max_size=4)))
    blocks = tuple(
        Block(
            width=n * head_dim,
            layers=draw(st.integers(1, 3)),
            heads=n,
            kv_heads=draw(st.sampled_from([k for k in range(1, n + 1) if n % k == 0])),
            ffn_width=draw(st.integers(1, 99)),
            shared=draw(st.booleans()),
        )
        for n in heads
    )
    rotary = draw(st.booleans())
    placement = draw(st.sampled_from(["pre", "post"]))
    return Architecture(
        vocab_size=draw(st.integers(1, 300)),
        max_positions=draw(st.integers(1, 64)),
        embedding_width=draw(st.sampled_from([blocks[0].width, 24, 200])),
        head_dim=head_dim,
        blocks=blocks,
        tied_head=draw(st.booleans()),
        norm=draw(st.sampled_from(["layernorm", "rmsnorm"])),
        norm_placement=placement,
        ffn=draw(st.sampled_from(["relu", "gelu", "gelu_tanh", "swiglu"])),
        positions="rotary" if rotary else "learned",
        position_offset=draw(st.integers(0, 2)),
        rotary_dim=draw(st.sampled_from([2, head_dim])) if rotary else 0,
        bias=draw(st.sampled_from(["all", "qkv", "none"])),
        parallel_residual=placement == "pre" and draw(st.booleans()),
    )


def check_against_weights(a: Architecture) -> None:
    shapes = weight_shapes(a)
    assert a.parameters == sum(math.prod(shape) for shape in shapes.values())
    for precision in counts.PRECISIONS:
        total = 0.0
        for name, shape in shapes.items():
            elements = math.prod(shape)
            if len(shape) == 1:
                total += elements * NORM_BYTES
            elif name == "positions.weight":
                total += elements * (4 if precision == "fp32" else 2)
            elif name in ("embedding.weight", "head.weight") and precision in ("int8", "int4"):
                total += elements + 2 * shape[0]  # a scale per token
            else:
                total += elements * counts.MATRIX_BYTES[precision]
        assert a.weight_bytes(precision) == round(total)


@pytest.mark.parametrize("name", PRESETS)
def test_presets_count_what_they_store(name: str) -> None:
    check_against_weights(preset(name))


@settings(max_examples=60, deadline=None)
@given(architectures())
def test_any_architecture_counts_what_it_stores(a: Architecture) -> None:
    check_against_weights(a)


@settings(max_examples=60, deadline=None)
@given(architectures(), st.integers(1, 64))
def test_flops_are_twice_the_multiply_adds_of_every_layer(a: Architecture, sequence: int) -> None:
    """FLOPs equal a count matrix by matrix. The projections of embedding and head count with the head."""
    unshared = replace(a, blocks=tuple(replace(block, shared=False) for block in a.blocks))
    matrices = {n: s for n, s in weight_shapes(unshared).items() if len(s) == 2 and not n.startswith("position")}
    every = sum(math.prod(shape) for name, shape in matrices.items() if name != "embedding.weight")
    head = 0 if not a.tied_head else a.vocab_size * a.embedding_width
    attention = sum(2 * 2 * sequence * sequence * block.width for block in a.layer_blocks())  # QK^T and AV
    assert a.flops(sequence, head=True) == 2 * sequence * (every + head) + attention
    first, last = a.blocks[0].width, a.blocks[-1].width
    ends = sum(x * y for x, y in ((a.embedding_width, first), (last, a.embedding_width)) if x != y)
    assert a.flops(sequence, head=True) - a.flops(sequence) == 2 * sequence * (a.vocab_size * a.embedding_width + ends)


def test_sharing_saves_parameters_and_bytes_and_no_flops() -> None:
    a = preset("merino-61m")
    own = replace(a, blocks=tuple(replace(block, shared=False) for block in a.blocks))
    assert a.parameters < own.parameters and a.weight_bytes("int4") < own.weight_bytes("int4")
    assert a.flops() == own.flops() and a.kv_bytes() == own.kv_bytes()


def test_weight_and_cache_bytes_of_known_models() -> None:
    a = preset("smollm2-135m")
    assert a.weight_bytes("fp32") == 4 * a.parameters
    assert a.weight_bytes("fp16") == 2 * a.parameters + 2 * 61 * 576  # the 61 norms stay float32
    assert a.kv_bytes(1) == 30 * 2 * 3 * 64 * 2  # layers x (key and value) x heads x head_dim x two bytes
    assert a.kv_bytes() == 8192 * a.kv_bytes(1) and a.kv_bytes(10, element_bytes=4) == 20 * a.kv_bytes(1)
    # A quantised tied table is stored twice, so int8 saves less than half of fp16 here.
    assert a.weight_bytes("fp32") > a.weight_bytes("fp16") > a.weight_bytes("int8") > a.weight_bytes("int4")


def test_an_unknown_precision_is_refused() -> None:
    with pytest.raises(InputError, match="fp32, fp16, int8, int4"):
        preset("gpt2").weight_bytes("fp8")
