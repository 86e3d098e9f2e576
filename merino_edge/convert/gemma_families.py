"""Gemma 1 to 3: norms that add one, scaled embeddings, four norms a layer, caps, and windows with their own rotary.

As in merino_edge.convert.llama_families there are a reader, a writer and a folding for each.
"""

from __future__ import annotations

import math
from typing import Any

from merino_edge.architecture import Architecture
from merino_edge.convert.config import CHOOSE, FULL, SLIDING, Config
from merino_edge.convert.family import Family
from merino_edge.convert.folding import Folding
from merino_edge.convert.layouts import GEMMA2_LAYOUT, GEMMA3_LAYOUT, LLAMA_LAYOUT
from merino_edge.convert.llama_like import (
    GATED_NAME,
    LLAMA,
    PREFIXES,
    biases,
    gated_rotary,
    layer_kinds,
    read_llama,
    rope_folding,
    rope_parameters,
    window_fields,
)
from merino_edge.convert.rotary_scaling import Rope
from merino_edge.errors import ArtefactError, UnsupportedError


def _gemma(c: Config) -> Architecture:
    c.only("hidden_act", ("gelu", "gelu_pytorch_tanh"))  # both mean the approximation by tanh
    return read_llama(c, tied_head=True, head_dim=256, ffn="geglu_tanh")


def _gemma_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, c.rope(), embedding=math.sqrt(a.embedding_width), norm_offset=1.0, constants=biases(c)[1])


def _to_gemma(a: Architecture) -> dict[str, Any]:
    return {**gated_rotary(a), "attention_bias": a.bias == "all"}


def _gemma_caps(c: Config, attention: float, logits: float) -> dict[str, float]:
    """The caps of attention's scores and of logits; 0.0 of a default: none."""
    return {
        "attention_cap": c.cap("attn_logit_softcapping", attention),
        "logit_cap": c.cap("final_logit_softcapping", logits),
    }


def _gemma2(c: Config) -> Architecture:
    kinds = layer_kinds(c, c.window("sliding_window", 4096), lambda layer: layer % 2 == 0)
    ffn = c.activation("hidden_activation", "gelu_pytorch_tanh", gated=True)
    own: dict[str, Any] = {**_gemma_caps(c, 50.0, 30.0), "norm_placement": "both", "ffn": ffn, "kinds": kinds}
    return read_llama(c, tied_head=True, head_dim=256, **own)


def _folding(c: Config, a: Architecture, rope: Rope) -> Folding:
    scores = math.sqrt(a.head_dim / c.positive("query_pre_attn_scalar", 256.0))
    return Folding(
        embedding=math.sqrt(a.embedding_width),
        norm_offset=1.0,
        scores=scores,
        rotated=rope.attention_factor(c.need(LLAMA.max_positions)),
        constants=biases(c)[1],
    )


def _gemma2_folding(c: Config, a: Architecture) -> Folding:
    return _folding(c, a, c.rope())


def _to_gemma2(a: Architecture) -> dict[str, Any]:
    return {
        **_to_gemma(a),
        **window_fields(a),
        "hidden_activation": GATED_NAME.get(a.ffn),
        "query_pre_attn_scalar": a.head_dim,
        "attn_logit_softcapping": a.attention_cap or None,
        "final_logit_softcapping": a.logit_cap or None,
    }


def _gemma3_local(c: Config) -> Rope:
    """The rotary positions of layers with a window: those of their own in `rope_parameters`, which nothing scales."""
    base = c.get("rope_local_base_freq", 10_000.0)
    parameters = c.values.get("rope_parameters")
    own = parameters.get(SLIDING) if isinstance(parameters, dict) else None
    rope = Config({"rope_parameters": own or {}}, c.where).rope(theta=base)
    if rope.kind != "default":
        raise UnsupportedError(f"{c.where}: rope_type {rope.kind!r} of layers with a window is not supported", CHOOSE)
    return rope


def _gemma3_global(c: Config) -> Rope:
    """The rotary positions of layers without a window. As in transformers, `rope_scaling` changes only these.

    Raises UnsupportedError for spellings that versions of transformers read in different ways.
    """
    parameters, scaling = c.values.get("rope_parameters") or {}, c.values.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or not isinstance(scaling, dict):
        raise ArtefactError(f"{c.where}: rope_parameters or rope_scaling is not an object", "download it again")
    if other := sorted(parameters.keys() - {FULL, SLIDING}):
        raise UnsupportedError(f"{c.where}: rope_parameters: {other[0]} beside the kinds of layers", CHOOSE)
    if "type" in scaling and "rope_type" not in scaling:
        raise UnsupportedError(f"{c.where}: rope_scaling: type without rope_type", "name it rope_type")
    merged = {**(parameters.get(FULL) or {}), **scaling}
    return Config({**c.values, "rope_parameters": merged, "rope_scaling": None}, c.where).rope(theta=1e6)


def _gemma3_folding(c: Config, a: Architecture) -> Folding:
    return _folding(c, a, _gemma3_global(c))


def _gemma3(c: Config) -> Architecture:
    window, every = c.window("sliding_window", 4096), c.get("sliding_window_pattern", 6) or 1
    sliding = [size > 0 for size, _ in layer_kinds(c, window, lambda layer: (layer + 1) % every != 0)]
    kinds = [(window if slides else 0, "local" if slides else "global") for slides in sliding]
    local = _gemma3_local(c)
    ffn = c.activation("hidden_activation", "gelu_pytorch_tanh", gated=True)
    own: dict[str, Any] = {"norm_placement": "both", "qk_norm": "head", "ffn": ffn, "kinds": kinds}
    own |= {"logit_cap": c.cap("final_logit_softcapping", 0.0), "local_rotary_base": local.base}
    return read_llama(c, _gemma3_global(c), tied_head=True, head_dim=256, **own)


def _to_gemma3(a: Architecture) -> dict[str, Any]:
    local = {"rope_type": "default", "rope_theta": a.local_rotary_base or 10_000.0}
    scaling = {"rope_scaling": rope_parameters(a)} if a.rotary_factors else {}
    return {
        **_to_gemma2(a),
        "rope_parameters": {FULL: rope_parameters(a), SLIDING: local},
        "rope_local_base_freq": local["rope_theta"],
        **scaling,
    }


GEMMA_FAMILIES = {
    "gemma": Family("GemmaForCausalLM", _gemma, LLAMA, _to_gemma, LLAMA_LAYOUT, PREFIXES, folding=_gemma_folding),
    "gemma2": Family("Gemma2ForCausalLM", _gemma2, LLAMA, _to_gemma2, GEMMA2_LAYOUT, PREFIXES, folding=_gemma2_folding),
    "gemma3_text": Family(
        "Gemma3ForCausalLM", _gemma3, LLAMA, _to_gemma3, GEMMA3_LAYOUT, PREFIXES, folding=_gemma3_folding
    ),
}
