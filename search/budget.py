"""What a search must not exceed: a `Metric` is one kind of cost, and a `Budget` limits any number of metrics.

| metric | value after @ | unit | meaning |
|---|---|---|---|
| decode_ms | cache length | ms | time to generate one token |
| text_ms | cache length | ms | time to generate 100 bytes of text; a larger vocabulary needs fewer tokens |
| prefill_ms | prompt tokens | ms | time to run a prompt into an empty cache |
| first_token_ms | prompt bytes | ms | time until the first token, for a prompt of so many bytes of text |
| energy_mj | cache length | mJ | energy to generate one token, where the table has energy |
| weight_mb | precision | 10^6 bytes | stored weights |
| kv_mb | positions (default: all) | 10^6 bytes | KV cache |
| peak_mb | tokens run at once | 10^6 bytes | weights, full cache and activations |
| parameters, flops | - | count | stored parameters; FLOPs of 1024 tokens without the head (paper section 6) |

A metric is written with its value, as `decode_ms@1024`, in files too. This module knows no space and no table.
"""

from __future__ import annotations

import decimal
import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from merino_edge import counts, limits, names
from merino_edge.errors import InputError


class Kind(NamedTuple):
    """How a metric is requested and shown. A new metric needs a row in KINDS and its sum in `CostModel.metric_cost`."""

    option: str
    metavar: str  # of the option's value
    help: str
    label: str
    at: str = ""  # the meaning of the value after @, "" if the metric has none
    unit: float = 1  # the shown number is the value divided by this
    latency: bool = False  # whether a latency table answers it
    whole: bool = False  # whether its values are whole numbers


KINDS = {
    "decode_ms": Kind(
        "--decode-ms",
        "MS[@LENGTH]",
        "Time per generated token, at a cache length.",
        label="decode step (ms)",
        at="cache length",
        latency=True,
    ),
    "text_ms": Kind(
        "--text-ms",
        "MS[@LENGTH]",
        "Time per 100 bytes of generated text: comparable across tokenizers.",
        label="100 bytes of text (ms)",
        at="cache length",
        latency=True,
    ),
    "prefill_ms": Kind(
        "--prefill-ms",
        "MS[@TOKENS]",
        "Time to read a prompt of TOKENS tokens.",
        label="prefill (ms)",
        at="prompt tokens",
        latency=True,
    ),
    "first_token_ms": Kind(
        "--first-token-ms",
        "MS[@BYTES]",
        "Time to the first token, for a prompt of BYTES bytes.",
        label="first token (ms)",
        at="prompt bytes",
        latency=True,
    ),
    "energy_mj": Kind(
        "--energy-mj",
        "MJ[@LENGTH]",
        "Energy per generated token in mJ, if the table has it.",
        label="energy per token (mJ)",
        at="cache length",
        latency=True,
    ),
    "weight_mb": Kind("--weight-mb", "MB[@PRECISION]", "Stored weights.", label="weights (MB)", at="precision"),
    "kv_mb": Kind("--kv-mb", "MB[@POSITIONS]", "KV cache.", label="cache (MB)", at="positions"),
    "peak_mb": Kind(
        "--peak-mb",
        "MB[@TOKENS]",
        "Peak memory: weights, full KV cache, and activations of a prompt of TOKENS tokens.",
        label="peak memory (MB)",
        at="prompt tokens",
    ),
    "parameters": Kind(
        "--params", "N", "Stored parameters, for example 60M.", label="parameters (M)", unit=1e6, whole=True
    ),
    "flops": Kind(
        "--flops",
        "N",
        "FLOPs of 1024 tokens without the LM head, for example 60G.",
        label="GFLOPs of 1024 tokens, head excluded",
        unit=1e9,
        whole=True,
    ),
}
_SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}
_UNITS = {  # by the end of the option's name
    "ms": {"MS": 1.0, "S": 1e3, "US": 1e-3},
    "mb": {"MB": 1.0, "GB": 1e3, "KB": 1e-3},
    "mj": {"MJ": 1.0, "J": 1e3},
}
_FOUR_DIGITS_UP = decimal.Context(prec=4, rounding=decimal.ROUND_CEILING)


@dataclass(frozen=True)
class Metric:
    """One kind of cost at a length or a precision.

    `at` is None if the metric has no such value, or if it is left open. For kv_mb None means every position.
    """

    name: str
    at: int | str | None = None

    @property
    def kind(self) -> Kind:
        return KINDS[self.name]

    @property
    def key(self) -> str:
        """The metric in its written form, as `decode_ms@1024`."""
        return self.name if self.at is None else f"{self.name}@{self.at}"

    @property
    def label(self) -> str:
        """The metric in words, for tables and plots."""
        return self.kind.label if self.at is None else f"{self.kind.label} @ {self.at}"

    @staticmethod
    def parse(key: str) -> Metric:
        """The metric that `key` spells, as in `decode_ms@1024`. Raises InputError."""
        name, mark, text = key.partition("@") if isinstance(key, str) else (key, "", "")
        name = names.find(name, KINDS) or name
        if name not in KINDS:
            raise InputError(f"there is no metric {name!r}", names.choose(name, KINDS))
        return Metric(name, parse_at(name, text) if mark else None)


def parse_at(name: str, text: str) -> int | str:
    """Parse the value after the @ of metric `name`. Raises InputError."""
    kind = KINDS[name]
    if kind.at == "precision":
        counts.check_precision(text.lower())
        return text.lower()
    if not kind.at or not text.isdecimal():
        hint = f"write {kind.option} VALUE@{kind.at.upper().replace(' ', '_')}" if kind.at else "leave @ out"
        raise InputError(f"{kind.option} @{text}: {text!r} is no {kind.at or 'length it has'}", hint)
    name = f"{kind.option} @{text if len(text) < 10 else text[:9] + '...'}"
    return limits.check_range(name, int(text[:9]), 1, limits.MAX_POSITIONS)


@dataclass(frozen=True)
class Budget:
    """Upper limits on metrics. Raises InputError unless every limit is positive and every metric occurs once."""

    limits: tuple[tuple[Metric, float], ...] = ()

    def __post_init__(self) -> None:
        metrics = [metric for metric, _ in self.limits]
        for metric, limit in self.limits:
            is_number = isinstance(limit, numbers.Real) and not isinstance(limit, bool)
            if not is_number or not 0 < limit < math.inf:
                raise InputError(f"budget {metric.key} is {limit!r}", f"give {metric.kind.option} a positive number")
            if metrics.count(metric) > 1:
                raise InputError(f"{metric.kind.option} is given twice for {metric.key}", "give it once")

    @staticmethod
    def of(limits: Mapping[str, float]) -> Budget:
        """A budget from metric keys, as {"decode_ms@1024": 5.0, "parameters": 6e7}. Raises InputError."""
        if not isinstance(limits, Mapping):
            raise InputError(f"budget is {limits!r}, no mapping", 'write it as {"decode_ms@1024": 5.0}')
        return Budget(tuple((Metric.parse(key), limit) for key, limit in limits.items()))

    def to_dict(self) -> dict[str, float]:
        """The limits by metric key, the form that `Budget.of` reads."""
        return {metric.key: limit for metric, limit in self.limits}

    @property
    def metrics(self) -> tuple[Metric, ...]:
        """The metrics that have a limit, in order."""
        return tuple(metric for metric, _ in self.limits)

    def without(self, *metrics: Metric) -> Budget:
        """The same budget without the limits of `metrics`."""
        return Budget(tuple((metric, limit) for metric, limit in self.limits if metric not in metrics))

    def within(self, metric: Metric, limit: float) -> Budget:
        """The same budget with `metric`'s limit set to `limit`, first in order."""
        return Budget(((metric, limit), *self.without(metric).limits))


# --- quantities ------------------------------------------------------------------------------------


def parse_quantity(text: str, name: str = "quantity") -> float:
    """Parse a positive number, as "5", "0.5", "60M" or "1.5G" (K, M, G = B, T), in any capitals.

    An option that ends in a unit, as `--decode-ms`, takes it after the number too: "5ms", "0.005s". Raises InputError
    that names `name`.
    """
    text = text.strip()
    units = {**_SUFFIXES, **_UNITS.get(name.rpartition("-")[2], {})}
    suffix = next((unit for unit in sorted(units, key=len, reverse=True) if text.upper().endswith(unit)), "")
    digits, factor = text[: len(text) - len(suffix)], units.get(suffix, 1.0)
    try:
        value = float(digits) * factor
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{name} {text!r} is not a positive number", "write it as 5, 0.5, 60M or 1.5G")
    return value


def spell_quantity(value: float) -> str:
    """`value` rounded up to four digits, in the form that `parse_quantity` reads: 39.75M."""
    factor, suffix = next(((_SUFFIXES[s], s) for s in "TGMK" if value >= _SUFFIXES[s]), (1.0, ""))
    return f"{float(_FOUR_DIGITS_UP.create_decimal(repr(float(value / factor)))):.6g}{suffix}"
