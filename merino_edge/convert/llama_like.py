"""What the families that descend from Llama have in common: gated FFN, RMS norms, rotary positions, sliding windows.

A reader of a configuration is a function `Config` -> `Architecture`; a writer gives the fields that `Fields` does not.
What an architecture has no field for is folded into weights (merino_edge.convert.folding). Defaults of missing fields
are those of transformers' configuration classes. This module touches no file.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from merino_edge.architecture import Architecture, Bias, Rotary
from merino_edge.convert.config import CHOOSE, FULL, SLIDING, Config
from merino_edge.convert.family import Fields
from merino_edge.convert.folding import Folding
from merino_edge.convert.rotary_scaling import Rope, spelled
from merino_edge.errors import ArtefactError, UnsupportedError

LLAMA = Fields(kv_heads="num_key_value_heads", head_dim="head_dim", norm_epsilon="rms_norm_eps")
PREFIXES = ("model.",)
GATED_NAME = {"swiglu": "silu", "geglu": "gelu", "geglu_tanh": "gelu_pytorch_tanh"}
NORM_OF_ONES = {"norm.weight": 1.0}  # for families whose norms have no weights
_FFN_BIASES = {f"ffn.{part}.bias": 0.0 for part in ("gate", "up", "down")}
_ATTENTION_BIASES = {f"attention.{part}.bias": 0.0 for part in ("query", "key", "value", "output")}


# --- what several read -----------------------------------------------------------------------------


def rotary(rope: Rope, head_dim: int, positions: int) -> dict[str, Any]:
    """The architecture's fields of rotary positions. `positions` are those of the configuration."""
    rotary_dim = int(head_dim * rope.fraction)
    return {
        "positions": "rotary",
        "rotary_dim": rotary_dim,
        "rotary_base": rope.base,
        "rotary_factors": rope.factors(rotary_dim, positions),
        "max_positions": rope.positions(positions),
    }


def rope_folding(c: Config, rope: Rope, **rules: Any) -> Folding:
    """A folding with `rules` and the attention factor of scaled rotary positions."""
    return Folding(rotated=rope.attention_factor(c.need(LLAMA.max_positions)), **rules)


def biases(c: Config, attention_of: Bias = "all", *, default: bool = False) -> tuple[Bias, dict[str, float]]:
    """The biases by `attention_bias` and `mlp_bias`, and those of ours that the family then lacks, which are zeros.

    `attention_of`: which biases an attention with biases has in this family. `default`: of a missing attention_bias.
    """
    attention, ffn = c.get("attention_bias", default), c.get("mlp_bias", False)
    if attention_of == "qkv" and not ffn:
        return ("qkv" if attention else "none"), {}
    if attention and ffn and attention_of == "all":
        return "all", {}
    if attention or ffn:
        lacking = {"attention.output.bias": 0.0} if attention else _ATTENTION_BIASES
        return "all", _FFN_BIASES if attention and not ffn else lacking
    return "none", {}


def read_llama(
    c: Config,
    rope: Rope | None = None,
    *,
    fields: Fields = LLAMA,
    tied_head: bool = False,
    epsilon: float = 1e-6,
    head_dim: int = 0,
    bias: Bias | None = None,
    activation: str = "hidden_act",
    partly_rotated: bool = False,
    **others: Any,
) -> Architecture:
    """The architecture of a Llama-like configuration. `head_dim` 0: the width divided by the heads.

    `partly_rotated`: the family heeds a fraction of the head that is rotated. Others in transformers do not.
    """
    rope = c.rope() if rope is None else rope
    if "kinds" not in others:
        c.no_windows(c.need(fields.max_positions))
    if rope.fraction != 1 and not partly_rotated:
        raise UnsupportedError(f"{c.where}: partial_rotary_factor {rope.fraction} is not supported", CHOOSE)
    head_dim = c.get(LLAMA.head_dim, head_dim or c.need(fields.width) // c.need(fields.heads))
    if head_dim < 1:
        raise ArtefactError(f"{c.where}: head_dim is {head_dim}", "download it again")
    own: dict[str, Any] = {"norm": "rmsnorm", "norm_epsilon": c.get(fields.norm_epsilon, epsilon), "head_dim": head_dim}
    if "ffn" not in others:
        own["ffn"] = c.activation(activation, "silu", gated=True)
    own["bias"] = biases(c)[0] if bias is None else bias
    own |= rotary(rope, head_dim, c.need(fields.max_positions))
    return fields.read(c, tied_head=tied_head, **{**own, **others})


def same_everywhere(layers: int, window: int, kind: Rotary = "global") -> list[tuple[int, Rotary]]:
    """The same window and rotary for every layer."""
    return [(window, kind)] * layers if window and layers <= 1024 else []


def layer_kinds(c: Config, window: int, slides: Callable[[int], bool]) -> list[tuple[int, Rotary]]:
    """Window and rotary of each layer, where some slide."""
    layers = c.need(LLAMA.layers)
    if layers > 1024:  # which the architecture refuses
        return []
    return [(window if sliding else 0, "global") for sliding in c.sliding(layers, slides)]


def plain_folding(c: Config, a: Architecture) -> Folding:
    """The folding of a family without rules of its own: the attention factor of scaled rotary positions."""
    return rope_folding(c, c.rope())


def biased_folding(c: Config, a: Architecture) -> Folding:
    """`plain_folding`, and zeros for the biases that the family lacks."""
    return rope_folding(c, c.rope(), constants=biases(c)[1])


# --- what several write ----------------------------------------------------------------------------


def rope_parameters(a: Architecture) -> dict[str, Any]:
    """The fields of `rope_parameters` of the global rotary."""
    return spelled(a.rotary_base, a.rotary_dim, a.rotary_factors, a.max_positions)


def gated_rotary(a: Architecture) -> dict[str, Any]:
    """The fields of a gated FFN and rotary positions.

    `rope_theta` stands beside `rope_parameters`: transformers 4 knows only that, and would silently use its default.
    It knows scaling as `rope_scaling` only.
    """
    rope = rope_parameters(a)
    scaling = {} if not a.rotary_factors else {"rope_scaling": rope}
    return {"hidden_act": GATED_NAME.get(a.ffn), "rope_theta": a.rotary_base, "rope_parameters": rope, **scaling}


def to_llama(a: Architecture) -> dict[str, Any]:
    """The fields of `gated_rotary`, and which layers have biases."""
    biased = a.bias == "all"
    return {**gated_rotary(a), "attention_bias": biased, "mlp_bias": biased}


def partial(a: Architecture) -> dict[str, Any]:
    """The rotated fraction, as a reader computes it back, and the fields of `gated_rotary`."""
    fraction = (a.rotary_dim or a.head_dim) / a.head_dim
    if int(a.head_dim * fraction) < a.rotary_dim:
        fraction = math.nextafter(fraction, 1.0)
    written = gated_rotary(a)
    for name in ("rope_parameters", "rope_scaling"):
        if name in written:
            written[name] = {**written[name], "partial_rotary_factor": fraction}
    return {**written, "partial_rotary_factor": fraction}


def window_fields(a: Architecture) -> dict[str, Any]:
    """The fields of sliding windows."""
    windows = [block.window for block in a.layer_blocks()]
    kinds = [SLIDING if window else FULL for window in windows]
    return {"layer_types": kinds, "sliding_window": max(windows) or None}
