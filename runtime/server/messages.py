"""Messages of a conversation as clients send them, with tool calls and their results.

Source: https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from pydantic import model_validator

from merino_edge import artefact
from merino_edge.errors import ArtefactError
from merino_edge.runtime.server.strict import FieldError, Strict
from merino_edge.tokenizer import Message


class TextPart(Strict):
    type: Literal["text"]
    text: str


class CalledFunction(Strict):
    name: str
    arguments: str = ""


class ToolCall(Strict):
    id: str = ""
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None  # of a streamed call that was put together


class ChatMessage(Strict):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[TextPart]
    name: str | None = None  # no template here uses it
    tool_calls: list[ToolCall] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None  # what other servers call an answer's thoughts; templates leave it out

    @model_validator(mode="before")
    @classmethod
    def _allow_a_silent_assistant(cls, value: Any) -> Any:
        silent = isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None
        return {**value, "content": ""} if silent else value

    @property
    def text(self) -> str:
        """The content, its parts joined."""
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)

    def to_message(self, where: str = "messages") -> Message:
        """The message for the chat template. A developer is the system. Raises FieldError for calls without JSON."""
        message: Message = {"role": "system" if self.role == "developer" else self.role, "content": self.text}
        if self.tool_calls:
            message["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.function.name,
                        "arguments": _arguments(call.function.arguments, f"{where}.tool_calls.{i}.function.arguments"),
                    },
                }
                for i, call in enumerate(self.tool_calls)
            ]
        if self.role == "tool":
            message["tool_call_id"] = self.tool_call_id or ""
        return message


def _arguments(text: str, where: str) -> dict[str, Any]:
    try:
        value = artefact.parse_json(text or "{}", where)
    except ArtefactError:
        value = None
    if not isinstance(value, dict):
        raise FieldError(where, "no JSON object")
    return value


def check_history(messages: Sequence[ChatMessage]) -> None:
    """Raise FieldError where calls and results do not belong together: what a template would make of them is chance."""
    called: set[str] = set()
    for i, message in enumerate(messages):
        if message.tool_calls and message.role != "assistant":
            raise FieldError(f"messages.{i}.tool_calls", "only an assistant calls tools")
        if message.role != "tool":
            called |= {call.id for call in message.tool_calls or []}
        elif message.tool_call_id is None:
            raise FieldError(f"messages.{i}.tool_call_id", "missing in a tool's result")
        elif message.tool_call_id not in called:
            raise FieldError(f"messages.{i}.tool_call_id", "no call before it has this id")


def to_messages(messages: Sequence[ChatMessage]) -> list[Message]:
    """All messages for the chat template. Raises FieldError."""
    check_history(messages)
    return [message.to_message(f"messages.{i}") for i, message in enumerate(messages)]
