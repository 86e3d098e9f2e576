"""Objects: their properties in order, which others there may be, and how many."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from merino_edge.runtime.json_schema import unions
from merino_edge.runtime.json_schema.references import NotHeldError, SchemaError

if TYPE_CHECKING:
    from merino_edge.runtime.json_schema.preparation import Preparation


def prepared_object(
    preparation: Preparation, keywords: dict[str, Any], at: str, around: frozenset[str], *, is_open: bool
) -> dict[str, Any]:
    """The keywords of an object. With `is_open` what it leaves open stays so; else `around` are names too.

    Raises SchemaError for wrong keywords, NotHeldError for some that cannot be held.
    """
    properties, patterns = _map(keywords, "properties", at), _map(keywords, "patternProperties", at)
    required = keywords.get("required", [])
    given = keywords.get("additionalProperties")
    others: Any = None if given is None else preparation.node(given, f"{at}/additionalProperties")
    inner = {name: preparation.node(value, f"{at}/properties/{name}") for name, value in properties.items()}
    by_pattern = {text: preparation.node(s, f"{at}/patternProperties/{text}") for text, s in patterns.items()}
    names = preparation.references.resolved(keywords.get("propertyNames", True), f"propertyNames at {at}")
    if _says_something(names):
        anything = preparation.anything() if others is None else others
        inner, by_pattern = _named(names, at, inner, by_pattern, anything)
        others = False
    if others is None and not is_open:
        for name in required:
            if not by_pattern:
                inner.setdefault(name, preparation.anything())
        closes = inner.keys() - set(required) or properties or patterns or around
        others = False if closes else preparation.anything()
        if closes:
            inner |= {name: True for name in sorted(around) if name not in inner}
    result: dict[str, Any] = {"required": required}
    result |= {"properties": inner} if inner else {}
    result |= {"patternProperties": by_pattern} if by_pattern else {}
    result |= {} if others is None else {"additionalProperties": others}
    return result | _counts(keywords, result, at)


def _map(keywords: dict[str, Any], keyword: str, at: str) -> dict[str, Any]:
    value = keywords.get(keyword, {})
    if not isinstance(value, dict):
        raise SchemaError(f"{keyword} at {at} is no object")
    return value


def _says_something(names: Any) -> bool:
    if not isinstance(names, dict):
        return names is not True
    return bool(names.keys() - {"type", "title", "description", "$schema"}) or names.get("type", "string") != "string"


def _named(
    names: Any, at: str, inner: dict[str, Any], by_pattern: dict[str, Any], others: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Properties and patterns that hold `propertyNames`; no other property may be there."""
    if names is False:
        return {}, {}
    values = unions.literals(names)
    if values is not None and not by_pattern:
        allowed = {name: value for name, value in inner.items() if name in values}
        return allowed | {name: others for name in values if isinstance(name, str) and name not in inner}, {}
    held = {"type", "title", "description", "pattern", "minLength", "maxLength"}
    if not isinstance(names, dict) or names.keys() - held or names.get("type", "string") != "string":
        raise NotHeldError(f"propertyNames at {at} cannot be held")
    if inner or by_pattern or ("pattern" in names and names.keys() & {"minLength", "maxLength"}):
        raise NotHeldError(f"propertyNames beside other conditions on names at {at} cannot be held")
    length = f"{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}"
    return {}, {names.get("pattern", f"^(?s:.{length})$"): others}


def _counts(keywords: dict[str, Any], result: dict[str, Any], at: str) -> dict[str, int]:
    """Counts of properties that still say something."""
    least, most = keywords.get("minProperties", 0), keywords.get("maxProperties")
    required, named = len(result["required"]), result.get("properties", {})
    is_map = bool(result.get("patternProperties")) or result.get("additionalProperties", True) is not False
    if is_map and least - required > 1:  # a grammar cannot tell that a name comes twice
        raise NotHeldError(f"minProperties above 1 at {at} cannot be held")
    counts = {"minProperties": least} if least > required else {}
    if most is not None and (is_map or most < len(named)):
        counts["maxProperties"] = most
    return counts
