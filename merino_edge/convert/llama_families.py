"""The descendants of Llama, each by what it does otherwise: Qwen, Mistral, SmolLM3, Phi, Granite, OLMo, StableLM, ...

For each family there is a reader, a writer and, where something is folded into weights, a folding
(merino_edge.convert.llama_like).
"""

from __future__ import annotations

import math
from typing import Any

from merino_edge.architecture import Architecture, Bias, Rotary
from merino_edge.convert.config import CHOOSE, Config
from merino_edge.convert.family import FFN_NAME, Family, Fields
from merino_edge.convert.folding import Folding
from merino_edge.convert.layouts import (
    LLAMA_LAYOUT,
    OLMO2_LAYOUT,
    PHI3_LAYOUT,
    QWEN3_LAYOUT,
    fuse_stacked,
)
from merino_edge.convert.llama_like import (
    LLAMA,
    NORM_OF_ONES,
    PREFIXES,
    biased_folding,
    biases,
    gated_rotary,
    layer_kinds,
    partial,
    plain_folding,
    read_llama,
    rope_folding,
    same_everywhere,
    to_llama,
    window_fields,
)
from merino_edge.convert.rotary_scaling import Rope
from merino_edge.errors import ArtefactError, UnsupportedError

_STABLELM = Fields(kv_heads="num_key_value_heads", norm_epsilon="layer_norm_eps")
_NEMOTRON = Fields(kv_heads="num_key_value_heads", head_dim="head_dim", norm_epsilon="norm_eps")
_OLMO = Fields(kv_heads="num_key_value_heads")


def _llama(c: Config) -> Architecture:
    return read_llama(c)


def _mistral(c: Config) -> Architecture:
    window = c.window("sliding_window", 4096)
    return read_llama(c, bias="none", kinds=same_everywhere(c.need(LLAMA.layers), window))


def _to_mistral(a: Architecture) -> dict[str, Any]:
    return {**gated_rotary(a), "sliding_window": a.blocks[0].window or None}


def _qwen_kinds(c: Config) -> list[tuple[int, Rotary]]:
    """Layers from `max_window_layers` on slide, where `use_sliding_window` is set."""
    window = c.window("sliding_window", 4096) if c.get("use_sliding_window", False) else 0
    first = c.get("max_window_layers", 28)
    return layer_kinds(c, window, lambda layer: bool(window) and layer >= first)


def _qwen2(c: Config) -> Architecture:
    return read_llama(c, bias="qkv", kinds=_qwen_kinds(c))


def _to_qwen2(a: Architecture) -> dict[str, Any]:
    windows = window_fields(a)
    return {**gated_rotary(a), **windows, "use_sliding_window": windows["sliding_window"] is not None}


def _qwen3(c: Config) -> Architecture:
    return read_llama(c, head_dim=128, qk_norm="head", kinds=_qwen_kinds(c))


def _to_qwen3(a: Architecture) -> dict[str, Any]:
    return {**_to_qwen2(a), "attention_bias": a.bias == "all"}


def _smollm3(c: Config) -> Architecture:
    layers, interval = c.need(LLAMA.layers), c.get("no_rope_layer_interval", 4)
    listed = c.values.get("no_rope_layers")
    if listed is None:
        listed = [int((layer + 1) % interval != 0) if interval else 1 for layer in range(min(layers, 1025))]
    if not isinstance(listed, list) or len(listed) != layers or any(x not in (0, 1) for x in listed):
        raise ArtefactError(f"{c.where}: no_rope_layers is no list of {layers} zeros and ones", "download it again")
    window, slides = c.window("sliding_window"), c.get("use_sliding_window", False)
    windows = layer_kinds(c, window, lambda layer: bool(window) and slides and not listed[layer])
    kinds = [(size, "global" if turns else "none") for (size, _), turns in zip(windows, listed, strict=False)]
    return read_llama(c, c.rope(theta=2_000_000.0), tied_head=True, kinds=kinds)


def _smollm3_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, c.rope(theta=2_000_000.0), constants=biases(c)[1])


def _to_smollm3(a: Architecture) -> dict[str, Any]:
    turns = [int(block.rotary == "global") for block in a.layer_blocks()]
    windows = window_fields(a)
    slides = windows["sliding_window"] is not None
    return {**to_llama(a), **windows, "no_rope_layers": turns, "use_sliding_window": slides}


def _phi3_rope(c: Config) -> Rope:
    """Phi-3's older configurations name their scaling `su` or `yarn` and mean longrope."""
    renamed = dict(c.values)
    for name in ("rope_scaling", "rope_parameters"):
        value = renamed.get(name)
        if isinstance(value, dict):
            kinds = {key: "longrope" for key in ("type", "rope_type") if value.get(key) in ("su", "yarn")}
            renamed[name] = {**value, **kinds}
    return Config(renamed, c.where).rope()


def _phi3(c: Config) -> Architecture:
    kinds = same_everywhere(c.need(LLAMA.layers), c.window("sliding_window"))
    return read_llama(c, _phi3_rope(c), epsilon=1e-5, bias="none", partly_rotated=True, kinds=kinds)


def _phi3_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, _phi3_rope(c))


def _to_phi3(a: Architecture) -> dict[str, Any]:
    written = partial(a)
    for name in ("rope_parameters", "rope_scaling"):  # this family has no other scaling than longrope
        if written.get(name, {}).get("rope_type") not in (None, "default", "longrope"):
            both = {"short_factor": list(a.rotary_factors), "long_factor": list(a.rotary_factors)}
            kept = {key: written[name][key] for key in ("rope_theta", "partial_rotary_factor")}
            written[name] = {**kept, "rope_type": "longrope", **both, "attention_factor": 1.0}
    return {
        **written,
        "sliding_window": a.blocks[0].window or None,
        "original_max_position_embeddings": a.max_positions,
    }


def _granite_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(
        c,
        c.rope(),
        embedding=c.positive("embedding_multiplier", 1.0),
        logits=1 / c.positive("logits_scaling", 1.0),
        residual=c.positive("residual_multiplier", 1.0),
        scores=c.positive("attention_multiplier", 1.0) * math.sqrt(a.head_dim),
        constants=biases(c)[1],
    )


def _to_granite(a: Architecture) -> dict[str, Any]:
    ones = dict.fromkeys(("embedding_multiplier", "logits_scaling", "residual_multiplier"), 1.0)
    return {**to_llama(a), **ones, "attention_multiplier": 1 / math.sqrt(a.head_dim)}


def _olmo2(c: Config) -> Architecture:
    return read_llama(c, epsilon=1e-5, norm_placement="after", qk_norm="width")


def _to_olmo2(a: Architecture) -> dict[str, Any]:
    return {**gated_rotary(a), "attention_bias": a.bias == "all"}


def _stablelm(c: Config) -> Architecture:
    c.only("qk_layernorm", (False,))
    c.only("use_parallel_residual", (False,))
    c.only("head_dim", (c.need(_STABLELM.width) // c.need(_STABLELM.heads),))  # it has no place for another
    bias: Bias = "qkv" if c.get("use_qkv_bias", False) else "none"
    rope = c.rope(fraction=0.25)
    return read_llama(c, rope, fields=_STABLELM, epsilon=1e-5, norm="layernorm", bias=bias, partly_rotated=True)


def _stablelm_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, c.rope(fraction=0.25))


def _to_stablelm(a: Architecture) -> dict[str, Any]:
    return {**partial(a), "use_qkv_bias": a.bias == "qkv"}


def _exaone4(c: Config) -> Architecture:
    window, pattern = c.window("sliding_window", 4096), c.values.get("sliding_window_pattern", 4)
    if isinstance(pattern, str) and c.values.get("layer_types") is None:
        raise UnsupportedError(f"{c.where}: sliding_window_pattern {pattern!r} needs layer_types", CHOOSE)
    every = pattern if type(pattern) is int and pattern > 0 else 1
    sizes = layer_kinds(c, window, lambda layer: bool(window) and (layer + 1) % every != 0)
    kinds = [(size, "global" if size or not window else "none") for size, _ in sizes]
    return read_llama(c, epsilon=1e-5, bias="none", norm_placement="after", qk_norm="head", kinds=kinds)


def _to_exaone4(a: Architecture) -> dict[str, Any]:
    return {**gated_rotary(a), **window_fields(a), "sliding_window_pattern": None}


def _nemotron(c: Config) -> Architecture:
    ffn = c.activation("hidden_act", "relu2")
    own: dict[str, Any] = {"norm": "layernorm", "ffn": ffn, "partly_rotated": True}
    return read_llama(c, c.rope(fraction=0.5), fields=_NEMOTRON, epsilon=1e-5, **own)


def _nemotron_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, c.rope(fraction=0.5), norm_offset=1.0, constants=biases(c)[1])


def _to_nemotron(a: Architecture) -> dict[str, Any]:
    biased = a.bias == "all"
    return {**partial(a), "hidden_act": FFN_NAME.get(a.ffn), "attention_bias": biased, "mlp_bias": biased}


def _olmo(c: Config) -> Architecture:
    c.only("clip_qkv", ())
    return read_llama(c, fields=_OLMO, epsilon=1e-5, norm="layernorm")


def _olmo_folding(c: Config, a: Architecture) -> Folding:
    return rope_folding(c, c.rope(), constants={**NORM_OF_ONES, "norm.bias": 0.0, **biases(c)[1]})


LLAMA_FAMILIES = {
    "llama": Family("LlamaForCausalLM", _llama, LLAMA, to_llama, LLAMA_LAYOUT, PREFIXES, folding=biased_folding),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, LLAMA, _to_qwen2, LLAMA_LAYOUT, PREFIXES, folding=plain_folding),
    "mistral": Family(
        "MistralForCausalLM", _mistral, LLAMA, _to_mistral, LLAMA_LAYOUT, PREFIXES, folding=plain_folding
    ),
    "qwen3": Family("Qwen3ForCausalLM", _qwen3, LLAMA, _to_qwen3, QWEN3_LAYOUT, PREFIXES, folding=biased_folding),
    "smollm3": Family(
        "SmolLM3ForCausalLM", _smollm3, LLAMA, _to_smollm3, LLAMA_LAYOUT, PREFIXES, folding=_smollm3_folding
    ),
    "phi3": Family(
        "Phi3ForCausalLM", _phi3, LLAMA, _to_phi3, PHI3_LAYOUT, PREFIXES, fuse=fuse_stacked, folding=_phi3_folding
    ),
    "granite": Family(
        "GraniteForCausalLM", _llama, LLAMA, _to_granite, LLAMA_LAYOUT, PREFIXES, folding=_granite_folding
    ),
    "olmo2": Family("Olmo2ForCausalLM", _olmo2, LLAMA, _to_olmo2, OLMO2_LAYOUT, PREFIXES, folding=biased_folding),
    "stablelm": Family(
        "StableLmForCausalLM", _stablelm, _STABLELM, _to_stablelm, LLAMA_LAYOUT, PREFIXES, folding=_stablelm_folding
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM", _exaone4, LLAMA, _to_exaone4, OLMO2_LAYOUT, PREFIXES, folding=plain_folding
    ),
    "nemotron": Family(
        "NemotronForCausalLM", _nemotron, _NEMOTRON, _to_nemotron, LLAMA_LAYOUT, PREFIXES, folding=_nemotron_folding
    ),
    "olmo": Family(
        "OlmoForCausalLM", _olmo, _OLMO, to_llama, LLAMA_LAYOUT, PREFIXES, folding=_olmo_folding, written=False
    ),
}
