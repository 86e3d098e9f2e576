"""What a message spells out never becomes a control token; every other prompt keeps its tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend

from helpers.small_tokenizers import KINDS, SPECIAL
from merino_edge.errors import InputError
from merino_edge.tokenizer import ChatFormat, Message, Tokenizer

CHATML = (
    "{% for m in messages %}{% if m.role == 'assistant' and '</think>' in m.content %}"
    "{% set text = m.content.split('</think>')[-1] %}{% else %}{% set text = m.content %}{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ text | trim }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n\n</think>\n{% endif %}"
)
WORDS = [*SPECIAL, "<think>", "</think>", "<tool>", "Hello", " the", "\n", " ", "<|im_", "end|>", "fox", "\ufdd0", "ů"]


@functools.cache
def _both(name: str) -> tuple[Tokenizer, Any]:
    """Ours, and that of transformers."""
    transformers = pytest.importorskip("transformers")  # a board has none
    backend = KINDS[name]()
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=Backend.from_str(backend.to_str()))
    theirs.chat_template = CHATML
    return Tokenizer(backend, ChatFormat((), None, CHATML)), theirs


def _their_ids(theirs: Any, messages: list[Message], *, sanitize: bool) -> list[int]:
    options = {"add_generation_prompt": True, "return_dict": False, "sanitize_control_tokens": sanitize}
    return list(theirs.apply_chat_template(messages, **options))


contents = st.lists(st.sampled_from(WORDS), max_size=8).map("".join)


@pytest.mark.parametrize("name", ["byte level", "sentencepiece"])
@settings(max_examples=30, deadline=None)
@given(system=contents, user=contents)
def test_messages_are_encoded_as_transformers_does_with_its_option(name: str, system: str, user: str) -> None:
    ours, theirs = _both(name)
    messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    assert ours.encode_chat(messages) == _their_ids(theirs, messages, sanitize=True)
    assert ours.encode_chat(messages, control_tokens=True) == _their_ids(theirs, messages, sanitize=False)


@pytest.mark.parametrize("name", list(KINDS))
@settings(max_examples=30, deadline=None)
@given(user=contents)
def test_no_message_adds_a_control_token(name: str, user: str) -> None:
    ours, _ = _both(name)
    control = {ours.backend.token_to_id(token) for token in (*SPECIAL[1:], "<think>", "</think>")}

    def count(text: str) -> list[int]:
        return [i for i in ours.encode_chat([{"role": "user", "content": text}]) if i in control]

    assert count(user) == count("fox")


def test_it_is_the_text_that_the_user_wrote() -> None:
    ours, _ = _both("byte level")
    ids = ours.encode_chat([{"role": "user", "content": "say <|im_end|> and <think> now"}])
    assert "say <|im_end|> and <think> now<|im_end|>" in ours.decode(ids, skip_special_tokens=False)


def test_an_answer_may_hold_what_the_template_writes_in_answers() -> None:
    """The model wrote it as one token, and the cache holds that. A special token in it is text."""
    ours, _ = _both("byte level")
    think, special = (ours.backend.token_to_id(token) for token in ("<think>", "<|endoftext|>"))
    question: Message = {"role": "user", "content": "fox"}
    ids = ours.encode_chat([question, {"role": "assistant", "content": "<think>the fox<|endoftext|>"}, question])
    assert ids.count(think) == 2 and special not in ids


def test_a_text_of_every_marker_is_refused() -> None:
    ours, _ = _both("byte level")
    every = "".join(map(chr, range(0xFDD0, 0xFDF0)))
    ours.encode_chat([{"role": "user", "content": every}])  # nothing to mark
    with pytest.raises(InputError, match="every noncharacter"):
        ours.encode_chat([{"role": "user", "content": every + "<|im_end|>"}])


def test_a_template_that_writes_json_keeps_the_markers_apart() -> None:
    ours, _ = _both("byte level")
    for options in ("", "ensure_ascii=true"):
        chat = ChatFormat((), None, "<|im_start|>{{ messages[0].content | tojson(" + options + ") }}<|im_end|>")
        ids = ours.with_chat(chat).encode_chat([{"role": "user", "content": "a <|im_end|> b"}])
        assert ours.decode(ids, skip_special_tokens=False) == '<|im_start|>"a <|im_end|> b"<|im_end|>'
        assert ids.count(ours.backend.token_to_id("<|im_end|>")) == 1
