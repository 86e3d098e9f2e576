"""Scaled rotary positions of published models, as factors that divide the frequencies.

    linear    every frequency by one factor                       dynamic   as unscaled, up to the model's positions
    llama3    low frequencies only (Llama 3.1 and 3.2)            yarn      Peng et al. 2023; scales scores too
    longrope  a factor for each pair (Phi-3 and Phi-4-mini): those of the positions up to the original ones

The formulas are those of transformers' `modeling_rope_utils.py`. This module knows no family and no weight.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from merino_edge import limits
from merino_edge.errors import ArtefactError

KINDS: dict[str, tuple[str, ...]] = {  # the fields of each
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor", "original_max_position_embeddings"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        *("factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate"),
        "original_max_position_embeddings",
    ),
    "longrope": ("factor", "attention_factor", "short_factor", "long_factor", "original_max_position_embeddings"),
}
LLAMA3 = ({"factor": 32.0}, {"factor": 8.0})  # of Llama 3.2 and 3.1
LLAMA3_REST = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


@dataclass(frozen=True)
class Rope:
    """Rotary positions as a configuration states them. `original`: positions before the scaling; 0: not stated."""

    base: float
    fraction: float = 1.0  # of a head that is rotated
    kind: str = "default"
    fields: dict[str, Any] = field(default_factory=dict)
    original: int = 0
    where: str = "rope"

    def number(self, name: str, default: float | None = None) -> float:
        """A field that is a number from 1e-6 to 1e9. Raises ArtefactError."""
        value = self.fields.get(name)
        value = default if value is None else value
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 1e-6 < value < 1e9:
            raise ArtefactError(
                f"{self.where}: {name} is {value!r}, not a number from 1e-6 to 1e9", "download it again"
            )
        return float(value)

    def positions(self, positions: int) -> int:
        """Up to how many of the model's `positions` the factors hold."""
        return min(positions, self.original or positions) if self.kind == "longrope" else positions

    def _original(self, positions: int) -> int:
        """The positions before the scaling. Raises ArtefactError where they are none."""
        original = self.original or positions
        if not 2 <= original <= limits.MAX_POSITIONS:
            raise ArtefactError(f"{self.where}: original_max_position_embeddings is {original}", "download it again")
        return original

    def factors(self, rotary_dim: int, positions: int) -> tuple[float, ...]:
        """What divides the frequency of each of `rotary_dim` / 2 pairs; empty where nothing does.

        Raises ArtefactError for fields that make no factors.
        """
        pairs = rotary_dim // 2
        if rotary_dim > limits.MAX_HEAD_DIM or not 1 < self.base < 1e12:  # which the architecture refuses
            return ()
        if self.kind == "linear":
            factor = self.number("factor")
            return () if factor == 1 else (factor,) * pairs
        if self.kind == "longrope":
            listed = self.fields.get("short_factor")
            numbers = isinstance(listed, list) and all(type(x) in (int, float) and 0 < x < 1e6 for x in listed)
            if not numbers or len(listed) != pairs:  # type: ignore[arg-type]
                raise ArtefactError(f"{self.where}: short_factor is no list of {pairs} numbers", "download it again")
            return tuple(float(factor) for factor in listed)  # type: ignore[union-attr]
        exponent = np.arange(0, rotary_dim, 2, dtype=np.float64) / rotary_dim
        if self.kind == "llama3":
            return self._llama3(2 * math.pi * self.base**exponent, self._original(positions))
        if self.kind == "yarn":
            return self._yarn(pairs, self._original(positions))
        return ()

    def _llama3(self, wavelengths: np.ndarray, original: int) -> tuple[float, ...]:
        factor, low, high = (self.number(name) for name in ("factor", "low_freq_factor", "high_freq_factor"))
        if low == high:
            raise ArtefactError(f"{self.where}: low_freq_factor equals high_freq_factor", "download it again")
        smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)  # 1: not scaled
        return tuple((1 / ((1 - smooth) / factor + smooth)).tolist())

    def _yarn(self, pairs: int, original: int) -> tuple[float, ...]:
        factor = self.number("factor")

        def dimension(rotations: float) -> float:
            return pairs * math.log(original / (rotations * 2 * math.pi)) / math.log(self.base)

        low, high = dimension(self.number("beta_fast", 32)), dimension(self.number("beta_slow", 1))
        if self.fields.get("truncate", True):
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * pairs - 1)
        ramp = np.clip((np.arange(pairs) - low) / ((high - low) or 0.001), 0, 1)  # 1: scaled wholly
        return tuple((1 / (ramp / factor + 1 - ramp)).tolist())

    def attention_factor(self, positions: int) -> float:
        """What multiplies cosines and sines."""
        if self.kind not in ("yarn", "longrope"):
            return 1.0
        if self.fields.get("attention_factor") is not None:
            return self.number("attention_factor")
        if self.kind == "longrope":
            original = self._original(positions)
            factor = self.number("factor", positions / original)
            return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
        of_dimension = self.fields.get("mscale"), self.fields.get("mscale_all_dim")
        scales = [self.number(name) for name in ("mscale", "mscale_all_dim")] if all(of_dimension) else [1.0, 0.0]
        above, below = (1 + 0.1 * scale * math.log(max(self.number("factor"), 1.0)) for scale in scales)
        return above / below


def spelled(base: float, rotary_dim: int, factors: tuple[float, ...], positions: int) -> dict[str, Any]:
    """Fields of `rope_parameters` that give `factors`: as Llama 3 or linear scaling where they are those."""
    if not factors:
        return {"rope_type": "default", "rope_theta": base}
    if len(set(factors)) == 1:
        return {"rope_type": "linear", "rope_theta": base, "factor": factors[0]}
    for published in LLAMA3:
        fields = {**published, **LLAMA3_REST}
        if Rope(base, 1.0, "llama3", fields, 8192).factors(rotary_dim, positions) == factors:
            return {"rope_type": "llama3", "rope_theta": base, **fields}
    both = {"short_factor": list(factors), "long_factor": list(factors)}
    rest = {"attention_factor": 1.0, "original_max_position_embeddings": positions}
    return {"rope_type": "longrope", "rope_theta": base, **both, **rest}
