"""Hugging Face model families: `config.json` to `Architecture` and back, and the layout of the weights.

The families are OPT, GPT-2 (and Cerebras-GPT), GPT-NeoX (Pythia), and Llama, Mistral and Qwen2 without sliding window.
Configurations are read as transformers 4 and 5 write them. A missing field means the family's documented default. A
field that no architecture can express is refused by name. One table of names serves reading and writing. A family may
be unable to express all of an architecture, so the writer reads the result back (merino_edge.convert.to_huggingface).
This module touches no file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, TypeVar

from merino_edge.architecture import Architecture, Bias, Block, Ffn
from merino_edge.convert.layouts import (
    GPT2_LAYOUT,
    LLAMA_LAYOUT,
    NEOX_LAYOUT,
    OPT_LAYOUT,
    Fuse,
    Layout,
    fuse_as_is,
    fuse_gpt2,
    fuse_neox,
)
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
    """A `config.json`, read field by field. Fields are typed, and those without equivalent are refused by name."""

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
        """A whole number of at least 1 without default. Raises ArtefactError."""
        value = self.get(name, 0)
        if value < 1:
            raise ArtefactError(f"{self.where}: {name} is missing or below 1", "download it again")
        return value

    def only(self, name: str, accepted: Collection[Any]) -> None:
        """Raise UnsupportedError for a field that is present, not null, and none of `accepted`."""
        value = self.values.get(name)
        if value is not None and value not in tuple(accepted):  # which needs no hash
            raise UnsupportedError(f"{self.where}: {name} {value!r} is not supported", CHOOSE)

    def activation(self, name: str, default: str) -> Ffn:
        """The FFN's activation. Raises UnsupportedError for one that no architecture has."""
        self.only(name, ACTIVATIONS)
        return ACTIVATIONS[self.get(name, default)]

    def rope(self, theta_name: str, fraction_name: str, default_fraction: float) -> tuple[float, float]:
        """The rotary base and the rotated fraction of a head, from the old or the new spelling.

        Raises UnsupportedError for scaled rotary positions.
        """
        own = Config(self.values.get("rope_parameters") or {}, f"{self.where}: rope_parameters")
        scaling = Config(self.values.get("rope_scaling") or {}, f"{self.where}: rope_scaling")
        for spelling in (own, scaling):
            for field in spelling.values.keys() - {"rope_theta", "partial_rotary_factor", "rope_type", "type"}:
                raise UnsupportedError(f"{spelling.where}: {field} is not supported", CHOOSE)
            spelling.only("rope_type", ("default",))
            spelling.only("type", ("default",))
        base = own.get("rope_theta", self.get(theta_name, 10000.0))
        fraction = own.get("partial_rotary_factor", self.get(fraction_name, default_fraction))
        if not 0 < fraction <= 1:
            raise ArtefactError(f"{self.where}: rotated fraction {fraction} is outside 0 to 1", "download it again")
        return base, fraction


# --- configurations --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fields:
    """The family's names of an `Architecture`'s fields; empty where the family leaves no choice."""

    vocab_size: str = "vocab_size"
    tied_head: str = "tie_word_embeddings"
    max_positions: str = "max_position_embeddings"
    embedding_width: str = ""
    width: str = "hidden_size"
    layers: str = "num_hidden_layers"
    heads: str = "num_attention_heads"
    kv_heads: str = ""
    head_dim: str = ""
    ffn_width: str = "intermediate_size"
    norm_epsilon: str = ""
    ffn: str = ""  # by the names of ACTIVATIONS
    parallel_residual: str = ""

    def read(self, c: Config, *, tied_head: bool, ffn_width: int | None = None, **others: Any) -> Architecture:
        """The architecture of configuration `c`.

        `tied_head` and `ffn_width` are defaults for missing fields. `others` are fields of the architecture.
        """
        width, heads = c.need(self.width), c.need(self.heads)
        kv_heads = c.get(self.kv_heads, heads)
        ffn_width = c.need(self.ffn_width) if ffn_width is None else c.get(self.ffn_width, ffn_width)
        return Architecture(
            vocab_size=c.need(self.vocab_size),
            max_positions=c.need(self.max_positions),
            embedding_width=c.get(self.embedding_width, width),
            blocks=(Block(width, c.need(self.layers), heads, kv_heads, ffn_width),),
            tied_head=c.get(self.tied_head, tied_head),
            **{"head_dim": width // heads, **others},
        )

    def write(self, a: Architecture) -> dict[str, Any]:
        """The configuration's fields for an architecture of one block."""
        ours = {**dataclasses.asdict(a.blocks[0]), **a.to_dict(), "ffn": _NAME_OF.get(a.ffn)}
        names = dataclasses.asdict(self)
        return {theirs: ours[name] for name, theirs in names.items() if theirs}


_NAME_OF: dict[Ffn, str] = {ffn: name for name, ffn in reversed(ACTIVATIONS.items())}  # the first of each
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
_LLAMA = Fields(kv_heads="num_key_value_heads", head_dim="head_dim", norm_epsilon="rms_norm_eps")


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


def _neox(c: Config) -> Architecture:
    c.only("attention_bias", (True,))
    base, fraction = c.rope("rotary_emb_base", "rotary_pct", 0.25)
    return _NEOX.read(
        c,
        tied_head=False,
        norm_epsilon=c.get(_NEOX.norm_epsilon, 1e-5),
        ffn=c.activation(_NEOX.ffn, "gelu"),
        positions="rotary",
        rotary_dim=int(c.need(_NEOX.width) // c.need(_NEOX.heads) * fraction),
        rotary_base=base,
        parallel_residual=c.get(_NEOX.parallel_residual, True),
    )


def _to_neox(a: Architecture) -> dict[str, Any]:
    fraction = (a.rotary_dim or a.head_dim) / a.head_dim
    if int(a.head_dim * fraction) < a.rotary_dim:  # as a reader computes it
        fraction = math.nextafter(fraction, 1.0)
    old = {"rotary_emb_base": a.rotary_base, "rotary_pct": fraction}
    return {**old, "rope_parameters": {**_rope(a), "partial_rotary_factor": fraction}}


def _llama(c: Config, bias: Bias | None = None) -> Architecture:
    """The architecture of a Llama-like configuration. With `bias` None the configuration decides: all or none."""
    if bias is None:
        attention, ffn = c.get("attention_bias", False), c.get("mlp_bias", False)
        if attention != ffn:
            raise UnsupportedError(
                f"{c.where}: attention_bias {attention} with mlp_bias {ffn} is not supported", CHOOSE
            )
        bias = "all" if attention else "none"
    c.only("hidden_act", ("silu",))
    base, fraction = c.rope("rope_theta", "partial_rotary_factor", 1.0)
    if fraction != 1.0:
        raise UnsupportedError(f"{c.where}: partial_rotary_factor {fraction} is not supported", CHOOSE)
    head_dim = c.get(_LLAMA.head_dim, c.need(_LLAMA.width) // c.need(_LLAMA.heads))
    return _LLAMA.read(
        c,
        tied_head=False,
        head_dim=head_dim,
        norm="rmsnorm",
        norm_epsilon=c.get(_LLAMA.norm_epsilon, 1e-6),
        ffn="swiglu",
        positions="rotary",
        rotary_dim=head_dim,
        rotary_base=base,
        bias=bias,
    )


def _to_llama(a: Architecture) -> dict[str, Any]:
    biased = a.bias == "all"
    return {**_gated_rotary(a), "attention_bias": biased, "mlp_bias": biased}


def _mistral(c: Config) -> Architecture:
    if c.values.get("sliding_window", 4096) is not None:  # the family's default is a window of 4096
        raise UnsupportedError(
            f"{c.where}: sliding_window is not supported", "choose a model whose sliding_window is null"
        )
    return _llama(c, "none")


def _to_mistral(a: Architecture) -> dict[str, Any]:
    return {**_gated_rotary(a), "sliding_window": None}


def _qwen2(c: Config) -> Architecture:
    c.only("use_sliding_window", (False,))
    kinds = c.values.get("layer_types")
    for kind in kinds if isinstance(kinds, list) else []:
        if kind != "full_attention":
            raise UnsupportedError(f"{c.where}: layer_types {kind!r} is not supported", CHOOSE)
    return _llama(c, "qkv")


def _to_qwen2(a: Architecture) -> dict[str, Any]:
    return {**_gated_rotary(a), "use_sliding_window": False}


def _gated_rotary(a: Architecture) -> dict[str, Any]:
    """The fields of a gated FFN and rotary positions.

    `rope_theta` stands beside `rope_parameters`: transformers 4 knows only that, and would silently use its default.
    """
    return {"hidden_act": "silu", "rope_theta": a.rotary_base, "rope_parameters": _rope(a)}


def _rope(a: Architecture) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": a.rotary_base}


# --- families --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Family:
    """A model family. `architecture` reads a configuration, `fields` and `others` write it.

    `fuse` is the inverse of `layout.adapt`.
    """

    model: str  # transformers' class
    architecture: Callable[[Config], Architecture]
    fields: Fields
    others: Callable[[Architecture], dict[str, Any]]
    layout: Layout
    prefixes: tuple[str, ...]  # optional prefixes of a weight's name; the first is written
    fuse: Fuse = fuse_as_is

    def config(self, a: Architecture) -> dict[str, Any]:
        """This family's `config.json` for an architecture of one block. It may not express all of the architecture."""
        return {**self.fields.write(a), **self.others(a)}


FAMILIES = {
    "opt": Family("OPTForCausalLM", _opt, _OPT, _to_opt, OPT_LAYOUT, ("model.decoder.", "decoder.")),
    "gpt2": Family("GPT2LMHeadModel", _gpt2, _GPT2, _to_gpt2, GPT2_LAYOUT, ("transformer.",), fuse_gpt2),
    "gpt_neox": Family("GPTNeoXForCausalLM", _neox, _NEOX, _to_neox, NEOX_LAYOUT, ("gpt_neox.",), fuse_neox),
    "llama": Family("LlamaForCausalLM", _llama, _LLAMA, _to_llama, LLAMA_LAYOUT, ("model.",)),
    "mistral": Family("MistralForCausalLM", _mistral, _LLAMA, _to_mistral, LLAMA_LAYOUT, ("model.",)),
    "qwen2": Family("Qwen2ForCausalLM", _qwen2, _LLAMA, _to_qwen2, LLAMA_LAYOUT, ("model.",)),
}
