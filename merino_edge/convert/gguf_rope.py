"""Rotary positions in the metadata of GGUF, and their scaling: linear, yarn, and factors that stand as tensors.

    rope_freqs          divides the frequencies (Llama 3.1 and 3.2): [R / 2]
    rope_factors_short  the same up to the original positions (Phi-3): [R / 2]; rope_factors_long is for those behind

Where llama.cpp scales by several of them, they multiply. A file that names no kind of scaling means `linear`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from merino_edge import limits
from merino_edge.architecture import Architecture
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.rotary_scaling import Rope
from merino_edge.errors import ArtefactError, UnsupportedError

FREQUENCIES = "rope_freqs.weight"
SHORT, LONG = "rope_factors_short.weight", "rope_factors_long.weight"
BASE, DIMENSIONS = "rope.freq_base", "rope.dimension_count"
TYPE, FACTOR, OLD_FACTOR = "rope.scaling.type", "rope.scaling.factor", "rope.scale_linear"
ORIGINAL, TURNS = "rope.scaling.original_context_length", "rope.scaling.finetuned"
ATTENTION = "rope.scaling.attn_factor"  # multiplies cosines and sines
YARN = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
KEYS = (
    *(BASE, DIMENSIONS, TYPE, FACTOR, OLD_FACTOR, ORIGINAL, TURNS, ATTENTION),
    *(f"rope.scaling.{name}" for name in YARN.values()),
)
KINDS = ("none", "linear", "yarn", "longrope")


@dataclass(frozen=True)
class Rotation:
    """The rotary positions of a file."""

    fields: dict[str, Any] = field(default_factory=dict)  # of the architecture
    rotated: float = 1.0  # multiplies cosines and sines
    positions: int = 0  # up to how many the factors hold


def read(m: Metadata, family: str, head_dim: int, *, partly: bool, stored: tuple[float, ...], short: bool) -> Rotation:
    """The rotary positions of `family`. `partly`: it may rotate the beginning of a head only.

    `stored` are the factors that stand as a tensor; `short`: they hold up to the original positions. Raises
    UnsupportedError, ArtefactError.
    """
    dim = m.get(f"{family}.{DIMENSIONS}", int) or head_dim
    if dim > limits.MAX_HEAD_DIM:  # before there is a number for each pair
        raise UnsupportedError(f"{m.where}: heads of {dim}, the limit is {limits.MAX_HEAD_DIM}", "choose another model")
    if dim != head_dim and not partly:
        raise UnsupportedError(f"{m.where}: {family}.{DIMENSIONS} {dim} is not supported", "choose another model")
    kind = m.get(f"{family}.{TYPE}", str) or "linear"
    if kind not in KINDS:
        raise UnsupportedError(f"{m.where}: {family}.{TYPE} {kind} is not supported", "choose another model")
    base, positions = m.real(f"{family}.{BASE}", 10_000.0), m.whole(f"{family}.context_length")
    original = m.get(f"{family}.{ORIGINAL}", int) or positions
    factor = m.real(f"{family}.{FACTOR}", m.real(f"{family}.{OLD_FACTOR}", 0.0)) or 1.0
    rotated, factors = m.real(f"{family}.{ATTENTION}", 1.0), (1.0,) * (dim // 2)
    yarn = {ours: m.real(f"{family}.rope.scaling.{name}", 0.0) for ours, name in YARN.items()}
    if kind != "none" and factor != 1:
        fields = {"factor": factor, **{name: value for name, value in yarn.items() if value}}
        rope = Rope(base, 1.0, "yarn" if kind == "yarn" else "linear", fields, original, m.where)
        factors = rope.factors(dim, positions) or factors
        rotated *= rope.attention_factor(positions)
    if not 1e-3 < rotated < 1e3:
        raise ArtefactError(f"{m.where}: {family}.{ATTENTION} gives {rotated}", "it is damaged; download it again")
    if stored:
        factors = tuple(map(math.prod, zip(stored, factors, strict=True))) if len(stored) == len(factors) else stored
    if not stored and set(factors) <= {1.0}:
        factors = ()
    rotary = {"rotary_dim": dim, "rotary_base": base, "rotary_factors": factors}
    return Rotation(rotary, rotated, min(positions, original) if short else positions)


def as_factors(array: np.ndarray) -> tuple[float, ...]:
    """The factors of a tensor, each as its shortest decimal."""
    return tuple(float(str(factor)) for factor in np.asarray(array, np.float32).ravel()[:4096])


def write(a: Architecture, tensors: tuple[str, ...]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """The metadata without the family's name, and the tensors, of those `tensors` that the family has.

    One factor for all pairs is linear scaling. Others need a tensor; without it, what is read back has none.
    """
    values: dict[str, Any] = {BASE: a.rotary_base, DIMENSIONS: a.rotary_dim}
    factors = np.array(a.rotary_factors, np.float32)
    if len(set(factors.tolist())) == 1:
        return {**values, TYPE: "linear", FACTOR: float(factors[0])}, {}
    if not len(factors):
        return values, {}
    if FREQUENCIES in tensors:
        return values, {FREQUENCIES: factors}
    if SHORT in tensors:
        return {**values, ORIGINAL: a.max_positions}, {SHORT: factors, LONG: factors}
    return values, {}
