"""Tools in a prompt: by the chat template where it knows them, and else in plain words.

Whether a template knows tools is tried, since many take a variable and leave it out. A conversation with a tool, a call
and a result is rendered, and what of it appears in the text is known. Tools that are not known are described in the
system message. Calls and results of a history then become texts of the assistant and of the user.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merino_edge.errors import MerinoError
from merino_edge.runtime.call_format import CallFormat
from merino_edge.tokenizer import Message, Tokenizer

Tool = Mapping[str, Any]  # {"type": "function", "function": {"name", "description", "parameters"}}

PROBE_TOOL = {
    "type": "function",
    "function": {
        "name": "probed_name",
        "description": "probed description",
        "parameters": {"type": "object", "properties": {"key": {"type": "string"}}},
    },
}
PROBE: list[Message] = [
    {"role": "user", "content": "Hello."},
    {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {
                "id": "abcdefgh1",
                "type": "function",
                "function": {"name": "probed_name", "arguments": {"key": "probed_value"}},
            }
        ],
    },
    {"role": "tool", "content": "probed_result", "tool_call_id": "abcdefgh1"},
]
BEFORE = """# Tools

You may call one or more functions to assist with the user query.

You are provided with function signatures within <tools></tools> XML tags:
<tools>"""
BEHIND = """
</tools>

For each function call, return a json object with function name and arguments like this:
"""


@dataclass(frozen=True)
class Known:
    """What a template knows: `tools` that may be called, and a `history` of calls and results."""

    tools: bool
    history: bool


@functools.lru_cache(maxsize=4)
def known(tokenizer: Tokenizer) -> Known:
    """What the tokenizer's chat template knows of tools."""

    def rendered(messages: Sequence[Message]) -> str:
        try:
            return tokenizer.apply_template(messages, tools=[PROBE_TOOL])
        except MerinoError:
            return ""

    history = rendered(PROBE)
    shown = all(word in history for word in ("probed_value", "probed_result"))
    return Known("probed description" in rendered(PROBE[:1]), shown)


def prepared(
    tokenizer: Tokenizer, messages: Sequence[Message], tools: Sequence[Tool], form: CallFormat
) -> tuple[list[Message], Sequence[Tool]]:
    """The messages and the tools for the template, which leaves nothing of them out."""
    knows, texts = known(tokenizer), list(messages)
    if not knows.history:
        texts = _plain(texts, form)
    elif form.short_ids:
        texts = [_with_short_ids(message) for message in texts]
    if knows.tools or not tools:
        return texts, tools
    return _described(tokenizer, texts, description(tools, form)), ()


def description(tools: Sequence[Tool], form: CallFormat) -> str:
    """The tools in plain words, after Qwen's template."""
    lines = [BEFORE, *(json.dumps(tool, ensure_ascii=False) for tool in tools)]
    call = f'{{"name": <function-name>, "{form.arguments}": <args-json-object>}}'
    return "\n".join(lines) + BEHIND + form.begin + call + form.end


def _described(tokenizer: Tokenizer, messages: list[Message], words: str) -> list[Message]:
    """The words in the system message, or in the first of the user where the template takes no system message."""
    first = messages[0]
    if first["role"] == "system":
        changed = [{**first, "content": f"{first['content']}\n\n{words}".lstrip()}, *messages[1:]]
    else:
        changed = [{"role": "system", "content": words}, *messages]
    try:
        if not tokenizer.drops_system(changed):
            return changed
    except MerinoError:  # it refuses one, or something else, which whoever renders the messages will hear of
        pass
    at = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
    if at is None:
        return changed
    asked = {**messages[at], "content": f"{words}\n\n{messages[at]['content']}"}
    return [*messages[:at], asked, *messages[at + 1 :]]


def _plain(messages: Sequence[Message], form: CallFormat) -> list[Message]:
    """Calls and results as texts: results that follow each other, and a question behind them, are one of the user."""
    plain: list[Message] = []
    follows = False  # whether the last message is the result of a tool
    for message in messages:
        content, is_result = message["content"], message["role"] == "tool"
        if is_result:
            content = f"<tool_response>\n{content}\n</tool_response>"
        elif calls := message.get("tool_calls"):
            text = form.text([(call["function"]["name"], call["function"]["arguments"]) for call in calls])
            content = f"{content}\n{text}" if content else text
        if follows and (is_result or message["role"] == "user"):
            plain[-1] = {"role": "user", "content": f"{plain[-1]['content']}\n{content}"}
        else:
            plain.append({"role": "user" if is_result else message["role"], "content": content})
        follows = is_result or (follows and message["role"] == "user")
    return plain


def _with_short_ids(message: Message) -> Message:
    """Ids of nine letters and digits, which Mistral's templates insist on; the same for the same id."""

    def short(whole: str) -> str:
        return hashlib.sha256(whole.encode(errors="replace")).hexdigest()[:9]

    changed = dict(message)
    if "tool_calls" in message:
        changed["tool_calls"] = [{**call, "id": short(call["id"])} for call in message["tool_calls"]]
    if "tool_call_id" in message:
        changed["tool_call_id"] = short(message["tool_call_id"])
    return changed
