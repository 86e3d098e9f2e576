"""A search space of one model family: the shapes of a space that Hugging Face folders and GGUF files can spell.

In a family all layers are alike and have weights of their own, and embeddings are as wide as the layers. So one block
takes the place of several, with every depth that they could have together, and each width comes with its own embedding.
The family decides norms, FFN, positions, biases and caps, and no layer has a window: families that have some fix which.
Widths, FFN ratios, key-value heads, vocabularies and contexts stay.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from merino_edge import limits, names
from merino_edge.architecture import LATER, Architecture, Ffn
from merino_edge.errors import InputError
from merino_edge.search.space import Space

# A family's FFN, and the fields of its models that a space has from `Space.model`.
_ROTARY = {"norm": "rmsnorm", "positions": "rotary", "bias": "none"}
_LEARNED = {"norm": "layernorm", "positions": "learned", "bias": "all", "rotary_dim": 0, "position_offset": 0}
FAMILIES: dict[str, tuple[Ffn, dict[str, Any]]] = {
    "llama": ("swiglu", _ROTARY),
    "qwen2": ("swiglu", {**_ROTARY, "bias": "qkv"}),
    "qwen3": ("swiglu", {**_ROTARY, "qk_norm": "head"}),
    "gemma3": ("geglu_tanh", {**_ROTARY, "qk_norm": "head", "norm_placement": "both", "tied_head": True}),
    "gpt2": ("gelu_tanh", _LEARNED),
    "opt": ("relu", {**_LEARNED, "position_offset": 2}),
}
ALL_HEADS = ("gpt2", "opt")  # every query head has a key-value head of its own


def as_family(space: Space, family: str) -> Space:
    """The space of all models of `family` with the sizes of `space`. Raises InputError for an unknown family.

    Its name is that of `space` and the family, such as edge-llama, by which `load_space` finds a built-in one too.
    """
    if family not in FAMILIES:
        raise InputError(f"there is no family {family!r} to search", names.choose(family, FAMILIES))
    ffn, fields = FAMILIES[family]
    rotary: dict[str, float] = {"rotary_dim": space.model.head_dim} if fields["positions"] == "rotary" else {}
    if family == "gemma3":  # files of llama.cpp call most of its layers local
        rotary["local_rotary_base"] = space.model.rotary_base
    fixed = {"norm_placement": "pre", "parallel_residual": False, **LATER[Architecture]}
    deepest = min(space.blocks[-1] * space.layers[-1], limits.MAX_LAYERS)
    return dataclasses.replace(
        space,
        name=f"{space.name}-{family}",
        blocks=(1,),
        layers=tuple(range(space.blocks[0] * space.layers[0], deepest + 1)),
        shared=(False,),
        windows=(0,),
        ffn=(ffn,),
        kv_groups=(1,) if family in ALL_HEADS else space.kv_groups,
        embedding_widths=space.widths,
        least_width=1,
        least_embedding=1,
        model=dataclasses.replace(space.model, **{**fixed, **fields, **rotary}),
    )
