"""The texts of a conversation: of its messages, their tool calls and the tools, wherever they stand in them.

Control tokens are looked for in all of them (merino_edge.control_tokens): a tool's result and its arguments are written
by others, just as a message is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from merino_edge.errors import InputError

if TYPE_CHECKING:
    from merino_edge.control_tokens import ControlTokens

OWN = ("role", "content")  # of a message; all else in it is looked through


@dataclass(frozen=True)
class Conversation:
    """What a prompt is made of. `begun` is the beginning of the answer."""

    messages: Sequence[dict[str, Any]]
    tools: Sequence[Mapping[str, Any]] = ()
    begun: str = ""

    def marked(self, control: ControlTokens, encodings: Any) -> tuple[Conversation, str]:
        """The conversation with markers around control tokens, and the markers; see `ControlTokens.marked`.

        Raises InputError for a text with lone surrogates.
        """
        texts = [{"role": message["role"], "content": message["content"]} for message in self.messages]
        texts.append({"role": "assistant", "content": self.begun})
        inner = [_without_own(message) for message in self.messages]
        texts += [{"role": "tool", "content": text} for text in _texts([inner, list(self.tools)])]
        for text in texts:
            utf8_bytes(text["content"])
        found, markers = control.marked(texts, encodings)
        if not markers:
            return self, ""
        count = len(self.messages)
        following = iter([text["content"] for text in found[count + 1 :]])
        inner, tools = _replaced([inner, list(self.tools)], following)
        messages = [
            {"role": text["role"], "content": text["content"], **rest}
            for text, rest in zip(found[:count], inner, strict=True)
        ]
        return Conversation(messages, tools, found[count]["content"]), markers


def _without_own(message: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in message.items() if name not in OWN}


def utf8_bytes(text: str) -> int:
    """The bytes of a text as UTF-8. Raises InputError for lone surrogates, as Python spells other bytes."""
    try:
        return len(text.encode())
    except UnicodeEncodeError:
        raise InputError("the text is not valid UTF-8", "convert it, for example with iconv") from None


def _texts(value: Any) -> Iterator[str]:
    """All texts in a value of JSON, its names too."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        for name, field in value.items():
            yield name
            yield from _texts(field)
    elif isinstance(value, (list, tuple)):
        for element in value:
            yield from _texts(element)


def _replaced(value: Any, texts: Iterator[str]) -> Any:
    """The value with other texts, in the order of `_texts`."""
    if isinstance(value, str):
        return next(texts)
    if isinstance(value, Mapping):
        return {next(texts): _replaced(field, texts) for field in value.values()}
    if isinstance(value, (list, tuple)):
        return [_replaced(element, texts) for element in value]
    return value
