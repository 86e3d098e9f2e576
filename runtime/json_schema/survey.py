"""What the schemas say that apply to one value at once: which properties they name, and how often they step numbers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from merino_edge.runtime.json_schema.keywords import IN_PLACE
from merino_edge.runtime.json_schema.references import References


@dataclass
class Survey:
    """`names` of properties, whether others are let in by name (`is_open`), and how many `multipleOf` there are."""

    names: set[str] = field(default_factory=set)
    is_open: bool = False
    steps: int = 0


def survey(schema: Any, references: References, at: str) -> Survey:
    """Look through `schema` and all that applies in place: `allOf`, `anyOf`, `oneOf` and references."""
    found, seen, waiting = Survey(), set[str](), [schema]
    while waiting:
        part = waiting.pop()
        if not isinstance(part, dict):
            continue
        for keyword in IN_PLACE:
            if keyword == "$ref" and "$ref" in part:
                pointer = references.pointer(part["$ref"], at)
                if pointer not in seen:
                    seen.add(pointer)
                    waiting.append(references.target(pointer, at))
            elif isinstance(part.get(keyword), list):
                waiting += part[keyword]
        properties = part.get("properties")
        found.names |= properties.keys() if isinstance(properties, dict) else set()
        found.is_open |= (
            bool(part.get("additionalProperties"))
            or "patternProperties" in part
            or part.get("propertyNames", True) not in (True, {})
        )
        found.steps += "multipleOf" in part
    return found
