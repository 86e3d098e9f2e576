"""The weight layouts of Hugging Face's model families: names, and how arrays are split and fused.

`adapt` of a layout turns a family's array into ours, for reading. `fuse_*` is its inverse, for writing. Layers are
numbered through all blocks, as `blocks.0.layers.N`. This module knows no configuration and no file.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.weights import TAPS

Adapt = Callable[[Architecture, tuple[str, ...], np.ndarray], Sequence[np.ndarray]]


def as_is(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """The `Adapt` of a family that stores each matrix as ours."""
    return [array]


@dataclass(frozen=True)
class Layout:
    """The names and the storage of a family's weights. Module names stand without `.weight` and `.bias`.

    `adapt` turns one of their arrays into one array for each of our names (several where theirs is fused).
    """

    outside: Mapping[str, str]  # their module -> ours
    layer: str  # prefix of the layer's number, with its dot
    inside: Mapping[str, str]  # their module in a layer -> ours, several separated by spaces
    adapt: Adapt = as_is
    inputs_first: bool = False  # matrices of layers are stored as [in, out]

    def ours(self, name: str) -> tuple[str, ...]:
        """Our names for their weight `name`; empty where we have no equivalent."""
        module, _, kind = name.rpartition(".")
        match = re.fullmatch(re.escape(self.layer) + r"(0|[1-9]\d{0,3})\.(.+)", module)
        if match:
            modules = [f"blocks.0.layers.{match[1]}.{part}" for part in self.inside.get(match[2], "").split()]
        else:
            modules = [self.outside[module]] if module in self.outside else []
        return tuple(f"{part}.{kind}" for part in modules if kind in ("weight", "bias"))


def split_fused(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """Split query, key and value that follow each other: [3 W, ...] -> 3 x [W, ...]."""
    return np.split(array, len(ours))


def _adapt_gpt2(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """GPT-2 stores linear layers as [in, out], with query, key and value fused."""
    linear = ours[0].startswith("blocks.") and array.ndim == 2
    return split_fused(a, ours, array.T if linear else array)


def _adapt_neox(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """GPT-NeoX interleaves query, key and value head by head: [heads, 3, D, ...]."""
    if len(ours) == 1:
        return [array]
    block = a.blocks[0]
    by_head = array.reshape(block.heads, 3, a.head_dim, *array.shape[1:])
    return [by_head[:, part].reshape(block.width, *array.shape[1:]) for part in range(3)]


def split_stacked(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """Split fused matrices that follow each other: query, key and value of their own widths, or gate and up."""
    if len(ours) == 1:
        return [array]
    if len(ours) == 2:
        return np.split(array, 2)
    block = a.blocks[0]
    query, key = block.heads * a.head_dim, block.kv_heads * a.head_dim
    if len(array) != query + 2 * key:
        return [array]
    return np.split(array, [query, query + key])


def _adapt_lfm2(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """LFM2 stores taps as PyTorch's convolution does: [W, 1, K]."""
    return [array[:, 0] if ours[0].endswith(TAPS) and array.shape[1] == 1 else array]


Fuse = Callable[[Architecture, tuple[str, ...], Sequence[np.ndarray]], np.ndarray]


def fuse_as_is(a: Architecture, ours: tuple[str, ...], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `as_is`."""
    return arrays[0]


def fuse_gpt2(a: Architecture, ours: tuple[str, ...], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of GPT-2's `adapt`."""
    fused = np.concatenate(arrays)  # [3 W, ...]
    return fused.T if ours[0].startswith("blocks.") and fused.ndim == 2 else fused


def fuse_neox(a: Architecture, ours: tuple[str, ...], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of GPT-NeoX's `adapt`."""
    if len(ours) == 1:
        return arrays[0]
    by_head = [array.reshape(a.blocks[0].heads, a.head_dim, *array.shape[1:]) for array in arrays]
    # [heads, 3, D, ...] -> [3 W, ...]
    return np.stack(by_head, axis=1).reshape(-1, *arrays[0].shape[1:])


def fuse_stacked(a: Architecture, ours: tuple[str, ...], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of `split_stacked`."""
    return np.concatenate(arrays)


def fuse_lfm2(a: Architecture, ours: tuple[str, ...], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """The inverse of LFM2's `adapt`."""
    return arrays[0][:, None] if ours[0].endswith(TAPS) else arrays[0]


_QKV = "attention.query attention.key attention.value"
LLAMA_LAYOUT = Layout(
    {"embed_tokens": "embedding", "norm": "final_norm", "lm_head": "head"},
    "layers.",
    {
        "input_layernorm": "attention_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.o_proj": "attention.output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn.gate",
        "mlp.up_proj": "ffn.up",
        "mlp.down_proj": "ffn.down",
    },
)


def _like_llama(changes: Mapping[str, str], adapt: Adapt = as_is) -> Layout:
    """Llama's layout with some of its modules named otherwise: their name -> ours. Ours go by one name only."""
    taken = {part for parts in changes.values() for part in parts.split()}
    kept = {theirs: ours for theirs, ours in LLAMA_LAYOUT.inside.items() if theirs not in changes and ours not in taken}
    return Layout(LLAMA_LAYOUT.outside, LLAMA_LAYOUT.layer, {**kept, **changes}, adapt)


_QK_NORMS = {"self_attn.q_norm": "attention.query_norm", "self_attn.k_norm": "attention.key_norm"}
_NORMS_AFTER = {"post_attention_layernorm": "attention_norm", "post_feedforward_layernorm": "ffn_norm"}
_FOUR_NORMS = {
    "post_attention_layernorm": "attention_output_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "ffn_output_norm",
}
_FUSED_FFN = {"mlp.gate_up_proj": "ffn.gate ffn.up"}
QWEN3_LAYOUT = _like_llama(_QK_NORMS)
OLMO2_LAYOUT = _like_llama({**_QK_NORMS, **_NORMS_AFTER})  # and EXAONE 4's
PHI3_LAYOUT = _like_llama({"self_attn.qkv_proj": _QKV, **_FUSED_FFN}, split_stacked)
GLM_LAYOUT = _like_llama(_FUSED_FFN, split_stacked)
GLM4_LAYOUT = _like_llama(
    {**_FUSED_FFN, "post_self_attn_layernorm": "attention_output_norm", "post_mlp_layernorm": "ffn_output_norm"},
    split_stacked,
)
GEMMA2_LAYOUT = _like_llama(_FOUR_NORMS)
GEMMA3_LAYOUT = _like_llama({**_QK_NORMS, **_FOUR_NORMS})
NANOCHAT_LAYOUT = _like_llama({"mlp.fc1": "ffn.up", "mlp.fc2": "ffn.down"})
LFM2_LAYOUT = Layout(
    {"embed_tokens": "embedding", "embedding_norm": "final_norm", "lm_head": "head"},
    "layers.",
    {
        "operator_norm": "attention_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.q_layernorm": "attention.query_norm",
        "self_attn.k_layernorm": "attention.key_norm",
        "self_attn.out_proj": "attention.output",
        "conv.in_proj": "convolution.input",
        "conv.conv": "convolution.taps",
        "conv.out_proj": "convolution.output",
        "ffn_norm": "ffn_norm",
        "feed_forward.w1": "ffn.gate",
        "feed_forward.w3": "ffn.up",
        "feed_forward.w2": "ffn.down",
    },
    _adapt_lfm2,
)
OPT_LAYOUT = Layout(
    {
        "embed_tokens": "embedding",
        "embed_positions": "positions",
        "project_in": "projection_in",
        "final_layer_norm": "final_norm",
        "project_out": "projection_out",
        "lm_head": "head",
    },
    "layers.",
    {
        "self_attn_layer_norm": "attention_norm",
        "self_attn.q_proj": "attention.query",
        "self_attn.k_proj": "attention.key",
        "self_attn.v_proj": "attention.value",
        "self_attn.out_proj": "attention.output",
        "final_layer_norm": "ffn_norm",
        "fc1": "ffn.up",
        "fc2": "ffn.down",
    },
)
GPT2_LAYOUT = Layout(
    {"wte": "embedding", "wpe": "positions", "ln_f": "final_norm", "lm_head": "head"},
    "h.",
    {
        "ln_1": "attention_norm",
        "attn.c_attn": _QKV,
        "attn.c_proj": "attention.output",
        "ln_2": "ffn_norm",
        "mlp.c_fc": "ffn.up",
        "mlp.c_proj": "ffn.down",
    },
    _adapt_gpt2,
    inputs_first=True,
)
NEOX_LAYOUT = Layout(
    {"embed_in": "embedding", "final_layer_norm": "final_norm", "embed_out": "head"},
    "layers.",
    {
        "input_layernorm": "attention_norm",
        "attention.query_key_value": _QKV,
        "attention.dense": "attention.output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.dense_h_to_4h": "ffn.up",
        "mlp.dense_4h_to_h": "ffn.down",
    },
    _adapt_neox,
)
