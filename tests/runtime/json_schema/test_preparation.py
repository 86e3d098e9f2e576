"""Every answer that a prepared schema lets through fits the schema as it was written, or the schema is refused.

Answers are walks of random tokens that the grammar allows, which needs no model.
"""

from __future__ import annotations

import copy
import datetime
import enum
import json
import random
import uuid
from functools import cache
from typing import Any, Literal

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers

from merino_edge.errors import InputError
from merino_edge.runtime.grammar import Grammar, Grammars
from merino_edge.tokenizer import ChatFormat, Tokenizer

jsonschema = pytest.importorskip("jsonschema")
pydantic = pytest.importorskip("pydantic")
from pydantic import BaseModel, Field, HttpUrl, create_model  # noqa: E402

MOST_TOKENS = 2_000
CLOSES = [1 + b for b in b'"]}']


def _bytes_tokenizer() -> Backend:
    """Token 0 ends an answer; token 1 + b is byte b."""
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    of_byte = {b: chr(b) for b in plain} | {
        b: chr(256 + i) for i, b in enumerate(b for b in range(256) if b not in plain)
    }
    assert set(of_byte.values()) == set(alphabet)
    backend = Backend(models.BPE(vocab={"</s>": 0} | {c: 1 + b for b, c in of_byte.items()}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return backend


@cache
def grammars() -> Grammars:
    tokenizer = Tokenizer(_bytes_tokenizer(), ChatFormat((0,)))
    return Grammars(tokenizer, tokenizer.vocab_size)


def walk(grammar: Grammar, seed: int) -> str | None:
    """An answer of random tokens, which end texts and lists more often; None where it is cut."""
    constraint, rng, written = grammar.begin(), random.Random(seed), bytearray()
    flat = np.zeros(257, np.float32)
    for _ in range(MOST_TOKENS):
        allowed = np.isfinite(constraint.masked(flat))
        closing = [token for token in CLOSES if allowed[token]]
        ends = closing and rng.random() < 0.2
        token = rng.choice(closing) if ends else int(rng.choice(np.flatnonzero(allowed)))
        if token == 0:
            return written.decode()
        written.append(token - 1)
        if constraint.push(token):
            return written.decode()
    return None


def check(schema: dict[str, Any], walks: int, first_seed: int = 0) -> Grammar:
    """Answers to `schema` fit it, and end."""
    grammar = grammars().json_schema(copy.deepcopy(schema))
    validator = jsonschema.Draft202012Validator(schema)
    for seed in range(first_seed, first_seed + walks):
        text = walk(grammar, seed)
        assert text is not None, "it does not end"
        validator.validate(json.loads(text))
    return grammar


class Colour(enum.Enum):
    RED, BLUE = "red", "blue"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = Field(ge=0, le=9)


class Dog(BaseModel):
    kind: Literal["dog"] = "dog"
    name: str = Field(max_length=4)


class Tree(BaseModel):
    value: float
    children: list[Tree] = Field(max_length=2)


KINDS: dict[str, tuple[Any, dict[str, Any]]] = {
    "datetime": (datetime.datetime, {}),
    "date": (datetime.date, {}),
    "time": (datetime.time, {}),
    "timedelta": (datetime.timedelta, {}),
    "uuid": (uuid.UUID, {}),
    "url": (HttpUrl, {}),
    "enum": (Colour, {}),
    "whole number": (int, {}),
    "number": (float, {}),
    "bounded": (int, {"ge": 1, "le": 12}),
    "between": (float, {"gt": 0, "lt": 1}),
    "multiple": (int, {"multiple_of": 5, "ge": 0, "le": 50}),
    "length": (str, {"min_length": 2, "max_length": 5}),
    "pattern": (str, {"pattern": "^[a-z]{3}$"}),
    "list": (list[Literal["a", "b"]], {"min_length": 1, "max_length": 3}),
    "set": (set[Colour], {"max_length": 2}),
    "tuple": (tuple[Literal[1], bool], {}),
    "mapping": (dict[str, int], {"max_length": 2}),
    "mapping of names": (dict[Colour, int], {}),
    "optional": (Cat | None, {}),
    "union": (Cat | Dog | int, {}),
    "told apart": (Cat | Dog, {"discriminator": "kind"}),
    "any": (Any, {}),
    "bytes": (bytes, {}),
    "nested": (list[Cat], {"max_length": 2}),
    "recursive": (Tree, {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_models_of_pydantic_read_their_answers(kind: str) -> None:
    annotation, bounds = KINDS[kind]
    model = create_model("Reply", v=(annotation, Field(**bounds)))
    grammar = check(model.model_json_schema(), walks=8)
    assert grammar.notes == (("the format 'binary' at #/properties/v is not held",) if kind == "bytes" else ())
    for seed in range(8):
        model.model_validate_json(walk(grammar, seed) or "")


ZOD = {  # what z.toJSONSchema of zod 4 writes
    "int": {"type": "integer", "minimum": -9007199254740991, "maximum": 9007199254740991},
    "record": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "number"}},
    "record of an enum": {
        "type": "object",
        "propertyNames": {"type": "string", "enum": ["a", "b"]},
        "additionalProperties": {"type": "boolean"},
        "required": ["a", "b"],
    },
    "email": {
        "type": "string",
        "format": "email",
        "pattern": r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$",
    },
    "nullable": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    "literal": {"type": "number", "const": 3},
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "number"}]},
    "intersection": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "number"}}, "required": ["b"]},
        ]
    },
    "unknown": {},
    "loose object": {"type": "object", "properties": {"a": {"type": "null"}}, "additionalProperties": {}},
}


@pytest.mark.parametrize("kind", ZOD)
def test_schemas_of_zod_are_held(kind: str) -> None:
    first = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
    grammar = check({**first, **ZOD[kind]}, walks=8)
    assert bool(grammar.notes) == (kind == "email")


def properties(**inner: Any) -> dict[str, Any]:
    return {"type": "object", "properties": inner}


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"$ref": "#"}, "no answer can meet it and end"),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"$ref": "#/$defs/b"}, "b": {"$ref": "#/$defs/a"}}}, "and end"),
        ({**properties(next={"$ref": "#"}), "required": ["next"]}, "and end"),
        ({"type": "string", "pattern": "^a{1000000}$"}, "cannot be used"),
        ({"type": "string", "pattern": "^(?!a)b"}, "looks around"),
        ({"type": "string", "minLength": 10**9}, "minLength above"),
        ({"type": "integer", "minimum": 2**60}, r"beyond 2\*\*53"),
        ({"const": 2**53 + 1}, r"beyond 2\*\*53"),
        ({"type": "number", "minimum": float("nan")}, "no number"),
        ({"type": "integer", "enum": [float("inf")]}, "the number inf"),
        ({"type": "string", "format": ["date"]}, "format at # is no text"),
        ({"type": 1, "format": "colour"}, "type at # is neither"),
        ({"required": 1, "dependentRequired": {}}, "required at # is no list"),
        ({"not": {"type": "string"}}, "'not' at # cannot"),
        (properties(a={"if": {}, "then": {}}), "'if' at #/properties/a cannot"),
        ({"type": "array", "contains": {"const": 1}}, "'contains'"),
        ({"type": "array", "items": {"type": "string"}, "uniqueItems": True}, "uniqueItems at #, of items"),
        ({"type": "array", "minItems": 10**9}, "more than 1000 items"),
        ({"type": "object", "minProperties": 2}, "minProperties above 1"),
        ({"$ref": "#/$defs/none"}, "which is not there"),
        ({"$ref": "other.json"}, "does not fetch"),
        ({"allOf": [{"multipleOf": 2}, {"multipleOf": 3}]}, "several multipleOf"),
        ({"properties": []}, "properties at # is no object"),
        ({"type": "string", "maxLength": -1}, "maxLength at # is no count"),
        ({"type": "integer", "minimum": 2, "maximum": 1}, "greater than maximum"),
        ({"enum": []}, "no list of values"),
    ],
)
def test_what_cannot_be_held_is_refused_before_an_answer(schema: dict[str, Any], reason: str) -> None:
    with pytest.raises(InputError, match=reason) as refusal:
        grammars().json_schema(schema)
    assert "\n" not in str(refusal.value)


def test_a_schema_too_deep_for_python_is_refused() -> None:
    deep: dict[str, Any] = {}
    for _ in range(2_000):
        deep = {"items": deep}
    with pytest.raises(InputError, match="no JSON object"):
        grammars().json_schema(deep)


@pytest.mark.parametrize(
    ("schema", "note"),
    [
        ({"type": "string", "format": "colour"}, "the format 'colour' at # is not held"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "oneOf at # is held as anyOf"),
        ({"anyOf": [{"not": {}}, {"type": "null"}]}, "an option of # is left out: 'not' at #/anyOf/0 cannot be held"),
        (
            {"type": "array", "uniqueItems": True, "items": {"enum": list(range(10))}},
            "the lists at # have at most 3 items, since they must not repeat",
        ),
    ],
)
def test_what_is_not_held_to_the_letter_is_noted(schema: dict[str, Any], note: str) -> None:
    assert grammars().json_schema(schema).notes == (note,)


@pytest.mark.parametrize("schema", [properties(a={"const": 1}), {"allOf": [properties(a={}), properties(b={})]}])
def test_properties_that_are_not_named_are_closed(schema: dict[str, Any]) -> None:
    names = [set(json.loads(walk(grammars().json_schema(schema), seed) or "")) for seed in range(20)]
    assert set().union(*names) == {name for part in schema.get("allOf", [schema]) for name in part["properties"]}


def test_a_part_that_never_ends_is_left_out() -> None:
    endless = {**properties(next={"$ref": "#/$defs/endless"}), "required": ["next"]}
    grammar = check({**properties(a={"$ref": "#/$defs/endless"}), "$defs": {"endless": endless}}, walks=3)
    assert walk(grammar, 0) == "{}"


def test_digits_end() -> None:
    """A model that writes digits for ever is stopped by the grammar."""
    constraint, written = grammars().json_schema({"type": "number"}).begin(), ""
    for _ in range(100):
        allowed = np.isfinite(constraint.masked(np.zeros(257, np.float32)))
        digits = [1 + byte for byte in b"9876543210." if allowed[1 + byte]]
        if not digits:
            break
        written += chr(digits[0] - 1)
        constraint.push(digits[0])
    assert 16 <= len(written) <= 25 and allowed[0]


def test_wide_objects_are_held() -> None:
    wide = properties(**{f"p{i}": {"type": "null"} for i in range(1_000)})
    constraint = grammars().json_schema({"type": "array", "items": {"type": "array", "items": wide}}).begin()
    for byte in b'[[{"p9':
        assert np.isfinite(constraint.masked(np.zeros(257, np.float32)))[1 + byte]
        constraint.push(1 + byte)


NAMES = ["a", "b", "c"]
BOUNDS = st.sampled_from([-3, 0, 1, 7, 0.5, -2.25, 1e-4, 120, 1e-8, 2**60])
STEPS = st.sampled_from([1, 5, 0.25, 0.5, 3])
CONSTANTS = st.sampled_from([None, True, 0, 1, 1.5, "a", "é\n", [1, "a"], {"a": 1}, -7, 1e-7, ""])
PATTERNS = st.sampled_from(["^[a-z]{3}$", "[0-9]", "^a|b$", r"^\d+\.\w$", ""])
FORMATS = st.sampled_from(["date", "date-time", "uuid", "email", "uri", "ipv6", "duration", "time"])


def some(**keywords: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=keywords)


def numbers_() -> st.SearchStrategy[dict[str, Any]]:
    kinds = st.sampled_from(["integer", "number", ["integer", "null"]])
    bounds = some(minimum=BOUNDS, maximum=BOUNDS, exclusiveMinimum=BOUNDS, exclusiveMaximum=BOUNDS, multipleOf=STEPS)
    return st.builds(lambda kind, more: {"type": kind, **more}, kinds, bounds)


def texts() -> st.SearchStrategy[dict[str, Any]]:
    more = some(minLength=st.integers(0, 4), maxLength=st.integers(0, 40), pattern=PATTERNS, format=FORMATS)
    return st.builds(lambda kind, rest: {"type": kind, **rest}, st.sampled_from(["string", ["null", "string"]]), more)


LEAVES = st.one_of(
    numbers_(),
    texts(),
    st.builds(lambda v: {"const": v}, CONSTANTS),
    st.builds(lambda v: {"enum": v}, st.lists(CONSTANTS, min_size=1, max_size=4)),
    st.sampled_from([{"type": "boolean"}, {"type": "null"}, {}, True, {"$ref": "#/$defs/x"}, {"$ref": "#"}]),
)


def objects(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    names = st.lists(st.sampled_from(NAMES), unique=True)
    keywords = some(
        properties=st.dictionaries(st.sampled_from(NAMES), inner, max_size=3),
        required=names,
        additionalProperties=st.one_of(st.booleans(), inner),
        patternProperties=st.dictionaries(st.sampled_from(["^a", "z"]), inner, max_size=1),
        propertyNames=st.sampled_from([{"enum": ["a", "d"]}, {"pattern": "^[ab]"}, {"maxLength": 2}, {}]),
        minProperties=st.integers(0, 2),
        maxProperties=st.integers(0, 3),
        unevaluatedProperties=st.just(False),
        dependentRequired=st.just({"a": ["b"]}),
    )
    return st.builds(lambda rest: {"type": "object", **rest}, keywords)


def arrays(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    keywords = some(
        items=inner,
        prefixItems=st.lists(inner, min_size=1, max_size=2),
        minItems=st.integers(0, 2),
        maxItems=st.integers(0, 3),
        uniqueItems=st.booleans(),
    )
    return st.builds(lambda rest: {"type": "array", **rest}, keywords)


def composites(inner: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(inner, min_size=1, max_size=3)
    keywords = some(anyOf=several, allOf=several, oneOf=several)
    beside = st.builds(lambda one, other: {**one, **other}, objects(inner), keywords)
    return st.one_of(objects(inner), arrays(inner), keywords, beside)


SCHEMAS = st.builds(
    lambda root, x: {**root, "$defs": {"x": x}} if isinstance(root, dict) else {"$defs": {"x": x}},
    st.recursive(LEAVES, composites, max_leaves=6),
    st.recursive(LEAVES, composites, max_leaves=3),
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(schema=SCHEMAS, seed=st.integers(0, 2**16))
def test_answers_fit_the_schema_or_it_is_refused(schema: dict[str, Any], seed: int) -> None:
    try:
        grammar = grammars().json_schema(schema)
    except InputError:
        return
    validator = jsonschema.Draft202012Validator(schema)
    for step in range(3):
        text = walk(grammar, seed + step)
        if text is not None and not grammar.notes:
            validator.validate(json.loads(text))
