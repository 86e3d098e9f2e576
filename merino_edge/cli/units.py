"""Numbers that a person may write with a unit: `--minutes 90s`, `--max-mb 1.2GB`, `--share 10%`."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping

from merino_edge.errors import InputError

TIMES_S = {"s": 1.0, "sec": 1.0, "seconds": 1.0, "min": 60.0, "minutes": 60.0, "h": 3600.0, "hours": 3600.0}
SIZES_MB = {"mb": 1.0, "gb": 1e3, "mib": 2**20 / 1e6, "gib": 2**30 / 1e6}
NUMBER = re.compile(r"\s*([-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?(?:inf|nan))\s*([a-z%]*)\s*", re.IGNORECASE)


def seconds(option: str) -> Callable[[str], float]:
    """What reads the option's word. It raises InputError that names the option."""
    return functools.partial(_read, f"{option} {{!r}} is no time in seconds", TIMES_S, "30, 30s or 5min")


def minutes(option: str) -> Callable[[str], float]:
    units = {name: of / 60 for name, of in TIMES_S.items()}
    return functools.partial(_read, f"{option} {{!r}} is no time in minutes", units, "5, 5min or 90s")


def megabytes(option: str) -> Callable[[str], float]:
    return functools.partial(_read, f"{option} {{!r}} is no size in MB", SIZES_MB, "500, 500MB or 1.2GB")


def share(option: str) -> Callable[[str], float]:
    return functools.partial(_read, f"{option} {{!r}} is no share", {"%": 0.01}, "0.1 or 10%")


def _read(wrong: str, units: Mapping[str, float], examples: str, text: str) -> float:
    match = NUMBER.fullmatch(str(text))  # a default is a number already
    if match is None or (unit := match[2].lower()) not in ("", *units):
        raise InputError(wrong.format(text), f"write it as {examples}")
    return float(match[1]) * (units[unit] if unit else 1.0)
