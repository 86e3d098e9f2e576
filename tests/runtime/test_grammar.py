"""A constrained answer follows its grammar, whatever the logits; other answers do not change."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.small_tokenizers import sentencepiece
from merino_edge.cli.main import main
from merino_edge.errors import InputError
from merino_edge.runtime.detokenizer import StreamingDetokenizer
from merino_edge.runtime.engine import Engine
from merino_edge.runtime.generation import Generation, generate
from merino_edge.runtime.grammar import ANY_OBJECT, Grammar, Grammars
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.session import Session
from merino_edge.tokenizer import ChatFormat, Tokenizer

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

BACKEND = sentencepiece()
END = int(BACKEND.token_to_id("</s>") or 0)
SENTENCEPIECE = Tokenizer(BACKEND, ChatFormat((END,)))


@cache
def _spaced() -> Grammars:
    return Grammars(SENTENCEPIECE, SENTENCEPIECE.vocab_size)


@pytest.fixture(scope="module")
def grammars(tokenizer: Tokenizer, engine: Engine) -> Grammars:
    return Grammars(tokenizer, engine.vocab_size)


def answer(engine: Engine, tokenizer: Tokenizer, seed: int, grammar: Grammar | None, count: int = 200) -> Generation:
    hot = Sampling(temperature=2, top_k=0, top_p=1, seed=seed)
    generation = generate(Session(engine), tokenizer, tokenizer.encode("The fox"), hot, count, grammar=grammar)
    for _ in generation:
        pass
    return generation


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pattern=st.sampled_from([r"(yes|no)", r"[a-z]{3,9}-[0-9]{2}", r"(ab|c)+d"]))
def test_a_regular_expression_is_matched_as_a_whole(
    engine: Engine, tokenizer: Tokenizer, grammars: Grammars, seed: int, pattern: str
) -> None:
    generation = answer(engine, tokenizer, seed, grammars.regex(pattern))
    assert generation.finish_reason == "stop" or pattern.endswith("+d")  # which may be longer than max_tokens
    if generation.finish_reason == "stop":
        assert re.fullmatch(pattern, generation.text)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1))
def test_json_follows_its_schema(engine: Engine, tokenizer: Tokenizer, grammars: Grammars, seed: int) -> None:
    generation = answer(engine, tokenizer, seed, grammars.json_schema(PERSON))
    assert generation.finish_reason == "stop"
    value = json.loads(generation.text)
    assert list(value) == ["name", "age", "pets"] and len(value["name"]) <= 12
    assert 0 <= value["age"] <= 150 and set(value["pets"]) <= {"cat", "dog"} and len(value["pets"]) <= 2
    assert generation.text == json.dumps(value, ensure_ascii=False) or "\\" in generation.text  # no other white space


def test_a_grammar_serves_many_answers_and_leaves_others_alone(
    engine: Engine, tokenizer: Tokenizer, grammars: Grammars
) -> None:
    free, form = answer(engine, tokenizer, 5, None, 20).text, grammars.regex("[ab]{4}")
    first = answer(engine, tokenizer, 5, form).text
    assert re.fullmatch("[ab]{4}", first)
    assert answer(engine, tokenizer, 5, form).text == first
    assert answer(engine, tokenizer, 5, None, 20).text == free


def test_a_grammar_that_allows_all_changes_nothing(engine: Engine, tokenizer: Tokenizer, grammars: Grammars) -> None:
    everything = grammars.regex(r"(?s:.*)")
    for seed in range(5):
        free = answer(engine, tokenizer, seed, None, 30)
        if "\ufffd" not in free.text:  # invalid UTF-8 matches no grammar
            assert answer(engine, tokenizer, seed, everything, 30).tokens == free.tokens


@pytest.mark.parametrize(
    ("kind", "form", "pattern"),
    [
        ("regex", "(((", "this regular expression cannot be used"),
        ("regex", "a" * 70_000, "more than 65536 characters"),
        ("json_schema", "{", "the schema is no JSON object"),
        ("json_schema", "[1]", "the schema is no JSON object"),
        ("json_schema", {"type": "wings"}, "Invalid type: wings"),
        ("json_schema", {"not": {}}, "'not' at # cannot be held"),
        ("json_schema", {"$ref": "http://example.com/x"}, "does not fetch"),
        ("json_schema", {"$ref": "file:///etc/passwd"}, "does not fetch"),
    ],
)
def test_an_invalid_form_is_refused_in_one_line(grammars: Grammars, kind: str, form: object, pattern: str) -> None:
    with pytest.raises(InputError, match=pattern) as refusal:
        getattr(grammars, kind)(form)
    assert "\n" not in str(refusal.value)


def test_any_object_is_an_object(engine: Engine, tokenizer: Tokenizer, grammars: Grammars) -> None:
    generations = [answer(engine, tokenizer, seed, grammars.json_schema(ANY_OBJECT)) for seed in range(8)]
    whole = [m.text for m in generations if m.finish_reason == "stop"]
    assert whole and all(isinstance(json.loads(text), dict) for text in whole)


def test_the_verb_takes_a_schema_from_a_file_or_the_line(
    bundle_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "person.json").write_text(json.dumps(PERSON), encoding="utf-8-sig")  # as some editors do
    for schema in (str(tmp_path / "person.json"), json.dumps(PERSON)):
        options = ["--prompt", "hi", "--threads", "1", "--temperature", "2", "--json-schema", schema]
        monkeypatch.setattr("sys.argv", ["merino-edge", "generate", str(bundle_path), *options])
        with pytest.raises(SystemExit) as end:
            main()
        assert not end.value.code
        assert set(json.loads(capsys.readouterr().out)) == set(PERSON["properties"])  # type: ignore[call-overload]


def test_the_verb_notes_what_a_schema_is_not_held_to(
    bundle_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = [
        "--prompt",
        "hi",
        "--threads",
        "1",
        "--json-schema",
        '{"type": "string", "format": "[b]", "maxLength": 2}',
    ]
    monkeypatch.setattr("sys.argv", ["merino-edge", "generate", str(bundle_path), *options])
    with pytest.raises(SystemExit) as end:
        main()
    assert not end.value.code
    assert "note: the format '[b]' at # is not held\n" in capsys.readouterr().err


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), pattern=st.sampled_from([" the", " (the|t)(he)?", "the end", "  <th"]))
def test_a_first_space_counts_with_sentencepiece(seed: int, pattern: str) -> None:
    """The masks allow what the pattern says, and the text has it, first space and all."""
    grammar, rng, prompt = _spaced().regex(pattern), np.random.default_rng(seed), SENTENCEPIECE.encode("is")
    constraint, text = grammar.begin(), StreamingDetokenizer(SENTENCEPIECE, (), prompt)
    pieces = []
    for _ in range(40):
        allowed = np.flatnonzero(np.isfinite(constraint.masked(np.zeros(SENTENCEPIECE.vocab_size, np.float32))))
        token = int(rng.choice(allowed))
        if token == END:
            break
        pieces.append(text.push(token))
        if constraint.push(token):
            break
    assert re.fullmatch(pattern, "".join([*pieces, text.finish()]))
