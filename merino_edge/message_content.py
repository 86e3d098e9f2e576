"""The messages of a conversation as programs have them, made into plain text: a content may be None, or parts.

A part is {"type": "text", "text": TEXT}, as in OpenAI's API. Templates of text models know strings only: they would
write None as "None", and parts as a list of Python's.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from merino_edge.errors import InputError

HINT = 'write it as {"role": "user", "content": TEXT}'


def plain(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with their contents as texts; other fields stay. Raises InputError that counts messages from 0."""
    made = []
    for number, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise InputError(f"message {number} has no role", HINT)
        made.append({**message, "content": text_of(message.get("content"), f"message {number}")})
    return made


def text_of(content: Any, where: str = "the message") -> str:
    """The text of a content: a text, None (which is empty), or parts of text, which follow one another.

    Raises InputError for others, such as images.
    """
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, Sequence) or isinstance(content, bytes):
        raise InputError(f"the content of {where} is {type(content).__name__}, no text", HINT)
    texts = []
    for part in content:
        is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
        if not is_text or not isinstance(part.get("text"), str):
            kind = part.get("type") if isinstance(part, Mapping) else type(part).__name__
            raise InputError(
                f"{where} has a part of type {kind!r}, the model reads text only", "give parts of type text"
            )
        texts.append(part["text"])
    return "".join(texts)
