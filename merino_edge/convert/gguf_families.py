"""The model families of GGUF: metadata to `Architecture` and back, and the layout of the tensors.

The architectures are llama (also SmolLM2, Mistral), qwen2 and gpt2. Metadata that no architecture can express is
refused by name. As with merino_edge.convert.families, one table of names serves reading and writing.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np

from merino_edge.architecture import Architecture, Block
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.layouts import Fuse, Layout, fuse_as_is, split_fused
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
    "rope.freq_base",
    "rope.dimension_count",
    "rope.scaling.type",
)


def read(m: Metadata, family: str, tensors: Collection[str]) -> Architecture:
    """The architecture of a file with these tensors. Raises UnsupportedError, ArtefactError, ArchitectureError."""
    for key in m.values:
        if key.startswith(f"{family}.") and key.removeprefix(f"{family}.") not in UNDERSTOOD:
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
    kv_heads = m.of_all_layers(f"{family}.attention.head_count_kv", heads)
    layers, ffn_width = m.whole(f"{family}.block_count"), m.of_all_layers(f"{family}.feed_forward_length")
    common: dict[str, Any] = {
        "vocab_size": len(m.need("tokenizer.ggml.tokens", list)),
        "max_positions": m.whole(f"{family}.context_length"),
        "embedding_width": width,
        "head_dim": head_dim,
        "blocks": (Block(width, layers, heads, kv_heads, ffn_width),),
        "tied_head": "output.weight" not in tensors,
    }
    if family == "gpt2":
        return Architecture(**common, norm_epsilon=m.real("gpt2.attention.layer_norm_epsilon"), ffn="gelu_tanh")
    return Architecture(
        **common,
        norm="rmsnorm",
        norm_epsilon=m.real(f"{family}.attention.layer_norm_rms_epsilon"),
        ffn="swiglu",
        positions="rotary",
        rotary_dim=head_dim,
        rotary_base=m.real(f"{family}.rope.freq_base", 10000.0),
        bias="qkv" if family == "qwen2" else "none",
    )


def write(a: Architecture, family: str) -> dict[str, Any]:
    """The metadata of an architecture of one block. It may not express all of it: read it back."""
    block = a.blocks[0]
    values: dict[str, Any] = {
        "context_length": a.max_positions,
        "embedding_length": block.width,
        "block_count": block.layers,
        "feed_forward_length": block.ffn_width,
        "attention.head_count": block.heads,
        "attention.head_count_kv": block.kv_heads,
        "attention.key_length": a.head_dim,
        "attention.value_length": a.head_dim,
        f"attention.layer_norm_{'rms_' if a.norm == 'rmsnorm' else ''}epsilon": a.norm_epsilon,
    }
    if a.positions == "rotary":
        values |= {"rope.freq_base": a.rotary_base, "rope.dimension_count": a.rotary_dim}
    return {f"{family}.{name}": value for name, value in values.items()}


# --- tensors ---------------------------------------------------------------------------------------


def _adapt_llama(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """Query and key rows in our order. llama.cpp rotates neighbours: [H, D/2, 2, W] instead of [H, 2, D/2, W]."""
    if ours[0].split(".")[-2] not in ("query", "key"):
        return [array]
    paired = array.reshape(-1, a.head_dim // 2, 2, *array.shape[1:])
    return [paired.swapaxes(1, 2).reshape(array.shape)]


def _fuse_llama(a: Architecture, ours: tuple[str, ...], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `_adapt_llama`."""
    array = arrays[0]
    if ours[0].split(".")[-2] not in ("query", "key"):
        return array
    halves = array.reshape(-1, 2, a.head_dim // 2, *array.shape[1:])
    return halves.swapaxes(1, 2).reshape(array.shape)


def _fuse_stacked(a: Architecture, ours: tuple[str, ...], arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(arrays)


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
_FUSED = {
    **{theirs: ours for theirs, ours in _INSIDE.items() if theirs not in ("attn_q", "attn_k", "attn_v", "ffn_gate")},
    "attn_qkv": "attention.query attention.key attention.value",
}
LAYOUTS = {
    "llama": Layout(_OUTSIDE, "blk.", _INSIDE, _adapt_llama),
    "qwen2": Layout(_OUTSIDE, "blk.", _INSIDE),
    "gpt2": Layout({**_OUTSIDE, "position_embd": "positions"}, "blk.", _FUSED, split_fused),
}
FUSES: dict[str, Fuse] = {"llama": _fuse_llama, "qwen2": fuse_as_is, "gpt2": _fuse_stacked}
