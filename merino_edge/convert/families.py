"""Hugging Face model families: `config.json` to `Architecture` and back, and the layout of the weights.

Here are OPT, GPT-2 (and Cerebras-GPT) and GPT-NeoX (Pythia); the other modules `*_families` have the others.
Configurations are read as transformers 4 and 5 write them. A missing field means the family's documented default. A
field that no architecture can express is refused by name. One table of names serves reading and writing. A family may
be unable to express all of an architecture, so the writer reads the result back (merino_edge.convert.to_huggingface).
This module touches no file.
"""

from __future__ import annotations

import math
from typing import Any

from merino_edge.architecture import Architecture
from merino_edge.convert.config import Config
from merino_edge.convert.family import Family, Fields
from merino_edge.convert.folding import Folding
from merino_edge.convert.gemma_families import GEMMA_FAMILIES
from merino_edge.convert.layouts import GPT2_LAYOUT, NEOX_LAYOUT, OPT_LAYOUT, fuse_gpt2, fuse_neox
from merino_edge.convert.lfm2_families import LFM2_FAMILIES
from merino_edge.convert.llama_families import LLAMA_FAMILIES
from merino_edge.convert.llama_like import rope_folding, rope_parameters, rotary
from merino_edge.convert.paired_families import PAIRED_FAMILIES
from merino_edge.convert.rotary_scaling import Rope

__all__ = ["FAMILIES", "Config", "Family"]

# --- configurations --------------------------------------------------------------------------------


_OPT = Fields(embedding_width="word_embed_proj_dim", ffn_width="ffn_dim", ffn="activation_function")
_GPT2 = Fields(
    max_positions="n_positions",
    width="n_embd",
    layers="n_layer",
    heads="n_head",
    ffn_width="n_inner",
    norm_epsilon="layer_norm_epsilon",
    ffn="activation_function",
)
_NEOX = Fields(norm_epsilon="layer_norm_eps", ffn="hidden_act", parallel_residual="use_parallel_residual")


def _opt(c: Config) -> Architecture:
    c.only("layer_norm_elementwise_affine", (True,))
    c.only("_remove_final_layer_norm", (False,))
    return _OPT.read(
        c,
        tied_head=True,
        norm_placement="pre" if c.get("do_layer_norm_before", True) else "post",
        ffn=c.activation(_OPT.ffn, "relu"),
        position_offset=2,
        bias="all" if c.get("enable_bias", True) else "none",
    )


def _to_opt(a: Architecture) -> dict[str, Any]:
    return {"do_layer_norm_before": a.norm_placement == "pre", "enable_bias": a.bias == "all"}


def _gpt2(c: Config) -> Architecture:
    c.only("scale_attn_weights", (True,))
    c.only("scale_attn_by_inverse_layer_idx", (False,))
    c.only("add_cross_attention", (False,))
    return _GPT2.read(
        c,
        tied_head=True,
        ffn_width=4 * c.need(_GPT2.width),
        norm_epsilon=c.get(_GPT2.norm_epsilon, 1e-5),
        ffn=c.activation(_GPT2.ffn, "gelu_new"),
    )


def _to_gpt2(a: Architecture) -> dict[str, Any]:
    return {}


def _neox_rope(c: Config) -> Rope:
    return c.rope(fraction=0.25, theta_name="rotary_emb_base", fraction_name="rotary_pct")


def _neox(c: Config) -> Architecture:
    c.only("attention_bias", (True,))
    rope = _neox_rope(c)
    head_dim = c.need(_NEOX.width) // c.need(_NEOX.heads)
    c.only("head_dim", (head_dim,))  # transformers would count the rotated channels by it
    c.no_windows(c.need(_NEOX.max_positions))
    return _NEOX.read(
        c,
        tied_head=False,
        norm_epsilon=c.get(_NEOX.norm_epsilon, 1e-5),
        ffn=c.activation(_NEOX.ffn, "gelu"),
        **rotary(rope, head_dim, c.need(_NEOX.max_positions)),
        parallel_residual=c.get(_NEOX.parallel_residual, True),
    )


def _neox_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, _neox_rope(c))


def _to_neox(a: Architecture) -> dict[str, Any]:
    fraction = (a.rotary_dim or a.head_dim) / a.head_dim
    if int(a.head_dim * fraction) < a.rotary_dim:  # as a reader computes it
        fraction = math.nextafter(fraction, 1.0)
    old = {"rotary_emb_base": a.rotary_base, "rotary_pct": fraction}
    return {**old, "rope_parameters": {**rope_parameters(a), "partial_rotary_factor": fraction}}


# --- families --------------------------------------------------------------------------------------


FAMILIES = {
    "opt": Family("OPTForCausalLM", _opt, _OPT, _to_opt, OPT_LAYOUT, ("model.decoder.", "decoder.")),
    "gpt2": Family("GPT2LMHeadModel", _gpt2, _GPT2, _to_gpt2, GPT2_LAYOUT, ("transformer.",), fuse_gpt2),
    "gpt_neox": Family(
        "GPTNeoXForCausalLM", _neox, _NEOX, _to_neox, NEOX_LAYOUT, ("gpt_neox.",), fuse_neox, _neox_folding
    ),
    **LLAMA_FAMILIES,  # the first that expresses an architecture is written
    **PAIRED_FAMILIES,
    **GEMMA_FAMILIES,
    **LFM2_FAMILIES,
}
