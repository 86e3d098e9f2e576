"""Unions: whether an answer to one option may fit another one too, which `oneOf` forbids.

Two options differ for certain by their types, or by a constant that both have. They also differ by a property that one
must have and the other does not know, because what is not named is closed here.
"""

from __future__ import annotations

from itertools import permutations
from typing import Any

from merino_edge.runtime.json_schema.keywords import IN_PLACE, LITERALS
from merino_edge.runtime.json_schema.references import References


def literals(schema: Any) -> list[Any] | None:
    """The values of `const` or `enum`, or None."""
    if not isinstance(schema, dict):
        return None
    if "const" in schema:
        return [schema["const"]]
    values = schema.get("enum")
    return values if isinstance(values, list) else None


def exclude_each_other(options: list[Any], references: References, at: str) -> bool:
    """Whether no answer to one of the options fits another one, for certain."""
    found = [references.resolved(option, at) for option in options]
    return all(_never_fits(mine, other, references, at) for mine, other in permutations(found, 2))


def _never_fits(mine: Any, other: Any, references: References, at: str) -> bool:
    """Whether an answer to `mine` never fits `other`."""
    if not isinstance(mine, dict) or not isinstance(other, dict) or set(IN_PLACE) & (mine.keys() | other.keys()):
        return False
    if not _types(mine) & _types(other):
        return True
    if (values := literals(mine)) is not None and (others := literals(other)) is not None:
        return not _shared(values, others)
    if _types(mine) & _types(other) != {"object"} or set(LITERALS) & (mine.keys() | other.keys()):
        return False
    ours, theirs = mine.get("properties", {}), other.get("properties", {})
    closed = "properties" in mine and not mine.get("additionalProperties") and "patternProperties" not in mine
    if closed and set(other.get("required", ())) - ours.keys() - set(mine.get("required", ())):
        return True
    for name in set(mine.get("required", ())) & ours.keys() & theirs.keys():
        one, another = (literals(references.resolved(side[name], at)) for side in (ours, theirs))
        if one is not None and another is not None and not _shared(one, another):
            return True
    return False


def _shared(values: list[Any], others: list[Any]) -> bool:
    return any(value == other for value in values for other in others)  # 1 == True errs on the safe side


def _types(schema: dict[str, Any]) -> set[str]:
    given = schema.get("type")
    if given is None:
        values = literals(schema)
        if values is None:
            return {"null", "boolean", "number", "string", "array", "object"}
        return {type_of(value) for value in values}
    return {"number" if kind == "integer" else kind for kind in ([given] if isinstance(given, str) else given)}


def type_of(value: Any) -> str:
    if value is None:
        return "null"
    kinds = ((bool, "boolean"), ((int, float), "number"), (str, "string"), (list, "array"))
    return next((name for kind, name in kinds if isinstance(value, kind)), "object")


def fits_types(value: Any, types: list[str]) -> bool:
    """Whether a constant is of one of `types`."""
    kind = type_of(value)
    return kind in types or (kind == "number" and "integer" in types and value == int(value))
