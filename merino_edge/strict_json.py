"""Strict JSON: what is read from a text can be hashed, written again and printed, and has a bounded size.

Refused are keys that appear twice, NaN, numbers beyond a float's range, and half a character (a lone surrogate). The
depth, the number of values and the digits of a number have limits (merino_edge/limits.py).
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

from merino_edge import limits
from merino_edge.errors import ArtefactError

HALF_CHARACTER = re.compile(r"\\u[dD][89a-fA-F]")  # also the halves of a whole one


def parse_json(text: str, where: str, most_values: int = limits.MAX_JSON_VALUES) -> Any:
    """Parse strict JSON. Raises ArtefactError naming `where`."""
    try:
        value = parse_bounded(text, most_values, **_HOOKS)
        if HALF_CHARACTER.search(text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError:
        reason = "half of a character, a lone surrogate"
    except (ValueError, RecursionError) as error:
        reason = str(error)
    raise ArtefactError(f"{where} is not valid JSON ({reason})", "it is truncated or altered; make it again")


def parse_bounded(text: str, most_values: int = limits.MAX_JSON_VALUES, **hooks: Any) -> Any:
    """Parse JSON of any program, as long as it is bounded. Raises ValueError or RecursionError.

    NaN, repeated keys and half characters pass here, as data sets have them in fields that nobody reads.
    """
    brackets = text.count("[") + text.count("{")
    if brackets + text.count(",") > most_values:
        raise ValueError(f"it holds more than {most_values} values, see merino_edge/limits.py")
    value = json.loads(text, **hooks)
    if brackets > limits.MAX_JSON_DEPTH and _deeper_than(value, limits.MAX_JSON_DEPTH):
        raise ValueError(f"it is nested deeper than {limits.MAX_JSON_DEPTH}, see merino_edge/limits.py")
    return value


def _deeper_than(value: Any, depth: int) -> bool:
    level = [value]
    for _ in range(depth):
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [item for items in inside for item in items if isinstance(item, (dict, list))]
        if not level:
            return False
    return True


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a key appears twice")
    return result


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not JSON")


def _finite(text: str) -> float:
    if math.isinf(value := float(text)):
        raise ValueError(f"{text[:20]} is beyond the range of numbers")
    return value


def _whole(text: str) -> int:
    if len(text) > limits.MAX_JSON_DIGITS:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


_HOOKS = {
    "object_pairs_hook": _refuse_duplicates,
    "parse_constant": _refuse_constant,
    "parse_float": _finite,
    "parse_int": _whole,
}
