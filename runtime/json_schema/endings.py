"""Which answers of a prepared schema can end: what cannot is left out, so that a model cannot get lost in it.

A list of lists of itself can end, as an empty list. An object that must have one of itself cannot.
"""

from __future__ import annotations

from typing import Any


class Endings:
    """Whether schemas have an answer that ends. `definitions` is {name: prepared schema}."""

    def __init__(self, definitions: dict[str, Any]) -> None:
        self._ends = dict.fromkeys(definitions, False)
        changed = True
        while changed:  # each round finds at least one more
            changed = False
            for name, schema in definitions.items():
                if not self._ends[name] and self.ends(schema):
                    self._ends[name] = changed = True

    def ends(self, schema: Any) -> bool:
        """Whether `schema` has an answer that ends."""
        if isinstance(schema, bool):
            return schema
        if "$ref" in schema:
            return self._ends.get(schema["$ref"].removeprefix("#/$defs/"), False)
        if "anyOf" in schema:
            return any(self.ends(option) for option in schema["anyOf"])
        if "allOf" in schema:
            return all(self.ends(part) for part in schema["allOf"])
        types = schema.get("type", ["null"])
        return any(self._ends_as(schema, kind) for kind in types)

    def _ends_as(self, schema: dict[str, Any], kind: str) -> bool:
        if kind == "array":
            first, least = schema.get("prefixItems", []), schema.get("minItems", 0)
            rest = self.ends(schema.get("items", True)) or least <= len(first)
            return rest and all(self.ends(item) for item in first[:least])
        if kind == "object":
            properties, others = schema.get("properties", {}), schema.get("additionalProperties", True)
            if schema.get("patternProperties"):
                others = True
            return all(self.ends(properties.get(name, others)) for name in schema.get("required", ()))
        return True

    def pruned(self, schema: Any) -> Any:
        """`schema` without the parts whose answers never end. It must have an answer itself."""
        if isinstance(schema, bool) or "$ref" in schema:
            return schema
        if "anyOf" in schema:
            return {"anyOf": [self.pruned(option) for option in schema["anyOf"] if self.ends(option)]}
        if "allOf" in schema:
            return {"allOf": [self.pruned(part) for part in schema["allOf"]]}
        result = dict(schema)
        for keyword in ("items", "additionalProperties"):
            if keyword in result:
                result[keyword] = self._or_nothing(result[keyword])
        if "prefixItems" in result:
            result["prefixItems"] = [self._or_nothing(item) for item in result["prefixItems"]]
        for keyword in ("properties", "patternProperties"):
            if keyword in result:
                result[keyword] = {name: self._or_nothing(inner) for name, inner in result[keyword].items()}
        return result

    def _or_nothing(self, schema: Any) -> Any:
        return self.pruned(schema) if self.ends(schema) else False
