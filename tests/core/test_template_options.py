"""Options of a chat template render as in transformers, and what a template does not read is refused."""

from __future__ import annotations

from typing import Any

import pytest
import transformers

from helpers.chat_templates import OF_FAMILIES, SMOLLM2
from merino_edge import template_options
from merino_edge.data.bpe import train_tokenizer
from merino_edge.errors import InputError
from merino_edge.tokenizer import ChatFormat, Message, Tokenizer

MESSAGES: list[Message] = [{"role": "user", "content": "What is two and two?"}]
BACKEND = train_tokenizer(iter(["What is two and two?"]), 300)
THINKING = {name: text for name, text in OF_FAMILIES.items() if "enable_thinking" in template_options.names(text)}


def _tokenizer(template: str | None) -> Tokenizer:
    return Tokenizer(BACKEND, ChatFormat((0,), None, template))


def test_the_templates_of_qwen3_and_smollm3_are_among_them() -> None:
    assert any("Reasoning Mode" in text for text in THINKING.values()) and len(THINKING) >= 2


@pytest.mark.parametrize("name", THINKING)
def test_they_render_as_in_transformers(name: str) -> None:
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_object=BACKEND, chat_template=THINKING[name])
    ours, texts = _tokenizer(THINKING[name]), set()
    for options in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
        expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=True, **options)
        assert ours.apply_template(MESSAGES, options=options) == expected
        assert ours.encode_chat(MESSAGES, options=options) == ours.encode(expected)
        texts.add(expected)
    assert len(texts) == 2  # the default is one of them


@pytest.mark.parametrize(
    ("template", "options", "says"),
    [
        (next(iter(THINKING.values())), {"enable_thinkin": False}, "'enable_thinkin'; it reads .*enable_thinking"),
        (SMOLLM2, {"enable_thinking": False}, "does not read 'enable_thinking'; it has no options"),
        (SMOLLM2, {"messages": []}, "does not read 'messages'"),
        (None, {"enable_thinking": False}, "needs a chat template"),
        ("{{ a }}{{ messages[0].content }}", {"a": ["<|endoftext|>"]}, "control token"),
    ],
)
def test_others_are_refused(template: str | None, options: dict[str, Any], says: str) -> None:
    with pytest.raises(InputError, match=says):
        _tokenizer(template).encode_chat(MESSAGES, options=options)


@pytest.mark.parametrize("text", ["", "false", "[1]", "{", '{"a": NaN}', "{'a': 1}"])
def test_what_is_no_object_is_refused(text: str) -> None:
    with pytest.raises(InputError, match="--chat-template-kwargs is no JSON object"):
        template_options.parse(text, "--chat-template-kwargs")
