"""Whatever the model would say, a constrained answer has its form; and no other answer is touched."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge.cli.main import main
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.grammar import ANY_OBJECT, Grammar, Grammars
from merino_edge.runtime.sampling import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import Tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "pets": {"type": "array", "items": {"enum": ["cat", "dog"]}, "maxItems": 2},
    },
    "required": ["name", "age", "pets"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, engine: Engine) -> Grammars:
    return Grammars(tokenizer, engine.vocab_size)


def answer(engine: Engine, tokenizer: Tokenizer, seed: int, grammar: Grammar | None, count: int = 200) -> Generation:
    hot = Sampling(temperature=2, top_k=0, top_p=1, seed=seed)
    made = generate(Session(engine), tokenizer, tokenizer.encode("The fox"), hot, count, grammar=grammar)
    for _ in made:
        pass
    return made


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pattern=st.sampled_from([r"(yes|no)", r"[a-z]{3,9}-[0-9]{2}", r"(ab|c)+d"]))
def test_a_regular_expression_is_matched_as_a_whole(
    engine: Engine, tokenizer: Tokenizer, grammars: Grammars, seed: int, pattern: str
) -> None:
    made = answer(engine, tokenizer, seed, grammars.regex(pattern))
    assert made.finish_reason == "stop" or pattern.endswith("+d")  # which may go on for longer than it is let
    if made.finish_reason == "stop":
        assert re.fullmatch(pattern, made.text)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_json_is_of_its_schema(engine: Engine, tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    made = answer(engine, tokenizer, seed, grammars.json_schema(PERSON))
    assert made.finish_reason == "stop"
    value = json.loads(made.text)
    assert list(value) == ["name", "age", "pets"] and len(value["name"]) <= 12
    assert 0 <= value["age"] <= 150 and set(value["pets"]) <= {"cat", "dog"} and len(value["pets"]) <= 2
    assert made.text == json.dumps(value, ensure_ascii=False) or "\\" in made.text  # no white space but one's own


def test_a_grammar_serves_many_answers_and_leaves_others_alone(
    engine: Engine, tokenizer: Tokenizer, grammars: Grammars
) -> None:
    free, form = answer(engine, tokenizer, 5, None, 20).text, grammars.regex("[ab]{4}")
    first = answer(engine, tokenizer, 5, form).text
    assert re.fullmatch("[ab]{4}", first)
    assert answer(engine, tokenizer, 5, form).text == first
    assert answer(engine, tokenizer, 5, None, 20).text == free


def test_a_form_that_allows_all_changes_nothing(engine: Engine, tokenizer: Tokenizer, grammars: Grammars) -> None:
    everything = grammars.regex(r"(?s:.*)")
    for seed in range(5):
        free = answer(engine, tokenizer, seed, None, 30)
        if "\ufffd" not in free.text:  # bytes that are no text have no form
            assert answer(engine, tokenizer, seed, everything, 30).tokens == free.tokens


@pytest.mark.parametrize(
    ("kind", "form", "said"),
    [
        ("regex", "(((", "this regular expression cannot be used"),
        ("regex", "a" * 70_000, "more than 65536 characters"),
        ("json_schema", "{", "the schema is no JSON object"),
        ("json_schema", "[1]", "the schema is no JSON object"),
        ("json_schema", {"type": "wings"}, "Invalid type: wings"),
        ("json_schema", {"$ref": "http://example.com/x"}, "does not fetch"),
        ("json_schema", {"$ref": "file:///etc/passwd"}, "does not fetch"),
    ],
)
def test_a_form_that_cannot_be_is_refused_in_one_line(grammars: Grammars, kind: str, form: object, said: str) -> None:
    with pytest.raises(InputError, match=said) as refusal:
        getattr(grammars, kind)(form)
    assert "\n" not in str(refusal.value)


def test_any_object_is_one(engine: Engine, tokenizer: Tokenizer, grammars: Grammars) -> None:
    made = [answer(engine, tokenizer, seed, grammars.json_schema(ANY_OBJECT)) for seed in range(8)]
    whole = [m.text for m in made if m.finish_reason == "stop"]
    assert whole and all(isinstance(json.loads(text), dict) for text in whole)


def test_the_verb_takes_a_schema_from_a_file_or_the_line(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "person.json").write_text(json.dumps(PERSON))
    for schema in (str(tmp_path / "person.json"), json.dumps(PERSON)):
        options = ["--prompt", "hi", "--threads", "1", "--temperature", "2", "--json-schema", schema]
        monkeypatch.setattr("sys.argv", ["merino-edge", "generate", str(bundle_path), *options])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        assert set(json.loads(capsys.readouterr().out)) == set(PERSON["properties"])  # type: ignore[call-overload]
