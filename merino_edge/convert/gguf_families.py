"""The model families of GGUF: metadata to `Architecture` and back, and the layout of the tensors.

Metadata that no architecture can express is refused by name. What a family computes beside its weights is folded into
them (merino_edge.convert.folding). As with merino_edge.convert.families, the writer's metadata are read back.
Sources: llama.cpp's constants of each architecture; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from merino_edge.architecture import Architecture, Block, Rotary
from merino_edge.convert.family import by_convolution, by_kind
from merino_edge.convert.folding import Folding, Pairs
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.layouts import Fuse, Layout, fuse_as_is, fuse_stacked, split_fused
from merino_edge.errors import UnsupportedError

ROPE_FACTORS = "rope_freqs.weight"  # what divides the frequencies (Llama 3.1 and 3.2): [D / 2]
UNDERSTOOD = (
    "vocab_size",
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon",
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
)
WINDOW, ATTENTION_CAP, LOGIT_CAP = "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"
LOCAL_BASE, LOCAL_BASE_DEFAULT = "rope.freq_base_swa", 10_000.0
TAPS = "shortconv.l_cache"  # of LFM2's convolutions, which stand in the layers without heads of keys and values
MULTIPLIERS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")  # Granite's

# --- tensors ---------------------------------------------------------------------------------------

_OUTSIDE = {"token_embd": "embedding", "output_norm": "final_norm", "output": "head"}
_INSIDE = {
    "attn_norm": "attention_norm",
    "attn_q": "attention.query",
    "attn_k": "attention.key",
    "attn_v": "attention.value",
    "attn_output": "attention.output",
    "ffn_norm": "ffn_norm",
    "ffn_gate": "ffn.gate",
    "ffn_up": "ffn.up",
    "ffn_down": "ffn.down",
}
_QK_NORMS = {"attn_q_norm": "attention.query_norm", "attn_k_norm": "attention.key_norm"}
_FOUR_NORMS = {"post_attention_norm": "attention_output_norm", "post_ffw_norm": "ffn_output_norm"}
_NORMS_AFTER = {"post_attention_norm": "attention_norm", "post_ffw_norm": "ffn_norm"}
_CONVOLUTION = {
    "shortconv.in_proj": "convolution.input",
    "shortconv.conv": "convolution.taps",
    "shortconv.out_proj": "convolution.output",
}
_FUSED = {
    **{theirs: ours for theirs, ours in _INSIDE.items() if theirs not in ("attn_q", "attn_k", "attn_v", "ffn_gate")},
    "attn_qkv": "attention.query attention.key attention.value",
}


def _layout(more: Mapping[str, str] | None = None, *, without: Collection[str] = ()) -> Layout:
    kept = {theirs: ours for theirs, ours in _INSIDE.items() if theirs not in without}
    return Layout(_OUTSIDE, "blk.", {**kept, **(more or {})})


# --- families --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufFamily:
    """A family: its tensors, the fields of every architecture of it, and the metadata that it has beside the usual."""

    layout: Layout
    fields: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    pairs: Pairs = "halves"  # llama.cpp rotates neighbours in some families, and stores their rows in that order
    fuse: Fuse = fuse_as_is
    gemma: bool = False  # the embedding is scaled
    window_every: int = 0  # each layer of so many but the last has a window
    turns_every: int = 0  # each layer of so many but the last has rotary positions


_GATED: dict[str, Any] = {"norm": "rmsnorm", "ffn": "swiglu", "positions": "rotary", "bias": "none"}
_GEMMA = {**_GATED, "ffn": "geglu_tanh"}
_GEMMA2 = {**_GEMMA, "norm_placement": "both"}
_CAPS = (WINDOW, ATTENTION_CAP, LOGIT_CAP)
_AFTER = {**_GATED, "norm_placement": "after", "qk_norm": "width"}
FAMILIES = {
    "llama": GgufFamily(_layout(), _GATED, pairs="neighbours"),
    "qwen2": GgufFamily(_layout(), {**_GATED, "bias": "qkv"}),
    "qwen3": GgufFamily(_layout(_QK_NORMS), {**_GATED, "qk_norm": "head"}),
    "smollm3": GgufFamily(_layout(), _GATED, pairs="neighbours", turns_every=4),
    "gemma": GgufFamily(_layout(), _GEMMA, gemma=True),
    "gemma2": GgufFamily(_layout(_FOUR_NORMS), _GEMMA2, _CAPS, gemma=True, window_every=2),
    "gemma3": GgufFamily(
        _layout({**_QK_NORMS, **_FOUR_NORMS}),
        {**_GEMMA2, "qk_norm": "head"},
        (WINDOW, LOGIT_CAP, LOCAL_BASE),
        gemma=True,
        window_every=6,
    ),
    "granite": GgufFamily(_layout(), _GATED, MULTIPLIERS, pairs="neighbours"),
    "olmo2": GgufFamily(_layout({**_QK_NORMS, **_NORMS_AFTER}, without=("attn_norm", "ffn_norm")), _AFTER),
    "lfm2": GgufFamily(
        Layout(
            {"token_embd": "embedding", "token_embd_norm": "final_norm", "output": "head"},
            "blk.",
            {**_INSIDE, **_QK_NORMS, **_CONVOLUTION},
        ),
        {**_GATED, "qk_norm": "head"},
        (TAPS,),
    ),
    "gpt2": GgufFamily(
        Layout({**_OUTSIDE, "position_embd": "positions"}, "blk.", _FUSED, split_fused),
        {"norm": "layernorm", "ffn": "gelu_tanh"},
        fuse=fuse_stacked,
    ),
}


def read(m: Metadata, family: str, tensors: Collection[str], factors: tuple[float, ...] = ()) -> Architecture:
    """The architecture of a file with these tensors; `factors` are those of `ROPE_FACTORS`.

    Raises UnsupportedError, ArtefactError, ArchitectureError.
    """
    own = FAMILIES[family]
    for key in m.values:
        if key.startswith(f"{family}.") and key.removeprefix(f"{family}.") not in (*UNDERSTOOD, *own.more):
            raise UnsupportedError(f"{m.where}: {key} is not supported", "choose another model")
    width, heads = m.whole(f"{family}.embedding_length"), m.of_all_layers(f"{family}.attention.head_count")
    head_dim = m.get(f"{family}.attention.key_length", int) or width // heads
    for key, only in (
        ("attention.value_length", head_dim),
        ("rope.dimension_count", head_dim),
        ("rope.scaling.type", "none"),
    ):
        value = m.get(f"{family}.{key}", type(only))
        if value is not None and value != only:
            raise UnsupportedError(f"{m.where}: {family}.{key} {value} is not supported", "choose another model")
    layers, ffn_width = m.whole(f"{family}.block_count"), m.of_all_layers(f"{family}.feed_forward_length")
    positions = m.whole(f"{family}.context_length")
    if TAPS in own.more:
        if factors:
            raise UnsupportedError(f"{m.where}: {ROPE_FACTORS} of {family} is not supported", "choose another model")
        blocks = _with_convolutions(m, family, Block(width, min(layers, 1025), heads, heads, ffn_width))
    else:
        kv_heads = m.of_all_layers(f"{family}.attention.head_count_kv", heads)
        blocks = by_kind(Block(width, layers, heads, kv_heads, ffn_width), _kinds(m, family, layers), positions)
    fields: dict[str, Any] = {
        **own.fields,
        "vocab_size": len(m.need("tokenizer.ggml.tokens", list)),
        "max_positions": positions,
        "embedding_width": width,
        "head_dim": head_dim,
        "blocks": blocks,
        "tied_head": "output.weight" not in tensors,
    }
    if fields.get("positions") == "rotary":
        fields |= {"rotary_dim": head_dim, "rotary_base": m.real(f"{family}.rope.freq_base", 10000.0)}
        fields |= {"rotary_factors": factors}
    if LOCAL_BASE in own.more:
        fields["local_rotary_base"] = m.real(f"{family}.{LOCAL_BASE}", LOCAL_BASE_DEFAULT)
    for name, key in (("attention_cap", ATTENTION_CAP), ("logit_cap", LOGIT_CAP)):
        if key in own.more:
            fields[name] = m.real(f"{family}.{key}", 0.0)
    rms = "rms_" if fields["norm"] == "rmsnorm" else ""
    return Architecture(**fields, norm_epsilon=m.real(f"{family}.attention.layer_norm_{rms}epsilon"))


def _with_convolutions(m: Metadata, family: str, block: Block) -> tuple[Block, ...]:
    """The blocks of a family whose layers without heads of keys and values have a convolution."""
    key = f"{family}.attention.head_count_kv"
    heads = m.of_each_layer(key, block.layers)
    if len(kinds := set(heads) - {0}) > 1:
        raise UnsupportedError(f"{m.where}: {key} differs from layer to layer", "choose another model")
    block = replace(block, kv_heads=max([1, *kinds]))
    taps = m.whole(f"{family}.{TAPS}") if 0 in heads else 0
    return by_convolution(block, taps, [not count for count in heads])


def _kinds(m: Metadata, family: str, layers: int) -> list[tuple[int, Rotary]]:
    """The window and the rotary of each layer, where they are not the same in all."""
    own = FAMILIES[family]
    if layers > 1024:  # which the architecture refuses
        return []
    if own.turns_every:
        return [(0, "global" if (layer + 1) % own.turns_every else "none") for layer in range(layers)]
    if not own.window_every:
        return []
    window = m.whole(f"{family}.{WINDOW}")
    local: Rotary = "local" if LOCAL_BASE in own.more else "global"
    return [(window, local) if (layer + 1) % own.window_every else (0, "global") for layer in range(layers)]


def folding(m: Metadata, family: str, a: Architecture) -> Folding:
    """What the family computes beside its weights. Raises ArtefactError."""
    own = FAMILIES[family]
    if own.gemma:  # llama.cpp's files have norms to which the one is added already
        return Folding(embedding=math.sqrt(a.embedding_width))
    if family != "granite":
        return Folding(pairs=own.pairs)
    scores, embedding, residual, logits = (m.real(f"{family}.{name}", 0.0) or None for name in MULTIPLIERS)
    return Folding(
        scores=1.0 if scores is None else scores * math.sqrt(a.head_dim),
        embedding=embedding or 1.0,
        residual=residual or 1.0,
        logits=1 / (logits or 1.0),
        pairs=own.pairs,
    )


def rope_factors(array: np.ndarray) -> tuple[float, ...]:
    """The factors of `ROPE_FACTORS`, each as its shortest decimal."""
    return tuple(float(str(factor)) for factor in np.asarray(array, np.float32).ravel()[:4096])


def write(a: Architecture, family: str) -> dict[str, Any]:
    """The metadata of an architecture whose layers have one shape. They may not express all of it: read them back."""
    own, block = FAMILIES[family], a.blocks[0]
    values: dict[str, Any] = {
        "context_length": a.max_positions,
        "embedding_length": block.width,
        "block_count": a.layers,
        "feed_forward_length": block.ffn_width,
        "attention.head_count": block.heads,
        "attention.head_count_kv": block.kv_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        f"attention.layer_norm_{'rms_' if a.norm == 'rmsnorm' else ''}epsilon": a.norm_epsilon,
    }
    if a.positions == "rotary":
        values |= {"rope.freq_base": a.rotary_base, "rope.dimension_count": a.rotary_dim}
    if WINDOW in own.more:
        values[WINDOW] = max(layer.window for layer in a.layer_blocks()) or a.max_positions
    if TAPS in own.more:
        values["attention.head_count_kv"] = [0 if b.convolution else b.kv_heads for b in a.layer_blocks()]
        values[TAPS] = max(b.convolution for b in a.layer_blocks()) or 3
    for key, cap in ((ATTENTION_CAP, a.attention_cap), (LOGIT_CAP, a.logit_cap)):
        if key in own.more and cap:
            values[key] = cap
    if family == "granite":
        values |= {"attention.scale": 1 / math.sqrt(a.head_dim)}
    return {f"{family}.{name}": value for name, value in values.items()}


def tensors(a: Architecture, family: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights as the family stores them, by our names: the inverse of what `folding` does at import."""
    undone = folding(Metadata({}, family), family, a)
    return {name: undone.undo(a, name, array) for name, array in weights.items()}


def fused(a: Architecture, family: str, ours: tuple[str, ...], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """A tensor of the family from weights of ours."""
    return FAMILIES[family].fuse(a, ours, arrays)
