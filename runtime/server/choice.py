"""One answer of a reply: its text, its tool calls and its log-probabilities, while they are generated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from merino_edge.runtime.call_parser import CallParser, Part
from merino_edge.runtime.generation import Generation
from merino_edge.runtime.logprobs import LogprobRecorder, TokenLogprob
from merino_edge.runtime.server.worker import Stopping

# `context`: the cache is full. A cancelled answer has no such document: nobody reads it, or the server is stopping.
FINISH_REASONS = {"stop": "stop", "length": "length", "context": "length", None: None}


@dataclass
class Choice:
    """A generation, and what a client asked to see of it. `echo` is the text of the prompt, where it is repeated."""

    index: int
    prompt: int  # which of the request's prompts it answers
    generation: Generation
    parser: CallParser | None = None
    recorder: LogprobRecorder | None = None
    top: int | None = None  # of the log-probabilities' most likely tokens; None where none are shown
    echo: str = ""
    offset: int = 0  # characters of the tokens whose log-probabilities earlier events have shown
    _shown: int = 0  # log-probabilities that earlier events have shown

    def check_is_whole(self) -> None:
        """Raise Stopping where the server cut the answer."""
        if self.generation.finish_reason == "cancelled":
            raise Stopping

    def push(self, text: str) -> list[Part]:
        """What a piece of the answer says: text outside calls, and parts of calls."""
        return [Part(text)] if self.parser is None else self.parser.push(text)

    def finish(self) -> list[Part]:
        """What the answer's end says."""
        return [] if self.parser is None else self.parser.finish()

    @property
    def text(self) -> str:
        """The text outside calls, so far."""
        return self.generation.text if self.parser is None else self.parser.content

    @property
    def reason(self) -> str | None:
        """Why the answer ended, in OpenAI's words. A call that has not ended was cut, whatever cut it."""
        if self.parser is not None and self.generation.finish_reason is not None:
            if self.parser.is_cut:
                return "length"
            if self.parser.calls and self.generation.finish_reason == "stop":
                return "tool_calls"
        return FINISH_REASONS[self.generation.finish_reason]

    def calls(self) -> list[dict[str, Any]]:
        """The calls so far, as OpenAI writes them."""
        return [call_document(self, index) for index in range(len(self.parser.calls))] if self.parser else []

    def new_logprobs(self) -> list[TokenLogprob]:
        """The log-probabilities that no earlier call has returned: the prompt's too where it is repeated."""
        if self.recorder is None or self.top is None:
            return []
        answered = self.recorder.answer[: len(self.generation.tokens)]  # without the end token
        entries = [*self.recorder.prompt, *answered]
        new, self._shown = entries[self._shown :], len(entries)
        return new


def call_document(choice: Choice, index: int) -> dict[str, Any]:
    """One call of a choice, as OpenAI writes it in a message."""
    assert choice.parser is not None
    call = choice.parser.calls[index]
    return {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
