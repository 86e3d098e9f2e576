"""Lists without repetition (`uniqueItems`): held where the values are few, as one of their subsets in a fixed order.

A grammar cannot remember what a list already has. So the lists themselves are its options.
"""

from __future__ import annotations

from itertools import combinations
from math import comb
from typing import Any

MOST_LISTS = 256
MOST_VALUES = 64


def subsets(values: list[Any], least: int, most: int | None) -> tuple[list[list[Any]], bool]:
    """Lists of `least` to `most` of the values, and whether all of them are there: at most MOST_LISTS.

    Longer lists are left out first. The result is empty where not even the shortest lists are few enough.
    """
    most = len(values) if most is None else min(most, len(values))
    found: list[list[Any]] = []
    for size in range(least, most + 1):
        if len(found) + comb(len(values), size) > MOST_LISTS:
            return found, False
        found += [list(chosen) for chosen in combinations(values, size)]
    return found, True


def distinct(values: list[Any]) -> list[Any]:
    """The values without repetition, as JSON Schema compares: 1 is 1.0, but not true."""
    result: list[Any] = []
    for value in values:
        if not any(isinstance(value, bool) == isinstance(other, bool) and value == other for other in result):
            result.append(value)
    return result
