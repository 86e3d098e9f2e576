"""What a client gets: OpenAI's documents, whole or in pieces.

Beside its fields, `timings` has the milliseconds and rates of `Statistics`. Source:
https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass, field
from typing import Any

from merino_edge.runtime.generation import Generation

# `context`: the cache is full. A cancelled answer has no reader, but for one cut off as the server ends.
FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length", "cancelled": "stop", None: None}
DONE = "data: [DONE]\n\n"


@dataclass
class Reply:
    """One answer's documents. `chat`: of /v1/chat/completions; else of /v1/completions."""

    model: str
    chat: bool
    generation: Generation
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self) -> dict[str, Any]:
        text = self.generation.text
        said = {"message": {"role": "assistant", "content": text, "refusal": None}} if self.chat else {"text": text}
        return {**self._document([self._choice(said, self._reason)], piece=False), **self.usage()}

    def first(self) -> str:
        """The event before any text; of a chat only."""
        return self._event([self._choice({"delta": {"role": "assistant", "content": ""}}, None)]) if self.chat else ""

    def piece(self, text: str) -> str:
        said = {"delta": {"content": text}} if self.chat else {"text": text}
        return self._event([self._choice(said, None)])

    def last(self, *, with_usage: bool) -> str:
        """The events after all text."""
        said: dict[str, Any] = {"delta": {}} if self.chat else {"text": ""}
        end = self._event([self._choice(said, self._reason)], timings=self.usage()["timings"])
        return end + (self._event([], **self.usage()) if with_usage else "") + DONE

    def usage(self) -> dict[str, Any]:
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

    @property
    def _reason(self) -> str | None:
        return FINISH_REASONS[self.generation.finish_reason]

    def _choice(self, said: dict[str, Any], reason: str | None) -> dict[str, Any]:
        return {"index": 0, **said, "logprobs": None, "finish_reason": reason}

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
        return f"data: {json.dumps({**self._document(choices, piece=True), **more}, ensure_ascii=False)}\n\n"


def error_document(message: str, kind: str, code: str | None = None) -> dict[str, Any]:
    """As OpenAI's clients read it; `kind` such as invalid_request_error."""
    return {"error": {"message": message, "type": kind, "param": None, "code": code}}


def error_event(document: dict[str, Any]) -> str:
    """An error after the first piece, when the status is long sent."""
    return f"data: {json.dumps(document, ensure_ascii=False)}\n\n{DONE}"
