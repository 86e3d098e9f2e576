"""A record of training text: a document or a conversation, from a line of JSON or a row of a data set.

    {"messages": [{"role": "system" | "user" | "assistant", "content": text}, ...]}   a conversation
    {"turns": [text, ...]}                                 a conversation; the user and the assistant alternate
    {"instruction": text, "response": text}                two messages; a "context" is added to the first
    {"text": text}                                         a document

The first of these fields that is present and not null decides; other fields are ignored. This module knows no files.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merino_edge.errors import InputError
from merino_edge.strict_json import parse_bounded
from merino_edge.tokenizer import Message

FIELDS = ("messages", "turns", "instruction", "text")
ROLES = ("system", "user", "assistant")


@dataclass(frozen=True)
class Conversation:
    """The messages of a conversation. `where` names its source and line, for errors."""

    messages: tuple[Message, ...]
    where: str


Record = str | Conversation  # a piece of plain text, where END_OF_TEXT ends documents, or a conversation


def parse_line(line: str, where: str) -> Record:
    """The record of one line of JSON. Raises InputError naming `where`."""
    try:
        value = parse_bounded(line)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is not JSON ({error})", "give one JSON object a line") from None
    return parse(value, where)


def parse(value: Any, where: str) -> Record:
    """The record of an object read from JSON. Raises InputError naming `where`."""
    if not isinstance(value, dict):
        raise InputError(f"{where} is a {_type(value)}, not an object", "give one JSON object a line")
    field = next((name for name in FIELDS if value.get(name) is not None), None)
    if field is None:
        raise InputError(f"{where} has none of the fields {', '.join(FIELDS)}", "rename its fields")
    if field == "text":
        return _text(value["text"], f"{where}: text")
    if field != "instruction":
        return column(value[field], field, where)
    instruction = _text(value["instruction"], f"{where}: instruction")
    if value.get("context"):
        instruction += "\n\n" + _text(value["context"], f"{where}: context")
    response = _text(value.get("response"), f"{where}: response")
    return Conversation((_message("user", instruction), _message("assistant", response)), where)


def column(value: Any, name: str, where: str) -> Record:
    """The record of one column: a text, a list of messages or a list of turns. Raises InputError naming `where`."""
    what = f"{where}: {name}"
    if isinstance(value, str) and name not in ("messages", "turns"):
        return _text(value, what)
    if not isinstance(value, list):
        form = '["...", "..."]' if name == "turns" else '[{"role": "user", "content": "..."}, ...]'
        raise InputError(f"{what} is {_type(value)}, not a list of messages", f"write it as {form}")
    if name == "turns" or (name != "messages" and all(isinstance(turn, str) for turn in value)):
        turns = [_message(ROLES[1 + i % 2], _text(turn, f"{what}[{i}]")) for i, turn in enumerate(value)]
        return Conversation(tuple(turns), where)
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            raise InputError(f"{what}[{i}] is {_type(message)}, not an object", "give it a role and a content")
        if message.get("role") not in ROLES:
            raise InputError(f"{what}[{i}]: role is {message.get('role')!r}", f"use {', '.join(ROLES)}")
        messages.append(_message(message["role"], _text(message.get("content"), f"{what}[{i}]: content")))
    return Conversation(tuple(messages), where)


def _message(role: str, content: str) -> Message:
    return {"role": role, "content": content}


def _text(value: Any, what: str) -> str:
    if not isinstance(value, str):
        raise InputError(f"{what} is {_type(value)}, not text", "give it a text")
    try:
        value.encode()
    except UnicodeEncodeError:  # JSON can spell half a character
        raise InputError(f"{what} holds half of a character (a lone surrogate)", "repair the line") from None
    return value


def _type(value: Any) -> str:
    names: dict[type, str] = {type(None): "missing", dict: "object", list: "list", str: "text", bool: "true or false"}
    return names.get(type(value), "number")
