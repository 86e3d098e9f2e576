"""Chat templates render as in transformers: the shapes of real models, and every word that transformers adds."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import datetime
from functools import partial
from typing import Any

import jinja2
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from helpers.chat_templates import GEMMA2, OF_FAMILIES
from merino_edge import chat_template
from merino_edge.errors import ArtefactError, InputError

TOKENS = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "<pad>", "image_token": "<img>"}
USER, ANSWER, SYSTEM = (
    {"role": "user", "content": '  Is 1 < 2 & «é» "so"?\n'},
    {"role": "assistant", "content": "<think>\nhm\n</think>\n\nYes."},
    {"role": "system", "content": " Be brief. "},
)
CONVERSATIONS = ([USER], [SYSTEM, USER], [USER, ANSWER, USER], [SYSTEM, USER, ANSWER, USER, ANSWER], [ANSWER, USER])


class Refused(str):
    """The words of a refusal."""


def _text_or_words(render: Callable[[], str]) -> str:
    try:
        return render()
    except InputError as error:
        return Refused(error.message.removeprefix("the chat template refuses this conversation: "))
    except jinja2.TemplateError as error:
        return Refused(error)


@pytest.fixture(scope="module")
def theirs() -> Any:
    transformers = pytest.importorskip("transformers")  # a board has none
    backend = Backend(models.BPE({"a": 0}, []))
    tokens = dict(TOKENS)
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend, extra_special_tokens={"image_token": tokens.pop("image_token")}, **tokens
    )


@pytest.mark.parametrize("family", list(OF_FAMILIES))
def test_a_family_s_template_renders_as_in_transformers(family: str, theirs: Any) -> None:
    template, rendered = OF_FAMILIES[family], 0
    for messages in CONVERSATIONS:
        for prompt in (False, True):
            variables = {"messages": messages, "add_generation_prompt": prompt, "tools": None, "documents": None}
            options = {"chat_template": template, "tokenize": False, "add_generation_prompt": prompt}
            found = _text_or_words(partial(chat_template.render, template, {**variables, **TOKENS}))
            wanted = _text_or_words(partial(theirs.apply_chat_template, messages, **options))
            assert found == wanted
            rendered += not isinstance(found, Refused)
    assert rendered >= 4


def test_a_refusal_is_the_template_s_own_words() -> None:
    variables = {"messages": [SYSTEM, USER], "bos_token": ""}
    with pytest.raises(InputError, match="refuses this conversation: System role not supported; give"):
        chat_template.render(GEMMA2, variables)
    for words in ("a\n b\x00" * 999, "\ud800", ""):
        with pytest.raises(InputError) as refusal:
            chat_template.render("{{ raise_exception(words) }}", {"words": words})
        assert "\n" not in str(refusal.value) and len(json.dumps(str(refusal.value)).encode()) < 6000


@pytest.mark.parametrize("pattern", ["%d %B %Y", "%-d/%m/%Y %H:%M", "100 %% of %A", ""])
def test_dates_are_of_now(pattern: str) -> None:
    before = datetime.now().strftime(pattern)
    found = chat_template.render("{{ strftime_now(pattern) }}", {"pattern": pattern})
    assert found in (before, datetime.now().strftime(pattern))  # a minute may begin between them


def test_a_date_of_any_width_is_refused() -> None:
    for pattern in ("%99999999d", "%Y" * 201, "%"):
        with pytest.raises(ArtefactError, match="no plain pattern"):
            chat_template.render("{{ strftime_now(pattern) }}", {"pattern": pattern})


def test_literals_are_what_the_template_writes() -> None:
    found = chat_template.literals(
        "<a>{% if x == '<b>' %}{{ '<' + y }}{% endif %}{# <c> #}{% generation %}d{% endgeneration %}"
    )
    assert set(found.split("\0")) == {"<a>", "<b>", "<", "d"}
    with pytest.raises(ArtefactError, match="failed"):
        chat_template.literals("{% nope %}")
