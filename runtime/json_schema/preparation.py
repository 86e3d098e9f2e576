"""A JSON schema as people write it becomes one that the grammar engine holds answers to, or is refused.

Every answer to the result fits the schema, apart from what the notes name. The result allows less where the schema
leaves open what nobody means, and where a model would not find an end:
- properties that are not named are closed, as llama.cpp has it; `additionalProperties` says otherwise.
- numbers have bounds and at most six decimals, and values of any type a depth of five.
- `oneOf` is `anyOf`, formats and other keywords that cannot be held are left out or refused by name.
Source: JSON Schema 2020-12, https://json-schema.org/draft/2020-12.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merino_edge.runtime.json_schema import formats, numbers, sets, unions
from merino_edge.runtime.json_schema.endings import Endings
from merino_edge.runtime.json_schema.keywords import (
    CLOSED,
    IN_PLACE,
    LITERALS,
    OF_STRING,
    normal,
)
from merino_edge.runtime.json_schema.objects import prepared_object
from merino_edge.runtime.json_schema.references import NotHeldError, References, SchemaError
from merino_edge.runtime.json_schema.survey import Survey, survey

ANY_DEPTH = 5  # of lists and objects within a value of any type
MOST_ITEMS = 1_000  # of a list, where the schema allows more
MOST_LENGTH = 10_000  # that a text may have to have
MOST_PARTS = 20_000  # of a schema, with what its references name


@dataclass(frozen=True)
class Prepared:
    """A schema for the grammar engine, and what its answers are not held to."""

    schema: dict[str, Any]
    notes: tuple[str, ...]


def prepare(schema: Any) -> Prepared:
    """Prepare a JSON schema. Raises SchemaError for a wrong one, NotHeldError for one that cannot be held.

    The schema must not be nested deeper than `limits.MAX_JSON_DEPTH`.
    """
    return Preparation(schema).result()


class Preparation:
    def __init__(self, root: Any) -> None:
        self._root, self.references = root, References(root)
        self._notes = dict[str, None]()
        self._definitions = dict[str, Any]()  # {name: prepared schema}
        self._names = dict[tuple[str, bool], str]()  # {(pointer, whether it is open): name}
        self._parts = 0
        self._tags = dict[str, set[str]]()  # {pointer: properties that tell the options of a union apart}
        self._find_tags(root)

    def result(self) -> Prepared:
        root = self.reference("#", "#", is_open=False)
        endings = Endings(self._definitions)
        if not endings.ends(root):
            raise SchemaError("no answer can meet it and end")
        definitions = {name: endings.pruned(s) for name, s in self._definitions.items() if endings.ends(s)}
        return Prepared({**root, "$defs": definitions}, tuple(self._notes))

    def note(self, text: str) -> None:
        """Say what answers are not held to."""
        self._notes[text] = None

    # --- nodes ---

    def node(self, schema: Any, at: str, around: frozenset[str] = frozenset(), *, is_open: bool = False) -> Any:
        """The prepared form of one schema. `around` are properties that a schema around it names.

        With `is_open` neither properties nor numbers are bounded, since something beside it does that.
        """
        self._parts += 1
        if self._parts > MOST_PARTS:
            raise SchemaError(f"it has more than {MOST_PARTS} parts, with what its references name")
        if isinstance(schema, bool):
            return self.anything() if schema else False
        if not isinstance(schema, dict):
            raise SchemaError(f"{at} is neither an object nor a boolean")
        keywords = normal(schema, at, self.note)
        if not keywords:
            return self.anything()
        applied = [k for k in keywords if k in IN_PLACE]
        if not applied:
            return self._simple(keywords, at, around, is_open=is_open)
        if len(keywords) == 1 and not around:
            return self._alone(applied[0], keywords[applied[0]], at, is_open=is_open)
        return self._together(keywords, at, around, is_open=is_open)

    def _alone(self, keyword: str, value: Any, at: str, *, is_open: bool) -> Any:
        if keyword == "$ref":
            return self.reference(value, at, is_open=is_open)
        if keyword == "allOf" and len(_list(value, keyword, at)) == 1:
            return self.node(value[0], f"{at}/allOf/0", is_open=is_open)
        if keyword == "allOf":
            return self._together({keyword: value}, at, frozenset(), is_open=is_open)
        return self._union(keyword, value, at, frozenset(), is_open=is_open)

    def reference(self, reference: Any, at: str, *, is_open: bool) -> dict[str, Any]:
        """What a reference names becomes a definition; the result refers to it."""
        pointer = self.references.pointer(reference, at)
        key = pointer, is_open
        if key not in self._names:
            name = self._names[key] = f"d{len(self._names)}"
            target = self.references.target(pointer, at)
            if pointer in self._tags:
                target = _with_tags(target, self._tags[pointer])
            try:
                self._definitions[name] = self.node(target, f"#{pointer}", is_open=is_open)
            except SchemaError:
                del self._names[key]
                raise
        return {"$ref": f"#/$defs/{self._names[key]}"}

    def anything(self, depth: int = ANY_DEPTH) -> dict[str, Any]:
        """A value of any type."""
        name = f"any{depth}"
        if name not in self._definitions:
            scalar = {"type": ["null", "boolean", "number", "string"]}
            options: list[Any] = [scalar | numbers.bounded(scalar, "#")]
            if depth:
                inner = self.anything(depth - 1)
                options += [{"type": ["array"], "items": inner}, {"type": ["object"], "additionalProperties": inner}]
            self._definitions[name] = {"anyOf": options}
        return {"$ref": f"#/$defs/{name}"}

    # --- what applies in place ---

    def _together(self, keywords: dict[str, Any], at: str, around: frozenset[str], *, is_open: bool) -> Any:
        """All keywords at once: each is prepared alone, and what they leave open is bounded beside them."""
        found = survey(keywords, self.references, at)
        if found.steps > 1:
            raise NotHeldError(f"several multipleOf at once at {at} cannot be held")
        own = {k: v for k, v in keywords.items() if k not in IN_PLACE and k != CLOSED}
        unions_ = [k for k in ("anyOf", "oneOf") if k in keywords]
        mine = survey(own, self.references, at)
        each = len(unions_) == 1 and not (is_open or mine.is_open or found.steps)
        each = each and not {"allOf", "$ref", CLOSED} & keywords.keys()  # then each option bounds itself
        names = frozenset(mine.names | around)
        parts: list[Any] = []
        for keyword, value in keywords.items():
            if keyword in own and own:
                parts.append(self._simple(own, at, frozenset(), is_open=True))
                own = {}
            elif keyword == "$ref":
                parts.append(self.reference(value, at, is_open=True))
            elif keyword == "allOf":
                inner = enumerate(_list(value, keyword, at))
                parts += [self.node(part, f"{at}/allOf/{i}", is_open=True) for i, part in inner]
            elif keyword in unions_:
                parts.append(self._union(keyword, value, at, names if each else frozenset(), is_open=not each))
        if not is_open and not each:
            parts.append(self._bounds(found, around, at, closed=CLOSED in keywords))
        return {"allOf": parts}

    def _bounds(self, found: Survey, around: frozenset[str], at: str, *, closed: bool) -> dict[str, Any]:
        number = {"type": ["integer" if found.steps else "number"]}
        bounds = numbers.bounded(number, at)
        bounds |= {"type": ["null", "boolean", "number", "string", "array", "object"]}
        if closed and found.is_open:
            raise NotHeldError(f"unevaluatedProperties beside open objects at {at} cannot be held")
        names = found.names | around
        if (names or closed) and not found.is_open:
            bounds |= {"properties": dict.fromkeys(sorted(names), True), "additionalProperties": False}
        return bounds

    def _union(self, keyword: str, options: Any, at: str, around: frozenset[str], *, is_open: bool) -> Any:
        prepared: list[Any] = []
        left_out: NotHeldError | None = None
        for index, option in enumerate(_list(options, keyword, at)):
            try:
                prepared.append(self.node(option, f"{at}/{keyword}/{index}", around, is_open=is_open))
            except NotHeldError as error:
                left_out = error
                if keyword == "oneOf":
                    raise
        held = [option for option in prepared if option is not False]
        if left_out is not None:
            if not held:
                raise left_out
            self.note(f"an option of {at} is left out: {left_out.reason}")
        if keyword == "oneOf" and not unions.exclude_each_other(options, self.references, at):
            self.note(f"oneOf at {at} is held as anyOf")
        return {"anyOf": held} if held else False

    # --- plain schemas ---

    def _simple(self, keywords: dict[str, Any], at: str, around: frozenset[str], *, is_open: bool) -> Any:
        values = unions.literals(keywords)
        if values is not None or "enum" in keywords:
            return self._literals(keywords, values, at)
        types = keywords["type"]
        result: dict[str, Any] = {"type": types}
        if "string" in types:
            if keywords.get("minLength", 0) > MOST_LENGTH:
                raise NotHeldError(f"minLength above {MOST_LENGTH} at {at} cannot be held")
            result |= {k: v for k, v in keywords.items() if k in OF_STRING}
        if {"integer", "number"} & set(types):
            result |= numbers.inclusive(keywords) if is_open else numbers.bounded(keywords, at)
        if "object" in types:
            result |= prepared_object(self, keywords, at, around, is_open=is_open)
        if "array" in types:
            rest = [kind for kind in types if kind != "array"]
            array = self._array(keywords, at)
            options = [{**result, "type": rest}] * bool(rest) + [array]
            return _with_format({"anyOf": options} if rest else {**array})
        return _with_format(result)

    def _literals(self, keywords: dict[str, Any], values: list[Any] | None, at: str) -> Any:
        if not values:
            raise SchemaError(f"enum at {at} is no list of values")
        if "const" in keywords and isinstance(keywords.get("enum"), list):
            values = [value for value in values if value in keywords["enum"]]
        for value in values:
            numbers.check_literal(value, at)
        if "type" in keywords:
            values = [value for value in values if unions.fits_types(value, keywords["type"])]
        if not values:
            return False
        rest = {k: v for k, v in keywords.items() if k not in (*LITERALS, "type")}
        if not rest:
            return {"enum": values}
        types = keywords.get("type") or sorted({unions.type_of(value) for value in values})
        return {"allOf": [{"enum": values}, self._simple({**rest, "type": types}, at, frozenset(), is_open=True)]}

    def _array(self, keywords: dict[str, Any], at: str) -> dict[str, Any]:
        first = _list(keywords.get("prefixItems", []), "prefixItems", at, least=0)
        least, most = keywords.get("minItems", 0), keywords.get("maxItems")
        if least > MOST_ITEMS:
            raise NotHeldError(f"more than {MOST_ITEMS} items at {at} cannot be held")
        if keywords.get("uniqueItems") and (most is None or most > 1):
            return self._set(keywords, at, least, most)
        result: dict[str, Any] = {"type": ["array"], "minItems": least}
        if first:
            result["prefixItems"] = [self.node(item, f"{at}/prefixItems/{i}") for i, item in enumerate(first)]
        if most is not None:
            result["maxItems"] = min(most, MOST_ITEMS)
        if "items" in keywords:
            result["items"] = self.node(keywords["items"], f"{at}/items")
        else:  # items beyond those that are named are closed, as properties are
            result["items"] = False if first and least <= len(first) else self.anything()
        return result

    def _set(self, keywords: dict[str, Any], at: str, least: int, most: int | None) -> dict[str, Any]:
        values = None if "prefixItems" in keywords else self._few_values(keywords.get("items", True), f"{at}/items")
        lists, is_whole = sets.subsets(sets.distinct(values), least, most) if values is not None else ([], False)
        if not lists:
            raise NotHeldError(f"uniqueItems at {at}, of items that are not few constants, cannot be held")
        if not is_whole:
            self.note(f"the lists at {at} have at most {len(lists[-1])} items, since they must not repeat")
        return {"enum": lists}

    def _few_values(self, schema: Any, at: str) -> list[Any] | None:
        """All values that `schema` allows, where they are few and it lists them."""
        schema = self.references.resolved(schema, at)
        if not isinstance(schema, dict):
            return None
        keywords = normal(schema, at, self.note)
        if set(keywords) == {"anyOf"}:
            inner = [self._few_values(option, at) for option in _list(keywords["anyOf"], "anyOf", at)]
            values = [value for found in inner for value in found or ()] if None not in inner else None
        elif set(keywords) <= {"type", *LITERALS} and set(keywords) & set(LITERALS):
            prepared = self._simple(keywords, at, frozenset(), is_open=True)
            values = prepared["enum"] if prepared else []
        else:
            of_type: dict[tuple[str, ...], list[Any]] = {("boolean",): [False, True], ("null",): [None]}
            values = of_type.get(tuple(keywords.get("type", ())))
        return values if values is not None and len(values) <= sets.MOST_VALUES else None

    def _find_tags(self, root: Any) -> None:
        """Find the options of unions that a `discriminator` tells apart: its property must be there."""
        waiting = [root]
        while waiting:
            value = waiting.pop()
            waiting += value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
            tag = value.get("discriminator") if isinstance(value, dict) else None
            name = tag.get("propertyName") if isinstance(tag, dict) else None
            if isinstance(name, str):
                options = value.get("oneOf", value.get("anyOf"))
                for option in options if isinstance(options, list) else ():
                    if isinstance(option, dict) and "$ref" in option:
                        self._tags.setdefault(self.references.pointer(option["$ref"], "#"), set()).add(name)


def _with_tags(schema: Any, tags: set[str]) -> Any:
    """`schema` with those of the properties `tags` required that it has."""
    if not isinstance(schema, dict) or not isinstance(schema.get("properties"), dict):
        return schema
    required = schema.get("required", [])
    there = [tag for tag in sorted(tags) if tag in schema["properties"]]
    return {**schema, "required": [*required, *there]} if isinstance(required, list) else schema


def _list(value: Any, keyword: str, at: str, least: int = 1) -> list[Any]:
    if not isinstance(value, list) or len(value) < least:
        raise SchemaError(f"{keyword} at {at} is no list of schemas")
    return value


def _with_format(schema: dict[str, Any]) -> dict[str, Any]:
    """A format that has a pattern here becomes one, beside a pattern that is there already."""
    ours = formats.pattern(schema.get("format", ""))
    if ours is None:
        return schema
    rest = {k: v for k, v in schema.items() if k != "format"}
    if "pattern" not in rest:
        return {**rest, "pattern": ours}
    return {"allOf": [rest, {"type": schema["type"], "pattern": ours}]}
