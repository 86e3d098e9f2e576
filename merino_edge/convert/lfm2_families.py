"""LFM2 (Liquid AI): gated short convolutions in most layers, attention with normed heads in the others.

A reader of a configuration and a writer, as in merino_edge.convert.llama_families. `layer_types`, or `full_attn_idxs`
where it is missing, tells which layers have attention. The FFN's width may be given before its adjustment: two thirds
of it, times a factor, rounded up. It is written as it is. This module touches no file.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from merino_edge.architecture import Architecture
from merino_edge.convert.config import FULL, Config
from merino_edge.convert.family import Family, Fields, by_convolution
from merino_edge.convert.folding import Folding
from merino_edge.convert.layouts import LFM2_LAYOUT, fuse_lfm2
from merino_edge.convert.llama_like import PREFIXES, read_llama, rope_folding, rope_parameters
from merino_edge.convert.rotary_scaling import Rope
from merino_edge.errors import ArtefactError

_LFM2 = Fields(kv_heads="num_key_value_heads", head_dim="head_dim", norm_epsilon="norm_eps")
CONVOLUTION = "conv"  # of layer_types


def _rope(c: Config) -> Rope:
    return c.rope(theta=1_000_000.0)


def _renamed(c: Config) -> Config:
    """The configuration with older names replaced, and with the FFN's width as it is computed."""
    width, tied = c.get("intermediate_size", 12288), c.get("tie_word_embeddings", True)
    width, tied = c.get("block_ff_dim", width), c.get("tie_embedding", tied)  # these come first, as in transformers
    if c.get("block_auto_adjust_ff_dim", True):
        width = int(2 * width / 3)
        multiple, factor = c.get("block_multiple_of", 256), c.nullable("block_ffn_dim_multiplier", 1.0)
        if multiple < 1:
            raise ArtefactError(f"{c.where}: block_multiple_of is {multiple}, below 1", "download it again")
        if factor is not None:
            width = -(-int(factor * width) // multiple) * multiple
    return Config({**c.values, "intermediate_size": width, "tie_word_embeddings": tied}, c.where)


def _convolutions(c: Config, layers: int) -> list[bool]:
    """Which layers have a convolution in place of attention. Raises UnsupportedError, ArtefactError."""
    kinds, attends = c.layer_types(layers, (FULL, CONVOLUTION)), c.values.get("full_attn_idxs")
    if kinds is None:
        attends = list(range(layers)) if attends is None else attends
        if not isinstance(attends, list) or any(type(layer) is not int for layer in attends):
            raise ArtefactError(f"{c.where}: full_attn_idxs is no list of layers", "download it again")
        kinds = [FULL if layer in set(attends) else CONVOLUTION for layer in range(layers)]
    return [kind == CONVOLUTION for kind in kinds]


def _lfm2(c: Config) -> Architecture:
    c = _renamed(c)
    for name in ("conv_dim", "conv_dim_out", "block_dim"):
        c.only(name, (c.need("hidden_size"),))
    for name in ("block_use_swiglu", "use_pos_enc"):
        c.only(name, (True,))
    own: dict[str, Any] = {"epsilon": 1e-5, "bias": "none", "ffn": "swiglu", "qk_norm": "head"}
    attentive = Config({**c.values, "layer_types": None}, c.where)  # as if all layers were attention
    a = read_llama(attentive, _rope(c), fields=_LFM2, tied_head=True, **own)
    convolutions = _convolutions(c, a.layers)
    if not any(convolutions):
        return a
    blocks = by_convolution(a.blocks[0], c.get("conv_L_cache", 3), convolutions)
    return dataclasses.replace(a, blocks=blocks, convolution_bias=c.get("conv_bias", False))


def _lfm2_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, _rope(c))


def _to_lfm2(a: Architecture) -> dict[str, Any]:
    rope = rope_parameters(a)
    scaling = {"rope_scaling": rope} if a.rotary_factors else {}
    blocks = a.layer_blocks()
    return {
        "rope_theta": a.rotary_base,
        "rope_parameters": rope,
        **scaling,
        "block_auto_adjust_ff_dim": False,
        "conv_L_cache": max(block.convolution for block in blocks) or 3,
        "conv_bias": a.convolution_bias,
        "layer_types": [CONVOLUTION if block.convolution else FULL for block in blocks],
        "full_attn_idxs": [layer for layer, block in enumerate(blocks) if not block.convolution],
    }


LFM2_FAMILIES = {
    "lfm2": Family(
        "Lfm2ForCausalLM", _lfm2, _LFM2, _to_lfm2, LFM2_LAYOUT, PREFIXES, fuse=fuse_lfm2, folding=_lfm2_folding
    )
}
