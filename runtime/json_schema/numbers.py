"""Bounds of numbers: each has a largest size and a largest number of decimals, so that its digits end."""

from __future__ import annotations

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal, localcontext
from typing import Any

from merino_edge.runtime.json_schema.references import NotHeldError

LARGEST = 2**53 - 1  # that every reader of JSON keeps exactly
DECIMALS, MOST_DECIMALS = 6, 10
DIGITS_OF_SPAN = 3  # in a narrow range
DIGITS = 400  # of exact sums: a float has up to 309 before its point


def bounded(schema: dict[str, Any], at: str) -> dict[str, Any]:
    """The keywords of a number in `schema`, with bounds on its size and, without a step, on its decimals.

    Raises NotHeldError for a range beyond `LARGEST`.
    """
    low = max(schema.get("minimum", -math.inf), schema.get("exclusiveMinimum", -math.inf))
    high = min(schema.get("maximum", math.inf), schema.get("exclusiveMaximum", math.inf))
    if low > LARGEST or high < -LARGEST:
        raise NotHeldError(f"numbers beyond 2**53 at {at} cannot be held")
    result = inclusive(schema)
    result["minimum"] = max(result.get("minimum", -LARGEST), -LARGEST)
    result["maximum"] = min(result.get("maximum", LARGEST), LARGEST)
    if "number" in schema["type"]:
        result.setdefault("multipleOf", float(f"1e-{_decimals(schema)}"))
    return result


def inclusive(schema: dict[str, Any]) -> dict[str, Any]:
    """The keywords of a number in `schema`, without exclusive bounds: the engine lets 0 through where it is excluded.

    The next number is the nearest one of as many decimals as are written, or the next whole number.
    """
    result = {k: v for k, v in schema.items() if k in ("minimum", "maximum", "multipleOf")}
    step = Decimal(1) if schema["type"] == ["integer"] else Decimal(1).scaleb(-_decimals(schema))
    with localcontext() as context:
        context.prec = DIGITS
        for bound, exclusive, rounding, away, tighter in (
            ("minimum", "exclusiveMinimum", ROUND_FLOOR, 1, max),
            ("maximum", "exclusiveMaximum", ROUND_CEILING, -1, min),
        ):
            if exclusive in schema:
                edge = Decimal(repr(schema[exclusive])) / step
                inner = (edge.to_integral_value(rounding) + away) * step
                value = int(inner) if inner == int(inner) else float(inner)
                result[bound] = tighter(value, result.get(bound, value))
    return result


def _decimals(schema: dict[str, Any]) -> int:
    """How many decimals a number has at most: more in a narrow range."""
    low = max(schema.get("minimum", -LARGEST), schema.get("exclusiveMinimum", -LARGEST))
    high = min(schema.get("maximum", LARGEST), schema.get("exclusiveMaximum", LARGEST))
    if not 0 < high - low < 10.0 ** (DIGITS_OF_SPAN - DECIMALS):
        return DECIMALS
    return min(MOST_DECIMALS, DIGITS_OF_SPAN - math.floor(math.log10(high - low)))


def check_literal(value: Any, at: str) -> None:
    """Raise NotHeldError where a constant holds an infinite number, or a whole one that loses digits as a float."""
    if isinstance(value, float) and not math.isfinite(value):
        raise NotHeldError(f"the number {value} at {at} cannot be held")
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > LARGEST:
        raise NotHeldError(f"the number {str(value)[:40]} at {at} is beyond 2**53 and cannot be held")
    if isinstance(value, (list, dict)):
        for inner in value.values() if isinstance(value, dict) else value:
            check_literal(inner, at)
