"""Replies to clients: OpenAI's documents of chats and completions, whole or streamed.

The fields `timings` and `notes` are not OpenAI's. The first has the milliseconds and rates of `Statistics`. The second
says what a client may not expect, such as a system message that the template leaves out.
Source: https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from merino_edge.runtime.call_parser import Part
from merino_edge.runtime.generation import Statistics
from merino_edge.runtime.logprobs import TokenLogprob
from merino_edge.runtime.server import logprob_documents
from merino_edge.runtime.server.choice import Choice
from merino_edge.runtime.token_bytes import TokenBytes

DONE = "data: [DONE]\n\n"
# Some clients end a line at these too, as Python's splitlines does.
LINE_ENDS = str.maketrans({end: f"\\u{ord(end):04x}" for end in "\x85\u2028\u2029"})
PING = ": waiting\n\n"  # a comment, which clients leave out


@dataclass
class Reply(ABC):
    """The documents of one request's answers. The choices end one after the other, in their order."""

    model: str
    fingerprint: str
    choices: Sequence[Choice]
    tokens: TokenBytes
    notes: list[str] = field(default_factory=list)
    with_usage: bool = False
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @abstractmethod
    def whole(self) -> dict[str, Any]:
        """The document of all answers, which have ended."""

    @abstractmethod
    def first(self) -> Iterator[str]:
        """The events before any text."""

    @abstractmethod
    def piece(self, choice: Choice, parts: Sequence[Part]) -> Iterator[str]:
        """The events of more of an answer."""

    @abstractmethod
    def end(self, choice: Choice) -> Iterator[str]:
        """The events of an answer's end."""

    @abstractmethod
    def last(self) -> Iterator[str]:
        """The events after all answers."""

    @abstractmethod
    def failed(self, document: dict[str, Any]) -> Iterator[str]:
        """The events of an error after the first event, when the HTTP status has been sent already."""

    def statistics(self) -> Statistics:
        """Counts and times of all answers together. A prompt counts once, however many answers it has."""
        total, prompts = Statistics(), set[int]()
        for choice in self.choices:
            s, prompt = choice.generation.statistics, choice.prompt
            if prompt not in prompts:
                total.prompt_tokens += s.prompt_tokens
                total.reused_tokens += s.reused_tokens
                prompts.add(prompt)
            total.generated_tokens += s.generated_tokens
            total.drafted_tokens += s.drafted_tokens
            total.accepted_tokens += s.accepted_tokens
            total.prompt_ms += s.prompt_ms
            total.decode_ms += s.decode_ms
            total.first_token_ms = s.first_token_ms if total.first_token_ms is None else total.first_token_ms
        return total


class CompletionReply(Reply):
    """What /v1/chat/completions and /v1/completions have in common."""

    kind: str
    piece_kind: str
    prefix: str

    @abstractmethod
    def _content(self, choice: Choice) -> dict[str, Any]:
        """What a whole choice holds."""

    @abstractmethod
    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any] | None:
        """The log-probabilities of a choice's new tokens."""

    def whole(self) -> dict[str, Any]:
        choices = [self._choice(choice, self._content(choice), reason=choice.reason) for choice in self.choices]
        return {**self._document(choices, self.kind), **self._usage(), **self._noted()}

    def last(self) -> Iterator[str]:
        if self.with_usage:
            yield self._event([], **self._usage())
        yield DONE

    def failed(self, document: dict[str, Any]) -> Iterator[str]:
        yield error_event(document)

    def _usage(self) -> dict[str, Any]:
        """The fields `usage` and `timings`."""
        s = self.statistics()
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

    def _ending(self, choice: Choice, content: dict[str, Any]) -> str:
        more = {"timings": choice.generation.statistics.to_dict(), **self._noted()}
        return self._event([self._choice(choice, content, reason=choice.reason)], **more)

    def _choice(self, choice: Choice, content: dict[str, Any], *, reason: str | None = None) -> dict[str, Any]:
        entries = choice.new_logprobs()
        logprobs = self._logprobs(choice, entries) if entries or (reason and choice.top is not None) else None
        return {"index": choice.index, **content, "logprobs": logprobs, "finish_reason": reason}

    def _document(self, choices: list[dict[str, Any]], kind: str) -> dict[str, Any]:
        return {
            "id": f"{self.prefix}-{self.id}",
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "choices": choices,
        }

    def _event(self, choices: list[dict[str, Any]], **more: Any) -> str:
        document = {**self._document(choices, self.piece_kind), **more}
        return f"data: {on_one_line(document)}\n\n"


class ChatReply(CompletionReply):
    """The documents of /v1/chat/completions."""

    kind, piece_kind, prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def first(self) -> Iterator[str]:
        for choice in self.choices:
            yield self._event([self._choice(choice, {"delta": {"role": "assistant", "content": ""}})])

    def piece(self, choice: Choice, parts: Sequence[Part]) -> Iterator[str]:
        for part in parts:
            yield self._event([self._choice(choice, {"delta": _delta(choice, part)})])

    def end(self, choice: Choice) -> Iterator[str]:
        yield self._ending(choice, {"delta": {}})

    def _content(self, choice: Choice) -> dict[str, Any]:
        calls = choice.calls()
        message = {"role": "assistant", "content": None if calls and not choice.text else choice.text, "refusal": None}
        return {"message": {**message, **({"tool_calls": calls} if calls else {})}}

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        return logprob_documents.of_chat(entries, self.tokens, choice.top or 0)


class TextReply(CompletionReply):
    """The documents of /v1/completions."""

    kind, piece_kind, prefix = "text_completion", "text_completion", "cmpl"

    def first(self) -> Iterator[str]:
        for choice in self.choices:
            if choice.echo:
                yield self._event([self._choice(choice, {"text": choice.echo})])

    def piece(self, choice: Choice, parts: Sequence[Part]) -> Iterator[str]:
        for part in parts:
            yield self._event([self._choice(choice, {"text": part.text})])

    def end(self, choice: Choice) -> Iterator[str]:
        yield self._ending(choice, {"text": ""})

    def _content(self, choice: Choice) -> dict[str, Any]:
        return {"text": choice.echo + choice.text}

    def _logprobs(self, choice: Choice, entries: Sequence[TokenLogprob]) -> dict[str, Any]:
        document = logprob_documents.of_text(entries, self.tokens, choice.offset)
        choice.offset += sum(map(len, document["tokens"]))
        return document


def _delta(choice: Choice, part: Part) -> dict[str, Any]:
    """The change that a part makes to a chat's message."""
    if part.index is None:
        return {"content": part.text}
    if part.text:
        return {"tool_calls": [{"index": part.index, "function": {"arguments": part.text}}]}
    call = choice.calls()[part.index]
    function = {"name": call["function"]["name"], "arguments": ""}
    return {"tool_calls": [{"index": part.index, "id": call["id"], "type": "function", "function": function}]}


def error_document(message: str, kind: str, code: str | None = None, field: str | None = None) -> dict[str, Any]:
    """An error as OpenAI's clients expect it; `kind` is a type such as invalid_request_error."""
    return {"error": {"message": message, "type": kind, "param": field, "code": code}}


def error_event(document: dict[str, Any]) -> str:
    """The event of an error after the first piece, when the HTTP status has been sent already."""
    return f"data: {on_one_line(document)}\n\n{DONE}"


def on_one_line(document: dict[str, Any]) -> str:
    """The JSON of an event, without any character that ends a line for some client."""
    return json.dumps(document, ensure_ascii=False).translate(LINE_ENDS)
