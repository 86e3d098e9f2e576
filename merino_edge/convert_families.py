"""Hugging Face model families: what a `config.json` says as an `Architecture`, and where each weight belongs.

OPT, GPT-2 (and Cerebras-GPT), GPT-NeoX (Pythia), and the Llama family (Llama, Mistral and Qwen2 without sliding
window). Configurations are read as transformers 4 and 5 write them; a missing field means that family's documented
default, and what no architecture can spell is refused by name. Reads no file.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from merino_edge.architecture import Architecture, Bias, Block, Ffn
from merino_edge.convert import Layout, split_fused
from merino_edge.errors import ArtefactError, UnsupportedError

T = TypeVar("T", int, float, bool, str)

ACTIVATIONS: dict[str, Ffn] = {
    "relu": "relu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
}
CHOOSE = "choose another model"


class Config:
    """`config.json`, read field by field: typed, and refusing by name what no architecture can spell."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ArtefactError(f"{where} is not an object", "download it again")
        self.values: dict[str, Any] = values
        self.where = where

    def get(self, name: str, default: T) -> T:
        """The field, or `default` where it is missing or null. Raises ArtefactError on another type."""
        value = self.values.get(name)
        if value is None:
            return default
        kind = type(default)
        if kind is float and type(value) is int and abs(value) < 2**63:
            value = float(value)
        if type(value) is not kind:
            raise ArtefactError(f"{self.where}: {name} is {value!r}, not {kind.__name__}", "download it again")
        return value

    def need(self, name: str) -> int:
        """A whole number of at least 1 that has no default."""
        value = self.get(name, 0)
        if value < 1:
            raise ArtefactError(f"{self.where}: {name} is missing or below 1", "download it again")
        return value

    def only(self, name: str, *accepted: Any) -> None:
        """Refuse a field that is present, not null, and none of `accepted`."""
        value = self.values.get(name)
        if value is not None and value not in accepted:
            raise UnsupportedError(f"{self.where}: {name} {value!r} is not supported", CHOOSE)

    def activation(self, name: str, default: str) -> Ffn:
        self.only(name, *ACTIVATIONS)
        return ACTIVATIONS[self.get(name, default)]

    def rope(self, theta_name: str, fraction_name: str, default_fraction: float) -> tuple[float, float]:
        """Rotary base and rotated fraction of a head, from either spelling. Scaled rotary is refused."""
        own = Config(self.values.get("rope_parameters") or {}, f"{self.where}: rope_parameters")
        scaling = Config(self.values.get("rope_scaling") or {}, f"{self.where}: rope_scaling")
        for spelling in (own, scaling):
            for field in spelling.values.keys() - {"rope_theta", "partial_rotary_factor", "rope_type", "type"}:
                raise UnsupportedError(f"{spelling.where}: {field} is not supported", CHOOSE)
            spelling.only("rope_type", "default")
            spelling.only("type", "default")
        base = own.get("rope_theta", self.get(theta_name, 10000.0))
        fraction = own.get("partial_rotary_factor", self.get(fraction_name, default_fraction))
        if not 0 < fraction <= 1:
            raise ArtefactError(f"{self.where}: rotated fraction {fraction} is outside 0 to 1", "download it again")
        return base, fraction


# --- families --------------------------------------------------------------------------------------


def _opt(c: Config) -> Architecture:
    c.only("layer_norm_elementwise_affine", True)
    c.only("_remove_final_layer_norm", False)
    width, heads = c.need("hidden_size"), c.need("num_attention_heads")
    return Architecture(
        vocab_size=c.need("vocab_size"),
        max_positions=c.need("max_position_embeddings"),
        embedding_width=c.get("word_embed_proj_dim", width),
        head_dim=width // heads,
        blocks=(Block(width, c.need("num_hidden_layers"), heads, heads, c.need("ffn_dim")),),
        tied_head=c.get("tie_word_embeddings", True),
        norm_placement="pre" if c.get("do_layer_norm_before", True) else "post",
        ffn=c.activation("activation_function", "relu"),
        position_offset=2,
        bias="all" if c.get("enable_bias", True) else "none",
    )


def _gpt2(c: Config) -> Architecture:
    c.only("scale_attn_weights", True)
    c.only("scale_attn_by_inverse_layer_idx", False)
    c.only("add_cross_attention", False)
    width, heads = c.need("n_embd"), c.need("n_head")
    return Architecture(
        vocab_size=c.need("vocab_size"),
        max_positions=c.need("n_positions"),
        embedding_width=width,
        head_dim=width // heads,
        blocks=(Block(width, c.need("n_layer"), heads, heads, c.get("n_inner", 4 * width)),),
        tied_head=c.get("tie_word_embeddings", True),
        norm_epsilon=c.get("layer_norm_epsilon", 1e-5),
        ffn=c.activation("activation_function", "gelu_new"),
    )


def _neox(c: Config) -> Architecture:
    c.only("attention_bias", True)
    base, fraction = c.rope("rotary_emb_base", "rotary_pct", 0.25)
    width, heads = c.need("hidden_size"), c.need("num_attention_heads")
    return Architecture(
        vocab_size=c.need("vocab_size"),
        max_positions=c.need("max_position_embeddings"),
        embedding_width=width,
        head_dim=width // heads,
        blocks=(Block(width, c.need("num_hidden_layers"), heads, heads, c.need("intermediate_size")),),
        tied_head=c.get("tie_word_embeddings", False),
        norm_epsilon=c.get("layer_norm_eps", 1e-5),
        ffn=c.activation("hidden_act", "gelu"),
        positions="rotary",
        rotary_dim=int(width // heads * fraction),
        rotary_base=base,
        parallel_residual=c.get("use_parallel_residual", True),
    )


def _llama(c: Config, bias: Bias | None = None) -> Architecture:
    """`bias` None: as the configuration says, all or none."""
    if bias is None:
        attention, ffn = c.get("attention_bias", False), c.get("mlp_bias", False)
        if attention != ffn:
            raise UnsupportedError(
                f"{c.where}: attention_bias {attention} with mlp_bias {ffn} is not supported", CHOOSE
            )
        bias = "all" if attention else "none"
    c.only("hidden_act", "silu")
    base, fraction = c.rope("rope_theta", "partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise UnsupportedError(f"{c.where}: partial_rotary_factor {fraction} is not supported", CHOOSE)
    width, heads = c.need("hidden_size"), c.need("num_attention_heads")
    head_dim = c.get("head_dim", width // heads)
    kv_heads = c.get("num_key_value_heads", heads)
    return Architecture(
        vocab_size=c.need("vocab_size"),
        max_positions=c.need("max_position_embeddings"),
        embedding_width=width,
        head_dim=head_dim,
        blocks=(Block(width, c.need("num_hidden_layers"), heads, kv_heads, c.need("intermediate_size")),),
        tied_head=c.get("tie_word_embeddings", False),
        norm="rmsnorm",
        norm_epsilon=c.get("rms_norm_eps", 1e-6),
        ffn="swiglu",
        positions="rotary",
        rotary_dim=head_dim,
        rotary_base=base,
        bias=bias,
    )


def _mistral(c: Config) -> Architecture:
    if c.values.get("sliding_window", 4096) is not None:  # the family's default is a window of 4096
        raise UnsupportedError(
            f"{c.where}: sliding_window is not supported", "choose a model whose sliding_window is null"
        )
    return _llama(c, "none")


def _qwen2(c: Config) -> Architecture:
    c.only("use_sliding_window", False)
    for kind in c.values.get("layer_types") or ():
        if kind != "full_attention":
            raise UnsupportedError(f"{c.where}: layer_types {kind!r} is not supported", CHOOSE)
    return _llama(c, "qkv")


def _adapt_gpt2(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """GPT-2's linear layers are stored [in, out], query, key and value in one."""
    linear = ours[0].startswith("blocks.") and array.ndim == 2
    return split_fused(a, ours, array.T if linear else array)


def _adapt_neox(a: Architecture, ours: tuple[str, ...], array: np.ndarray) -> Sequence[np.ndarray]:
    """Query, key and value are interleaved head by head: [heads, 3, D, ...]."""
    if len(ours) == 1:
        return [array]
    block = a.blocks[0]
    by_head = array.reshape(block.heads, 3, a.head_dim, *array.shape[1:])
    return [by_head[:, part].reshape(block.width, *array.shape[1:]) for part in range(3)]


@dataclass(frozen=True)
class Family:
    architecture: Callable[[Config], Architecture]
    layout: Layout
    prefixes: tuple[str, ...]  # that a weight's name may or may not start with


_QKV = "attention.query attention.key attention.value"
_LLAMA_LAYOUT = Layout(
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
_OPT_LAYOUT = Layout(
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
_GPT2_LAYOUT = Layout(
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
)
_NEOX_LAYOUT = Layout(
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
FAMILIES = {
    "opt": Family(_opt, _OPT_LAYOUT, ("model.decoder.", "decoder.")),
    "gpt2": Family(_gpt2, _GPT2_LAYOUT, ("transformer.",)),
    "gpt_neox": Family(_neox, _NEOX_LAYOUT, ("gpt_neox.",)),
    "llama": Family(_llama, _LLAMA_LAYOUT, ("model.",)),
    "mistral": Family(_mistral, _LLAMA_LAYOUT, ("model.",)),
    "qwen2": Family(_qwen2, _LLAMA_LAYOUT, ("model.",)),
}
