"""Descendants of Llama that pair the rotated channels otherwise: Helium, GLM 4, ERNIE 4.5 and nanochat.

Their channels are put into our order at import (merino_edge.convert.folding). As in merino_edge.convert.llama_families
there are a reader, a writer and a folding for each.
"""

from __future__ import annotations

from typing import Any

from merino_edge.architecture import Architecture, Bias
from merino_edge.convert.config import CHOOSE, Config
from merino_edge.convert.family import Family
from merino_edge.convert.folding import Folding
from merino_edge.convert.layouts import GLM4_LAYOUT, GLM_LAYOUT, LLAMA_LAYOUT, NANOCHAT_LAYOUT, fuse_stacked
from merino_edge.convert.llama_like import (
    LLAMA,
    NORM_OF_ONES,
    PREFIXES,
    biases,
    gated_rotary,
    partial,
    read_llama,
    rope_folding,
    to_llama,
)
from merino_edge.convert.rotary_scaling import Rope
from merino_edge.errors import UnsupportedError


def _helium_rope(c: Config) -> Rope:
    return c.rope(theta=100_000.0)


def _helium(c: Config) -> Architecture:
    return read_llama(c, _helium_rope(c), epsilon=1e-8, head_dim=128, bias=biases(c, "qkv")[0])


def _helium_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, _helium_rope(c), pairs="neighbours", constants=biases(c, "qkv")[1])


def _to_helium(a: Architecture) -> dict[str, Any]:
    return {**gated_rotary(a), "attention_bias": a.bias == "qkv", "mlp_bias": False}


def _glm_rope(c: Config) -> Rope:
    """Half a head is rotated; all of it where the fraction is said to be null."""
    return c.rope(fraction=c.nullable("partial_rotary_factor", 0.5) or 1.0)


def _glm(c: Config, **others: Any) -> Architecture:
    rope, bias = _glm_rope(c), biases(c, "qkv", default=True)[0]
    return read_llama(c, rope, epsilon=1.5625e-7, head_dim=128, bias=bias, partly_rotated=True, **others)


def _glm4(c: Config) -> Architecture:
    return _glm(c, norm_placement="both")


def _glm_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, _glm_rope(c), pairs="neighbours")


def _to_glm(a: Architecture) -> dict[str, Any]:
    return {**partial(a), "attention_bias": a.bias == "qkv"}


def _nanochat(c: Config) -> Architecture:
    if c.get("tie_word_embeddings", False):
        raise UnsupportedError(f"{c.where}: tie_word_embeddings with a norm of the embedding is not supported", CHOOSE)
    cap = c.cap("final_logit_softcapping", 15.0)
    return read_llama(c, ffn=c.activation("hidden_act", "relu2"), qk_norm="head", logit_cap=cap)


def _nanochat_folding(c: Config, a: Architecture) -> Folding:
    constants = {**NORM_OF_ONES, **biases(c)[1]}
    return rope_folding(c, c.rope(), pairs="exchanged", embedding_norm=True, constants=constants)


def _ernie_rope(c: Config) -> Rope:
    return c.rope(theta=500_000.0)


def _ernie(c: Config) -> Architecture:
    bias: Bias = "all" if c.get("use_bias", False) else "none"
    return read_llama(c, _ernie_rope(c), tied_head=True, epsilon=1e-5, head_dim=128, bias=bias)


def _ernie_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, _ernie_rope(c), pairs="neighbours")


def _to_ernie(a: Architecture) -> dict[str, Any]:
    return {**gated_rotary(a), "use_bias": a.bias == "all"}


PAIRED_FAMILIES = {
    "helium": Family("HeliumForCausalLM", _helium, LLAMA, _to_helium, LLAMA_LAYOUT, PREFIXES, folding=_helium_folding),
    "glm": Family(
        "GlmForCausalLM", _glm, LLAMA, _to_glm, GLM_LAYOUT, PREFIXES, fuse=fuse_stacked, folding=_glm_folding
    ),
    "glm4": Family(
        "Glm4ForCausalLM", _glm4, LLAMA, _to_glm, GLM4_LAYOUT, PREFIXES, fuse=fuse_stacked, folding=_glm_folding
    ),
    "nanochat": Family(
        "NanoChatForCausalLM",
        _nanochat,
        LLAMA,
        to_llama,
        NANOCHAT_LAYOUT,
        PREFIXES,
        folding=_nanochat_folding,
        written=False,
    ),
    "ernie4_5": Family("Ernie4_5ForCausalLM", _ernie, LLAMA, _to_ernie, LLAMA_LAYOUT, PREFIXES, folding=_ernie_folding),
}
