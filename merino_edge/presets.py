"""Presets: public models that the paper compares with, and reconstructions of its own three.

The parameter counts of the public models equal the published ones exactly. The paper published no MeRino
architecture, so `merino-52m`, `merino-61m` and `merino-64m` are reconstructions from its search space: four blocks of
shared OPT-like layers, vocabulary 50272, embedding 768, head dimension 64, 2048 positions. Each has the highest total
score (`merino_edge.search.score`, effective) under these conditions:

| preset | FLOPs (sequence 1024, no head), at 95 to 100 % of | parameters, rounded | the same without sharing |
|---|---|---|---|
| merino-52m | 60 G | 52 M | 59 M |
| merino-61m | 110 G | 61 M | 79 M |
| merino-64m | 160 G | 64 M | 100 M |

`benchmarks/paper/reconstruct_presets.py` finds them. docs/reproduction.md has the optima under the FLOP budgets alone,
which are close.
"""

from __future__ import annotations

import dataclasses
from itertools import groupby

from merino_edge import names
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError


def _layers(layers: int, width: int, ffn_width: int, heads: int, kv_heads: int | None = None) -> tuple[Block, ...]:
    return (Block(width, layers, heads, kv_heads or heads, ffn_width),)


def _merino(*blocks: tuple[int, int, int]) -> Architecture:
    """A MeRino model from (width, layers, ffn_width) of each block."""
    return Architecture(
        vocab_size=50272,
        max_positions=2048,
        embedding_width=768,
        head_dim=64,
        blocks=tuple(Block(width, layers, width // 64, width // 64, ffn, shared=True) for width, layers, ffn in blocks),
    )


def _pythia(layers: int, width: int) -> Architecture:
    return Architecture(
        vocab_size=50304,
        max_positions=2048,
        embedding_width=width,
        head_dim=64,
        blocks=_layers(layers, width, 4 * width, width // 64),
        tied_head=False,
        ffn="gelu",
        positions="rotary",
        rotary_dim=16,
        parallel_residual=True,
    )


_ARCHITECTURES = {
    "merino-52m": _merino((384, 2, 384), (768, 1, 768), (768, 1, 768), (768, 3, 768)),
    "merino-61m": _merino((768, 3, 768), (768, 4, 768), (1024, 1, 1024), (1024, 1, 1024)),
    "merino-64m": _merino((896, 2, 896), (896, 4, 896), (896, 4, 1344), (896, 1, 1792)),
    "opt-125m": Architecture(
        vocab_size=50272,
        max_positions=2048,
        embedding_width=768,
        head_dim=64,
        blocks=_layers(12, 768, 3072, heads=12),
        position_offset=2,
    ),
    "opt-350m": Architecture(
        vocab_size=50272,
        max_positions=2048,
        embedding_width=512,
        head_dim=64,
        blocks=_layers(24, 1024, 4096, heads=16),
        norm_placement="post",
        position_offset=2,
    ),
    "gpt2": Architecture(
        vocab_size=50257,
        max_positions=1024,
        embedding_width=768,
        head_dim=64,
        blocks=_layers(12, 768, 3072, heads=12),
        ffn="gelu_tanh",
    ),
    "pythia-70m": _pythia(6, 512),
    "pythia-160m": _pythia(12, 768),
    "cerebras-gpt-111m": Architecture(
        vocab_size=50257,
        max_positions=2048,
        embedding_width=768,
        head_dim=64,
        blocks=_layers(10, 768, 3072, heads=12),
        ffn="gelu",
    ),
    "smollm2-135m": Architecture(
        vocab_size=49152,
        max_positions=8192,
        embedding_width=576,
        head_dim=64,
        blocks=_layers(30, 576, 1536, heads=9, kv_heads=3),
        norm="rmsnorm",
        ffn="swiglu",
        positions="rotary",
        rotary_dim=64,
        rotary_base=100_000.0,
        bias="none",
    ),
}

PRESETS: tuple[str, ...] = tuple(_ARCHITECTURES)


def preset(name: str) -> Architecture:
    """The architecture called `name`. Raises InputError that lists the names."""
    name = names.find(name, PRESETS) or name
    if name not in _ARCHITECTURES:
        raise InputError(f"there is no preset {name!r}", names.choose(name, PRESETS))
    return _ARCHITECTURES[name]


def shrunk(name: str) -> Architecture:
    """A small version of the preset `name` that compiles in a second and has every kind of node of its graph.

    It has a small vocabulary and one layer of each width. The first width has two where layers share weights.
    """
    a = preset(name)
    firsts = [next(blocks) for _, blocks in groupby(a.blocks, key=lambda block: block.width)]
    blocks = tuple(dataclasses.replace(b, layers=1 + (b.shared and b is firsts[0])) for b in firsts)
    return dataclasses.replace(a, vocab_size=512, max_positions=256, blocks=blocks)
