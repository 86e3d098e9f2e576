"""Formats of tool calls: what a grammar lets through is what the parser finds, however the text is cut."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import tokenizers

from helpers.chat_templates import OF_FAMILIES
from merino_edge.runtime import call_format
from merino_edge.runtime.call_format import GRANITE, HERMES, LFM2, LLAMA, MISTRAL, CallFormat, Function
from merino_edge.runtime.call_parser import CallParser
from merino_edge.runtime.grammar import Grammars
from merino_edge.tokenizer import ChatFormat, Tokenizer

FORMATS = {"Hermes": HERMES, "Llama": LLAMA, "Mistral": MISTRAL, "Granite": GRANITE, "LFM2": LFM2}
CITY = {
    "type": "object",
    "properties": {"city": {"type": "string"}},
    "required": ["city"],
    "additionalProperties": False,
}
EMPTY = {"type": "object", "properties": {}, "additionalProperties": False}
FUNCTIONS = [Function("weather", CITY), Function("time", EMPTY)]
ODD = {"city": 'a "}{]" \\ <tool_call>'}
CALLS = [("weather", ODD), ("time", {}), ("weather", {"city": "Köln"})]


def parsed(form: CallFormat, text: str, size: int) -> CallParser:
    """A parser that has got a text in pieces of a size."""
    parser = CallParser(form)
    parts = [part for at in range(0, len(text), size) for part in parser.push(text[at : at + size])]
    parts += parser.finish()
    assert "".join(part.text for part in parts if part.index is None) == parser.content
    for i, call in enumerate(parser.calls):
        mine = [part.text for part in parts if part.index == i]
        assert mine[0] == "" and "".join(mine) == call.arguments
    return parser


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("before", ["", "I look. < [T\n"])
def test_calls_are_found_however_the_text_is_cut(name: str, before: str) -> None:
    form = FORMATS[name]
    if before and not form.trigger:
        before = ""
    calls = CALLS if form.between else CALLS[:1]
    text = before + form.text(calls)
    for size in (1, 2, 7, len(text)):
        parser = parsed(form, text, size)
        assert parser.content == before.rstrip()
        assert [(call.name, json.loads(call.arguments)) for call in parser.calls] == calls
        assert not parser.is_cut
    assert len({call.id for call in parser.calls}) == len(calls)


@pytest.mark.parametrize("name", FORMATS)
def test_a_cut_call_is_known_as_such(name: str) -> None:
    form = FORMATS[name]
    text = form.text(CALLS[:1])
    whole = parsed(form, text, 3)
    for length in range(len(form.trigger) or 1, len(text)):
        parser = parsed(form, text[:length], 3)
        assert parser.is_cut, text[:length]
        assert whole.calls[0].arguments.startswith(parser.calls[0].arguments if parser.calls else "")


@pytest.mark.parametrize("text", ["plain", "", " <tool_call", "a [TOOL_CALLS] b", "<tool_call>no", "{", "x {}\n\n"])
@pytest.mark.parametrize("form", FORMATS.values(), ids=FORMATS)
def test_a_text_that_calls_nothing_stays_as_it_is(form: CallFormat, text: str) -> None:
    if text == "{" and not form.trigger:
        return  # begins a call
    assert parsed(form, text, 1).content == text and not parsed(form, text, 1).calls


@pytest.mark.parametrize(
    ("family", "form"),
    [("Qwen2.5", HERMES), ("SmolLM2", HERMES), ("Gemma 2", HERMES), ("Mistral", MISTRAL), ("Llama 3.2", LLAMA)],
)
def test_a_templates_own_words_say_its_format(tokenizer: Tokenizer, family: str, form: CallFormat) -> None:
    template = OF_FAMILIES[family]
    assert call_format.format_of(tokenizer.with_chat(ChatFormat(chat_template=template))) == form


# --- grammars ---


@pytest.fixture(scope="module")
def with_words(tokenizer_json: str) -> Tokenizer:
    """A tokenizer that has the words of Mistral and LFM2 as tokens, but not Hermes'."""
    backend = tokenizers.Tokenizer.from_str(tokenizer_json)
    words = ["[TOOL_CALLS]", "<|tool_call_start|>", "<|tool_call_end|>", "<|tool_call|>"]
    backend.add_special_tokens([tokenizers.AddedToken(word, special=True, normalized=False) for word in words])
    return Tokenizer(backend, ChatFormat(eos_token_ids=(2,)))


@pytest.fixture(scope="module")
def grammars(with_words: Tokenizer) -> Grammars:
    return Grammars(with_words, with_words.vocab_size)


def follows(tokenizer: Tokenizer, grammars: Grammars, grammar: str, text: str) -> bool:
    """Whether a whole answer follows the grammar, token by token."""
    import numpy as np

    constraint, logits = grammars.lark(grammar).begin(), np.zeros(tokenizer.vocab_size, np.float32)
    for token in tokenizer.backend.encode(text, add_special_tokens=False).ids:
        if constraint.masked(logits)[token] != 0:
            return False
        if constraint.push(token):
            return True
    return bool(constraint.masked(logits)[2] == 0)  # the end


@pytest.mark.parametrize("name", FORMATS)
def test_an_answer_is_a_text_or_calls_of_their_schemas(name: str, with_words: Tokenizer, grammars: Grammars) -> None:
    form = FORMATS[name]
    auto, forced, single = (
        call_format.grammar(form, FUNCTIONS, with_words, forced=forced, parallel=parallel)
        for forced, parallel in ((False, True), (True, True), (True, False))
    )
    one, two = form.text([("weather", {"city": "x"})]), form.text([("time", {}), ("time", {})])
    wrong = [form.text([("weather", {"town": "x"})]), form.text([("other", {})]), form.text([("time", {"x": 1})])]
    assert follows(with_words, grammars, auto, "Good day.") and not follows(with_words, grammars, forced, "Good day.")
    for grammar in (auto, forced, single):
        assert follows(with_words, grammars, grammar, one)
        assert not any(follows(with_words, grammars, grammar, text) for text in wrong)
    if form.trigger:
        assert follows(with_words, grammars, auto, "Well. " + one)
    if form.between:
        assert follows(with_words, grammars, auto, two) and follows(with_words, grammars, forced, two)


def test_an_answer_that_calls_nothing_follows_its_own_schema(with_words: Tokenizer, grammars: Grammars) -> None:
    grammar = call_format.grammar(HERMES, FUNCTIONS, with_words, forced=False, parallel=True, answer=CITY)
    assert follows(with_words, grammars, grammar, '{"city": "x"}')
    assert follows(with_words, grammars, grammar, HERMES.text([("time", {})]))
    assert not follows(with_words, grammars, grammar, "Good day.")


def test_references_within_a_functions_schema_hold(with_words: Tokenizer, grammars: Grammars) -> None:
    schema = {**EMPTY, "properties": {"n": {"$ref": "#/$defs/n"}}, "$defs": {"n": {"enum": [1, 2]}}, "required": ["n"]}
    grammar = call_format.grammar(HERMES, [Function("f", schema)], with_words, forced=True, parallel=False)
    assert follows(with_words, grammars, grammar, HERMES.text([("f", {"n": 2})]))
    assert not follows(with_words, grammars, grammar, HERMES.text([("f", {"n": 3})]))


def test_every_format_has_words_of_its_own() -> None:
    assert len({(form.begin, form.between) for form in FORMATS.values()}) == len(FORMATS)
    assert replace(MISTRAL, begin="[TOOL_CALLS][").trigger == MISTRAL.trigger == "[TOOL_CALLS]"
