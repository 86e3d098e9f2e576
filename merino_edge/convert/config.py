"""A `config.json` of Hugging Face, read field by field: typed, with the family's defaults, refused by name.

A field that no architecture can express is refused by a sentence that names it, always the same one. This module knows
no family.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeVar

from merino_edge.architecture import Ffn
from merino_edge.convert.rotary_scaling import KINDS, Rope
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
    "relu2": "relu_squared",
}
GATED_ACTIVATIONS: dict[str, Ffn] = {
    "silu": "swiglu",
    "swish": "swiglu",
    "gelu": "geglu",
    "gelu_pytorch_tanh": "geglu_tanh",
    "gelu_new": "geglu_tanh",
    "gelu_fast": "geglu_tanh",
}
CHOOSE = "choose another model"
FULL, SLIDING = "full_attention", "sliding_attention"  # of layer_types


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

    def nullable(self, name: str, default: T) -> T | None:
        """The field; `default` where it is missing, None where it is null. Raises ArtefactError on another type."""
        return None if name in self.values and self.values[name] is None else self.get(name, default)

    def need(self, name: str) -> int:
        """A whole number of at least 1 without default. Raises ArtefactError."""
        value = self.get(name, 0)
        if value < 1:
            raise ArtefactError(f"{self.where}: {name} is missing or below 1", "download it again")
        return value

    def positive(self, name: str, default: float) -> float:
        """A number above 0, or `default`. Raises ArtefactError."""
        value = self.get(name, default)
        if not 0 < value < float("inf"):
            raise ArtefactError(f"{self.where}: {name} is {value}, not above 0", "download it again")
        return value

    def only(self, name: str, accepted: Collection[Any]) -> None:
        """Raise UnsupportedError for a field that is present, not null, and none of `accepted`."""
        value = self.values.get(name)
        if value is not None and value not in tuple(accepted):  # which needs no hash
            raise UnsupportedError(f"{self.where}: {name} {value!r} is not supported", CHOOSE)

    def activation(self, name: str, default: str, *, gated: bool = False) -> Ffn:
        """The FFN's kind by its activation. Raises UnsupportedError for one that no architecture has."""
        known = GATED_ACTIVATIONS if gated else ACTIVATIONS
        self.only(name, known)
        return known[self.get(name, default)]

    def cap(self, name: str, default: float) -> float:
        """What a soft cap holds values below; 0.0, also as `default`: there is none. Raises ArtefactError."""
        value = self.nullable(name, default)
        if value is None or name not in self.values:
            return value or 0.0
        return self.positive(name, default)

    def window(self, name: str, default: int | None = None) -> int:
        """The positions of a sliding window; 0 where there is none. Raises ArtefactError."""
        value = self.values.get(name, default)
        if value is None:
            return 0
        if type(value) is not int or value < 1:
            raise ArtefactError(f"{self.where}: {name} is {value!r}, not a window", "download it again")
        return value

    def layer_types(self, layers: int, known: Sequence[str]) -> list[str] | None:
        """The kind of each layer, of those `known`; None where `layer_types` is missing.

        Raises UnsupportedError, ArtefactError.
        """
        kinds = self.values.get("layer_types")
        if kinds is None:
            return None
        if not isinstance(kinds, list) or len(kinds) != layers:
            raise ArtefactError(f"{self.where}: layer_types is no list of {layers} kinds", "download it again")
        for kind in kinds:
            if kind not in known:
                raise UnsupportedError(f"{self.where}: layer_types {kind!r} is not supported", CHOOSE)
        return kinds

    def sliding(self, layers: int, default: Callable[[int], bool]) -> list[bool]:
        """Which layers have a sliding window, by `layer_types`; where that is missing, by `default`."""
        kinds = self.layer_types(layers, (FULL, SLIDING))
        if kinds is None:
            return [default(layer) for layer in range(layers)]
        if SLIDING in kinds and self.values.get("sliding_window", 0) is None:
            raise ArtefactError(f"{self.where}: layer_types has {SLIDING}, sliding_window is null", "download it again")
        return [kind == SLIDING for kind in kinds]

    def no_windows(self, positions: int) -> None:
        """Raise UnsupportedError where layers of a family without sliding windows have one of less than `positions`.

        transformers then forgets what its mask still shows.
        """
        kinds, window = self.values.get("layer_types"), self.values.get("sliding_window")
        other = [kind for kind in kinds if kind != FULL] if isinstance(kinds, list) else []
        if other:
            raise UnsupportedError(f"{self.where}: layer_types {other[0]!r} is not supported in this family", CHOOSE)
        on = window is not None and self.values.get("use_sliding_window") is not False
        if on and (type(window) is not int or window < positions):
            raise UnsupportedError(f"{self.where}: sliding_window {window!r} is not supported in this family", CHOOSE)

    def rope(
        self,
        *,
        fraction: float = 1.0,
        theta: float = 10000.0,
        theta_name: str = "rope_theta",
        fraction_name: str = "partial_rotary_factor",
    ) -> Rope:
        """The rotary positions, in the old or the new spelling.

        `fraction` and `theta` are the family's defaults. As in transformers, `rope_scaling` comes before
        `rope_parameters`, and what stands inside comes before what stands beside it. Raises UnsupportedError for a kind
        of scaling that no architecture has, ArtefactError for fields that make none.
        """
        name = "rope_scaling" if self.values.get("rope_scaling") else "rope_parameters"
        inner = Config(self.values.get(name) or {}, f"{self.where}: {name}")
        scaling = str(inner.get("rope_type", inner.get("type", "default")))
        if scaling not in KINDS:
            raise UnsupportedError(f"{inner.where}: rope_type {scaling!r} is not supported", CHOOSE)
        known = {"rope_theta", "partial_rotary_factor", "rope_type", "type", *KINDS[scaling]}
        if unknown := sorted(inner.values.keys() - known):
            raise UnsupportedError(f"{inner.where}: {', '.join(unknown)} is not supported", CHOOSE)
        base = inner.get("rope_theta", self.get(theta_name, theta))
        fraction = inner.get("partial_rotary_factor", self.get(fraction_name, fraction))
        if not 0 < fraction <= 1:
            raise ArtefactError(f"{self.where}: rotated fraction {fraction} is outside 0 to 1", "download it again")
        original = self.get("original_max_position_embeddings", inner.get("original_max_position_embeddings", 0))
        return Rope(base, fraction, scaling, inner.values, original, inner.where)
