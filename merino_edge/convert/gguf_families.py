"""The model families of GGUF: metadata to `Architecture` and back.

Metadata that no architecture can express is refused by name. What a family computes beside its weights is folded into
them (merino_edge.convert.folding). As with merino_edge.convert.families, the writer's metadata are read back.
Sources: llama.cpp's loader of each architecture; https://github.com/ggml-org/ggml/blob/master/docs/gguf.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from merino_edge import limits
from merino_edge.architecture import Architecture, Bias, Block, Rotary
from merino_edge.convert import gguf_layouts, gguf_rope
from merino_edge.convert.family import by_convolution, by_kind
from merino_edge.convert.folding import Folding, Pairs
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.layouts import Fuse, Layout, fuse_as_is, fuse_stacked
from merino_edge.errors import UnsupportedError

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
    *gguf_rope.KEYS,
)
WINDOW, ATTENTION_CAP, LOGIT_CAP = "attention.sliding_window", "attn_logit_softcapping", "final_logit_softcapping"
PATTERN = "attention.sliding_window_pattern"
LOCAL_BASE, LOCAL_BASE_DEFAULT = "rope.freq_base_swa", 10_000.0
TAPS = "shortconv.l_cache"  # of LFM2's convolutions, which stand in the layers without heads of keys and values
MULTIPLIERS = ("attention.scale", "embedding_scale", "residual_scale", "logit_scale")  # Granite's
BIASED = ("attn_q", "attn_k", "attn_v", "attn_qkv", "attn_output", "ffn_gate", "ffn_up", "ffn_down")
CHOOSE = "choose another model"
EXAONE4_WINDOWED = 64  # layers: llama.cpp gives windows to EXAONE 4 of 32B only

# --- families --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class GgufFamily:
    """A family: its tensors, the fields of every architecture of it, and the metadata that it has beside the usual."""

    layout: Layout
    fields: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[str, ...] = ()
    pairs: Pairs = "halves"  # llama.cpp rotates neighbours in some families, and stores their rows in that order
    fuse: Fuse = fuse_as_is
    factors: tuple[str, ...] = ()  # tensors of rotary factors that llama.cpp reads
    biases: Literal["as the fields say", "qkv", "any"] = "as the fields say"  # those that a file may have
    gemma: bool = False  # the embedding is scaled
    partly: bool = False  # the beginning of a head may be rotated alone
    square: bool = False  # llama.cpp wants heads as wide as the residual stream
    own_head: bool = False  # llama.cpp wants a head of its own
    window_every: int = 0  # each layer of so many but the last has a window
    turns_every: int = 0  # each layer of so many but the last has rotary positions


_GATED: dict[str, Any] = {"norm": "rmsnorm", "ffn": "swiglu", "positions": "rotary", "bias": "none"}
_GEMMA = {**_GATED, "ffn": "geglu_tanh"}
_GEMMA2 = {**_GEMMA, "norm_placement": "both"}
_CAPS = (WINDOW, ATTENTION_CAP, LOGIT_CAP)
_AFTER = {**_GATED, "norm_placement": "after"}
_LAYER_NORMS = {**_GATED, "norm": "layernorm"}
_FREQUENCIES = (gguf_rope.FREQUENCIES,)
_FACTORS = (gguf_rope.FREQUENCIES, gguf_rope.SHORT, gguf_rope.LONG)
_PLAIN, _UNGATED = gguf_layouts.PLAIN, gguf_layouts.UNGATED
_WITH = gguf_layouts.layout
_QK_NORMS, _FOUR_NORMS = gguf_layouts.QK_NORMS, gguf_layouts.FOUR_NORMS
_AFTER_LAYOUT = _WITH({**_QK_NORMS, **gguf_layouts.NORMS_AFTER}, without=gguf_layouts.NO_NORMS_BEFORE)
_NEIGHBOURS: dict[str, Any] = {"pairs": "neighbours"}
FAMILIES = {
    "llama": GgufFamily(_PLAIN, _GATED, **_NEIGHBOURS, factors=_FACTORS, biases="any"),
    "qwen2": GgufFamily(_PLAIN, {**_GATED, "bias": "qkv"}, square=True),
    "qwen3": GgufFamily(_WITH(_QK_NORMS), {**_GATED, "qk_norm": "head"}),
    "smollm3": GgufFamily(_PLAIN, _GATED, **_NEIGHBOURS, turns_every=4),
    "gemma": GgufFamily(_PLAIN, _GEMMA, gemma=True),
    "gemma2": GgufFamily(_WITH(_FOUR_NORMS), _GEMMA2, _CAPS, gemma=True, window_every=2),
    "gemma3": GgufFamily(
        _WITH({**_QK_NORMS, **_FOUR_NORMS}),
        {**_GEMMA2, "qk_norm": "head"},
        (WINDOW, LOGIT_CAP, LOCAL_BASE),
        gemma=True,
        window_every=6,
    ),
    "granite": GgufFamily(_PLAIN, _GATED, MULTIPLIERS, **_NEIGHBOURS, factors=_FACTORS, biases="any"),
    "olmo2": GgufFamily(_AFTER_LAYOUT, {**_AFTER, "qk_norm": "width"}, square=True, own_head=True),
    "exaone4": GgufFamily(
        _AFTER_LAYOUT,
        {**_AFTER, "qk_norm": "head"},
        (WINDOW, PATTERN),
        factors=_FREQUENCIES,
        square=True,
        window_every=4,
    ),
    "lfm2": GgufFamily(gguf_layouts.LFM2, {**_GATED, "qk_norm": "head"}, (TAPS,)),
    "phi3": GgufFamily(
        gguf_layouts.PHI3, _GATED, (WINDOW,), fuse=fuse_stacked, factors=_FACTORS[1:], partly=True, square=True
    ),
    "stablelm": GgufFamily(
        _PLAIN, _LAYER_NORMS, ("use_parallel_residual",), biases="qkv", partly=True, square=True, own_head=True
    ),
    "chatglm": GgufFamily(
        gguf_layouts.FUSED_GATE, _GATED, **_NEIGHBOURS, fuse=fuse_stacked, biases="qkv", partly=True, square=True
    ),
    "glm4": GgufFamily(
        gguf_layouts.GLM4,
        {**_GATED, "norm_placement": "both"},
        **_NEIGHBOURS,
        fuse=fuse_stacked,
        biases="qkv",
        partly=True,
    ),
    "ernie4_5": GgufFamily(_PLAIN, _GATED, **_NEIGHBOURS, biases="qkv"),
    "nemotron": GgufFamily(
        _UNGATED, {**_LAYER_NORMS, "ffn": "relu_squared"}, biases="any", partly=True, square=True, own_head=True
    ),
    "gpt2": GgufFamily(gguf_layouts.GPT2, {"norm": "layernorm", "ffn": "gelu_tanh"}, fuse=fuse_stacked),
}


def read(
    m: Metadata, family: str, tensors: Collection[str], factors: tuple[float, ...] = ()
) -> tuple[Architecture, Folding]:
    """The architecture of a file with these tensors, and what the family computes beside its weights.

    `factors` are those of the first of the family's tensors of rotary factors that is there. Raises UnsupportedError,
    ArtefactError, ArchitectureError.
    """
    own = FAMILIES[family]
    for key in m.values:
        if key.startswith(f"{family}.") and key.removeprefix(f"{family}.") not in (*UNDERSTOOD, *own.more):
            raise UnsupportedError(f"{m.where}: {key} is not supported", "choose another model")
    width, heads = m.whole(f"{family}.embedding_length"), m.of_all_layers(f"{family}.attention.head_count")
    head_dim = m.get(f"{family}.attention.key_length", int) or width // heads
    value = m.get(f"{family}.attention.value_length", int)
    if value not in (None, head_dim):
        raise UnsupportedError(f"{m.where}: {family}.attention.value_length {value} is not supported", CHOOSE)
    _check_switches(m, family, tensors)
    layers, ffn_width = m.whole(f"{family}.block_count"), m.of_all_layers(f"{family}.feed_forward_length")
    short = gguf_rope.FREQUENCIES not in tensors and gguf_rope.SHORT in tensors
    rotation = gguf_rope.Rotation(positions=m.whole(f"{family}.context_length"))
    if own.fields.get("positions") == "rotary":
        rotation = gguf_rope.read(m, family, head_dim, partly=own.partly, stored=factors, short=short)
    if TAPS in own.more:
        blocks = _with_convolutions(
            m, family, Block(width, min(layers, limits.MAX_LAYERS + 1), heads, heads, ffn_width)
        )
    else:
        kv_heads = m.of_all_layers(f"{family}.attention.head_count_kv", heads)
        kinds = _kinds(m, family, layers)
        if _one_rotary(m, family, rotation.fields):
            kinds = [(window, "global" if rotary == "local" else rotary) for window, rotary in kinds]
        blocks = by_kind(Block(width, layers, heads, kv_heads, ffn_width), kinds, rotation.positions)
    fields: dict[str, Any] = {
        **own.fields,
        **rotation.fields,
        "vocab_size": len(m.need("tokenizer.ggml.tokens", list)),
        "max_positions": rotation.positions,
        "embedding_width": width,
        "head_dim": head_dim,
        "blocks": blocks,
        "tied_head": "output.weight" not in tensors,
    }
    constants: dict[str, float] = {}
    if own.biases != "as the fields say":
        fields["bias"], constants = _biases(tensors)
    if LOCAL_BASE in own.more:
        fields["local_rotary_base"] = m.real(f"{family}.{LOCAL_BASE}", LOCAL_BASE_DEFAULT)
    for name, key in (("attention_cap", ATTENTION_CAP), ("logit_cap", LOGIT_CAP)):
        if key in own.more:
            fields[name] = m.real(f"{family}.{key}", 0.0)
    rms = "rms_" if fields["norm"] == "rmsnorm" else ""
    a = Architecture(**fields, norm_epsilon=m.real(f"{family}.attention.layer_norm_{rms}epsilon"))
    if own.biases == "qkv" and a.bias == "all":
        raise UnsupportedError(f"{m.where}: {family} with a bias of attn_output or FFN is not supported", CHOOSE)
    return a, dataclasses.replace(_folding(m, family, a), rotated=rotation.rotated, constants=constants)


def _check_switches(m: Metadata, family: str, tensors: Collection[str]) -> None:
    """Refuse what a family of llama.cpp can switch off and an architecture cannot."""
    if family == "granite" and m.get(f"{family}.{gguf_rope.TURNS}", bool) is False:
        raise UnsupportedError(f"{m.where}: {family}.{gguf_rope.TURNS} false is not supported", CHOOSE)
    if family == "stablelm" and not any(name.endswith(".ffn_norm.weight") for name in tensors):
        raise UnsupportedError(f"{m.where}: {family} without norms before the FFN is not supported", CHOOSE)


def _biases(tensors: Collection[str]) -> tuple[Bias, dict[str, float]]:
    """The biases of a file by its first layer, and those of ours that it lacks, which are zeros."""
    there = {module for module in BIASED if f"blk.0.{module}.bias" in tensors}
    if not there:
        return "none", {}
    if there <= {"attn_q", "attn_k", "attn_v", "attn_qkv"}:
        return "qkv", {}
    ours = gguf_layouts.reading(_PLAIN).inside
    found = {part for module in there for part in ours[module].split()}
    every = {part for module in BIASED for part in ours[module].split()}
    return "all", {f"{part}.bias": 0.0 for part in every - found}


def _with_convolutions(m: Metadata, family: str, block: Block) -> tuple[Block, ...]:
    """The blocks of a family whose layers without heads of keys and values have a convolution."""
    key = f"{family}.attention.head_count_kv"
    heads = m.of_each_layer(key, block.layers)
    if len(kinds := set(heads) - {0}) > 1:
        raise UnsupportedError(f"{m.where}: {key} differs from layer to layer", "choose another model")
    block = dataclasses.replace(block, kv_heads=max([1, *kinds]))
    taps = m.whole(f"{family}.{TAPS}") if 0 in heads else 0
    return by_convolution(block, taps, [not count for count in heads])


def _kinds(m: Metadata, family: str, layers: int) -> list[tuple[int, Rotary]]:
    """The window and the rotary of each layer, where they are not the same in all."""
    own = FAMILIES[family]
    if layers > 1024:  # which the architecture refuses
        return []
    if own.turns_every:
        return [(0, "global" if (layer + 1) % own.turns_every else "none") for layer in range(layers)]
    if family == "phi3":
        window = m.get(f"{family}.{WINDOW}", int) or 0
        return [(window, "global")] * layers
    if not own.window_every or (family == "exaone4" and layers != EXAONE4_WINDOWED):
        return []
    window, every = m.whole(f"{family}.{WINDOW}"), own.window_every
    slides = [bool((layer + 1) % every) for layer in range(layers)]
    if isinstance(listed := m.values.get(f"{family}.{PATTERN}"), np.ndarray) and len(listed) == layers:
        slides = [bool(slide) for slide in listed]
    local: Rotary = "local" if LOCAL_BASE in own.more else "global"
    rest: Rotary = "none" if family == "exaone4" else "global"
    return [(window, local) if slide else (0, rest) for slide in slides]


def _one_rotary(m: Metadata, family: str, rotary: Mapping[str, Any]) -> bool:
    """Whether the rotary of layers with a window is that of the others."""
    if LOCAL_BASE not in FAMILIES[family].more or rotary.get("rotary_factors"):
        return False
    return m.real(f"{family}.{LOCAL_BASE}", LOCAL_BASE_DEFAULT) == rotary.get("rotary_base")


def _folding(m: Metadata, family: str, a: Architecture) -> Folding:
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


def wanted(a: Architecture, family: str) -> dict[str, Any]:
    """The fields that must be otherwise for llama.cpp to load an architecture's tensors in this family."""
    own, block = FAMILIES[family], a.blocks[0]
    square = not own.square or block.heads * a.head_dim == block.width
    return ({} if square else {"head_dim": block.width // block.heads}) | (
        {"tied_head": False} if own.own_head and a.tied_head else {}
    )


def write(a: Architecture, family: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata of an architecture whose layers have one shape, and its tensors of rotary factors.

    They may not express all of it: read them back.
    """
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
    factors: dict[str, np.ndarray] = {}
    if a.positions == "rotary":
        rotary, factors = gguf_rope.write(a, own.factors)
        values |= rotary
    if own.window_every and WINDOW in own.more:
        values[WINDOW] = max(layer.window for layer in a.layer_blocks()) or a.max_positions
    of_some = {ATTENTION_CAP: a.attention_cap, LOGIT_CAP: a.logit_cap, LOCAL_BASE: a.local_rotary_base}
    values |= {key: value for key, value in of_some.items() if key in own.more and value}
    if TAPS in own.more:
        values["attention.head_count_kv"] = [0 if b.convolution else b.kv_heads for b in a.layer_blocks()]
        values[TAPS] = max(b.convolution for b in a.layer_blocks()) or 3
    if family == "granite":  # the multipliers are in the weights
        values |= {**dict.fromkeys(MULTIPLIERS, 1.0), "attention.scale": 1 / math.sqrt(a.head_dim)}
    return {f"{family}.{name}": value for name, value in values.items()}, factors


def tensors(a: Architecture, family: str, weights: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The weights as the family stores them, by our names: the inverse of what `folding` does at import."""
    undone = _folding(Metadata({}, family), family, a)
    return {name: undone.undo(a, name, array) for name, array in weights.items()}


def fused(a: Architecture, family: str, ours: tuple[str, ...], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """A tensor of the family from weights of ours."""
    return FAMILIES[family].fuse(a, ours, arrays)
