"""Keywords of JSON Schema: which are held, which say nothing about an answer, and what older drafts mean.

Unknown keywords are notes to other programs, as JSON Schema has it. A keyword without a type speaks of the type that it
belongs to: `{"minLength": 2}` is a text here, though JSON Schema also lets any number through.
Source: JSON Schema 2020-12, https://json-schema.org/draft/2020-12.
"""

from __future__ import annotations

import math
import re
from typing import Any

from merino_edge.runtime.json_schema import formats
from merino_edge.runtime.json_schema.references import NotHeldError, SchemaError

TYPES = ("null", "boolean", "integer", "number", "string", "array", "object")
OF_STRING = ("minLength", "maxLength", "pattern", "format")
OF_NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
OF_ARRAY = ("items", "prefixItems", "minItems", "maxItems", "uniqueItems")
OF_OBJECT = (
    *("properties", "patternProperties", "additionalProperties", "propertyNames"),
    *("required", "minProperties", "maxProperties"),
)
FAMILIES = {"string": OF_STRING, "number": OF_NUMBER, "array": OF_ARRAY, "object": OF_OBJECT}
IN_PLACE = ("allOf", "anyOf", "oneOf", "$ref")
LITERALS = ("const", "enum")
CLOSED = "unevaluatedProperties"  # kept beside what applies in place
SIMPLE = frozenset(("type", *LITERALS, *OF_STRING, *OF_NUMBER, *OF_ARRAY, *OF_OBJECT))
NOT_HELD = ("not", "if", "contains", "dependentSchemas", "dependencies", "$dynamicRef", "$recursiveRef")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems", "minProperties", "maxProperties")
LOOKS_AROUND = re.compile(r"\(\?(?:[=!]|<[=!])|\\[1-9bB]")  # the engine has no such patterns
CLOSING = {"unevaluatedProperties": "additionalProperties", "unevaluatedItems": "items"}


def normal(schema: dict[str, Any], at: str, note: Any) -> dict[str, Any]:
    """The keywords of `schema` that count, in 2020-12's form. `note` is called with what is not held to the letter.

    Raises NotHeldError for a keyword that cannot be held, SchemaError for a wrong one.
    """
    for keyword in NOT_HELD:
        if keyword in schema and not (keyword == "if" and not {"then", "else"} & schema.keys()):
            raise NotHeldError(f"{keyword!r} at {at} cannot be held")
    result = {k: v for k, v in schema.items() if k in SIMPLE or k in IN_PLACE}
    _close(schema, result, at)
    _check_counts(result, at)
    if isinstance(result.get("items"), list):  # until 2019-09
        result["prefixItems"] = result.pop("items")
        if "additionalItems" in schema:
            result["items"] = schema["additionalItems"]
    _exclusive_bounds(result, at)
    if "uniqueItems" in result and result["uniqueItems"] is not True:
        del result["uniqueItems"]
    if "type" in result:
        result["type"] = _types(result["type"], at)
    _check_text_forms(result, at, note)
    if "required" in result:
        result["required"] = list(dict.fromkeys(_names(result, at)))
    needed = schema.get("dependentRequired")
    if needed is not None:  # all at once, which is more than is asked for
        if not isinstance(needed, dict):
            raise SchemaError(f"dependentRequired at {at} is no object")
        together = [name for names in needed.values() for name in _names({"required": names}, at)]
        result["required"] = list(dict.fromkeys([*result.get("required", ()), *together]))
    if result.keys() & SIMPLE and not result.keys() & {"type", *LITERALS}:
        result["type"] = [kind for kind, keywords in FAMILIES.items() if result.keys() & set(keywords)]
    return result


def _check_text_forms(schema: dict[str, Any], at: str, note: Any) -> None:
    """Leave out a format that is unknown, and a pattern that cannot be held where a format says the same."""
    kind, pattern = schema.get("format", ""), schema.get("pattern", "")
    if not isinstance(kind, str):
        raise SchemaError(f"format at {at} is no text")
    if "format" in schema and kind not in formats.OURS.keys() | formats.OF_THE_ENGINE:
        if "string" in schema.get("type", ["string"]):
            note(f"the format {kind[:40]!r} at {at} is not held")
        del schema["format"]
    if not isinstance(pattern, str):
        raise SchemaError(f"pattern at {at} is no text")
    if LOOKS_AROUND.search(pattern.replace(r"\\", "")):
        reason = f"the pattern {pattern[:40]!r} at {at}, which looks around or back,"
        if "format" not in schema:
            raise NotHeldError(f"{reason} cannot be held")
        note(f"{reason} is not held beside its format")
        del schema["pattern"]


def _types(given: Any, at: str) -> list[str]:
    types = [given] if isinstance(given, str) else given
    if not isinstance(types, list) or not types:
        raise SchemaError(f"type at {at} is neither a text nor a list")
    for kind in types:
        if kind not in TYPES:
            raise SchemaError(f"Invalid type: {str(kind)[:40]} at {at}")
    return [kind for kind in dict.fromkeys(types) if not (kind == "integer" and "number" in types)]


def _names(schema: dict[str, Any], at: str) -> list[str]:
    names = schema.get("required", [])
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise SchemaError(f"required at {at} is no list of names")
    return names


def _check_counts(schema: dict[str, Any], at: str) -> None:
    for keyword in COUNTS:
        if keyword in schema:
            value = schema[keyword]
            if not _is_number(value) or value < 0 or value != int(value):
                raise SchemaError(f"{keyword} at {at} is no count")
            schema[keyword] = int(value)


def _close(schema: dict[str, Any], result: dict[str, Any], at: str) -> None:
    for keyword, plain in CLOSING.items():
        if schema.get(keyword, True) in (True, {}):
            continue
        if schema[keyword] is not False:
            raise NotHeldError(f"{keyword!r} at {at} cannot be held")
        if not result.keys() & set(IN_PLACE):
            result.setdefault(plain, False)
        elif keyword == "unevaluatedProperties":
            result[CLOSED] = False
        else:
            raise NotHeldError(f"{keyword!r} beside others at {at} cannot be held")


def _exclusive_bounds(schema: dict[str, Any], at: str) -> None:
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(schema.get(exclusive), bool) and schema.pop(exclusive) and bound in schema:  # until draft 4
            schema[exclusive] = schema.pop(bound)
    for keyword in OF_NUMBER:
        value = schema.get(keyword, 1)
        if not _is_number(value):
            raise SchemaError(f"{keyword} at {at} is no number")
    if schema.get("multipleOf", 1) <= 0:
        raise SchemaError(f"multipleOf at {at} is not above 0")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) != math.inf and value == value
