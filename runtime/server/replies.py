"""Replies to clients: OpenAI's documents, whole or streamed.

The fields `timings` and `notes` are not OpenAI's. The first has the milliseconds and rates of `Statistics`. The second
says what a client may not expect, such as a system message that the template leaves out.
Source: https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from merino_edge.runtime.generation import Generation
from merino_edge.runtime.server.worker import Stopping

# `context`: the cache is full. A cancelled answer has no such document: nobody reads it, or the server is stopping.
FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length", None: None}
DONE = "data: [DONE]\n\n"
# Some clients end a line at these too, as Python's splitlines does.
LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
PING = ": waiting\n\n"  # a comment, which clients leave out


@dataclass
class Reply:
    """The documents of one answer: of /v1/chat/completions with `chat`, else of /v1/completions."""

    model: str
    chat: bool
    generation: Generation
    notes: list[str] = field(default_factory=list)
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def check_is_whole(self) -> None:
        """Raise Stopping where the server cut the answer."""
        if self.generation.finish_reason == "cancelled":
            raise Stopping

    def whole(self) -> dict[str, Any]:
        """The document of a finished answer."""
        text = self.generation.text
        content = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {**self._document([self._choice(content, self._reason)], piece=False), **self.usage(), **self._noted()}

    def first(self) -> str:
        """The event before any text. It is empty unless this is a chat."""
        return self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)]) if self.chat else ""

    def piece(self, text: str) -> str:
        """The event with the next piece of text."""
        content = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._event([self._choice(content, None)])

    def last(self, *, with_usage: bool) -> str:
        """The events after all text, with `usage` if the client asked for it."""
        content: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        end = self._event([self._choice(content, self._reason)], timings=self.usage()["timings"], **self._noted())
        return end + (self._event([], **self.usage()) if with_usage else "") + DONE

    def usage(self) -> dict[str, Any]:
        """The fields `usage` and `timings`."""
        s = self.generation.statistics
        return {
            "usage": {
                "prompt_tokens": s.prompt_tokens,
                "completion_tokens": s.generated_tokens,
                "total_tokens": s.prompt_tokens + s.generated_tokens,
                "prompt_tokens_details": {"cached_tokens": s.reused_tokens},
            },
            "timings": s.to_dict(),
        }

    def _noted(self) -> dict[str, Any]:
        return {"notes": self.notes} if self.notes else {}

    @property
    def _reason(self) -> str | None:
        return FINISH_REASONS[self.generation.finish_reason]

    def _choice(self, content: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **content, "logprobs": None, "finish_reason": reason}

    def _document(self, choices: list[dict[str, Any]], *, piece: bool) -> dict[str, Any]:
        kind = ("chat.completion.chunk" if piece else "chat.completion") if self.chat else "text_completion"
        prefix = "chatcmpl" if self.chat else "cmpl"
        return {
            "id": f"{prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "choices": choices,
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        return f"data: {_on_one_line({**self._document(choices, piece=True), **more})}\n\n"


def error_document(message: str, kind: str, code: str | None = None, field: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it; `kind` is a type such as invalid_request_error."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def error_event(document: dict[str, Any]) -> str:
    """The event of an error after the first piece, when the HTTP status has been sent already."""
    return f"data: {_on_one_line(document)}\n\n{DONE}"


def _on_one_line(document: dict[str, Any]) -> str:
    return json.dumps(document, ensure_ascii=False).translate(LINE_ENDS)
