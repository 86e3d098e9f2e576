"""What is odd about a chat format is said at the import, and what would fail in a chat fails there."""

from __future__ import annotations

import pytest

from helpers.chat_templates import GEMMA2, OF_FAMILIES, SMOLLM2
from merino_edge.convert.chat_check import check_chat
from merino_edge.data.bpe import train_tokenizer
from merino_edge.errors import UnsupportedError
from merino_edge.tokenizer import ChatFormat, Tokenizer

BACKEND = train_tokenizer(iter(["What is two and two?"]), 260)


def _notes(template: str | None, ends: tuple[int, ...] = (0,)) -> list[str]:
    return check_chat(Tokenizer(BACKEND, ChatFormat(ends, None, template)), "here")


def test_sound_formats_need_no_word() -> None:
    without_bos = {"Llama 2", "Gemma 2", "Mistral", "oddities"}  # they add undefined tokens to texts, or refuse systems
    for name in OF_FAMILIES.keys() - without_bos:
        assert _notes(OF_FAMILIES[name]) == [], name
    assert _notes(None) == []


def test_what_is_odd_is_said() -> None:
    assert _notes(SMOLLM2, ()) == ["no file names an end token: answers go on to --max-tokens or a --stop TEXT"]
    assert _notes("{{ messages[-1].content }}") == ["the chat template leaves system messages out"]
    refusal = "the chat template refuses system messages: System role not supported"
    assert _notes(GEMMA2.replace("{{ bos_token }}", "")) == [refusal]
    of_system = "{{ messages[0].content }}{% if messages[0].role == 'system' %}{{ 1 + none }}{% endif %}"
    assert _notes(of_system)[0].startswith("with a system message the chat template failed (unsupported operand")
    assert _notes("{% for m in messages %}{{ m.content | upper }}{{ m.content }}{% endfor %}") == []
    assert _notes("{% for m in messages %}{{ m | tojson }}{{ m.content | upper }}{% endfor %}") == []


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        ("{% nope %}", "here: the chat template failed .Encountered unknown tag 'nope'"),
        ("{{ messages[0].content }}{{ raise_exception('never') }}", "refuses this conversation: never; give another"),
        ("{% for c in messages[0].content %}{{ c.text }}{% endfor %}", "leaves the question out; give another: --chat"),
        ("{{ messages[0].content }}{% if messages | length > 1 %}{{ f() }}{% endif %}", "'f' is undefined"),
        ("{% for a in range(999) %}{% for b in range(999) %}{% endfor %}{% endfor %}", "more than 500000 steps"),
    ],
)
def test_a_template_that_fails_is_refused(template: str, reason: str) -> None:
    with pytest.raises(UnsupportedError, match=reason):
        _notes(template)
