"""The documents and events of /v1/responses.

Source: https://platform.openai.com/docs/api-reference/responses-streaming.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from merino_edge.runtime.call_parser import Part
from merino_edge.runtime.server import logprob_documents
from merino_edge.runtime.server.choice import Choice
from merino_edge.runtime.server.replies import Reply, on_one_line
from merino_edge.runtime.server.responses_request import ResponsesRequest

Document = dict[str, Any]


@dataclass(kw_only=True)
class ResponsesReply(Reply):
    """The documents of one response. Its output is a message, calls, or a message and then calls."""

    request: ResponsesRequest
    _items: list[Document] = field(default_factory=list)  # of the output, in order
    _number: int = 0  # of the next event

    def whole(self) -> Document:
        choice = self.choices[0]
        self._items = self._finished(choice)
        return self._response(choice.reason)

    def first(self) -> Iterator[str]:
        for name in ("response.created", "response.in_progress"):
            yield self._event(name, response=self._response(None))

    def piece(self, choice: Choice, parts: Sequence[Part]) -> Iterator[str]:
        for part in parts:
            if part.index is None:
                if not self._items:
                    yield from self._open_message()
                logprobs = self._logprobs(choice)
                yield self._of_item("response.output_text.delta", 0, content_index=0, delta=part.text, **logprobs)
                continue
            if not part.text:  # a call begins: what came before it has ended
                yield from self._close_last(choice)
                yield from self._open(self._call(choice, part.index, "in_progress"))
            else:
                yield self._of_item("response.function_call_arguments.delta", len(self._items) - 1, delta=part.text)

    def end(self, choice: Choice) -> Iterator[str]:
        if not self._items:
            yield from self._open_message()
        yield from self._close_last(choice)
        self._items = self._finished(choice)

    def last(self) -> Iterator[str]:
        response = self._response(self.choices[0].reason)
        yield self._event(f"response.{response['status']}", response=response)

    def failed(self, document: Document) -> Iterator[str]:
        error = document["error"]
        failure = {"code": error["code"] or "server_error", "message": error["message"]}
        response = {**self._response(None), "status": "failed", "error": failure}
        yield self._event("response.failed", response=response)

    # --- items of the output ---

    def _open_message(self) -> Iterator[str]:
        yield from self._open(self._message("", [], "in_progress"))
        part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
        yield self._of_item("response.content_part.added", 0, content_index=0, part=part)

    def _open(self, item: Document) -> Iterator[str]:
        self._items.append(item)
        yield self._event("response.output_item.added", output_index=len(self._items) - 1, item=item)

    def _close_last(self, choice: Choice) -> Iterator[str]:
        """The events that end the item that is open, if there is one."""
        if not self._items:
            return
        index = len(self._items) - 1
        if self._items[index]["type"] == "message":
            item = self._message(choice.text, self._all_logprobs(choice), "completed")
            part = item["content"][0]
            yield self._of_item(
                "response.output_text.done", index, content_index=0, text=part["text"], logprobs=part["logprobs"]
            )
            yield self._of_item("response.content_part.done", index, content_index=0, part=part)
        else:
            item = self._call(choice, self._calls_before(index), "completed")
            done = {"name": item["name"], "arguments": item["arguments"]}
            yield self._of_item("response.function_call_arguments.done", index, **done)
        self._items[index] = item
        yield self._event("response.output_item.done", output_index=index, item=item)

    def _finished(self, choice: Choice) -> list[Document]:
        """All items of an answer that has ended. The last one of a cut answer is incomplete."""
        calls = [self._call(choice, i, "completed") for i in range(len(choice.calls()))]
        items = (
            [self._message(choice.text, self._all_logprobs(choice), "completed")] if choice.text or not calls else []
        )
        items += calls
        if choice.reason == "length":
            items[-1]["status"] = "incomplete"
        return items

    def _calls_before(self, index: int) -> int:
        return sum(item["type"] == "function_call" for item in self._items[:index])

    def _message(self, text: str, logprobs: list[Document], status: str) -> Document:
        part = {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}
        content = [part] if status != "in_progress" else []
        return {"type": "message", "id": f"msg_{self.id}", "status": status, "role": "assistant", "content": content}

    def _call(self, choice: Choice, index: int, status: str) -> Document:
        call = choice.calls()[index]
        function = call["function"]
        if status == "in_progress":
            function = {**function, "arguments": ""}
        head = {"type": "function_call", "id": f"fc_{call['id'].removeprefix('call_')}", "call_id": call["id"]}
        return {**head, **function, "status": status}

    def _logprobs(self, choice: Choice) -> Document:
        """The log-probabilities of a choice's new tokens."""
        return {"logprobs": logprob_documents.of_chat(choice.new_logprobs(), self.tokens, choice.top or 0)["content"]}

    def _all_logprobs(self, choice: Choice) -> list[Document]:
        if choice.recorder is None or choice.top is None:
            return []
        entries = choice.recorder.answer[: len(choice.generation.tokens)]
        content: list[Document] = logprob_documents.of_chat(entries, self.tokens, choice.top)["content"]
        return content

    # --- events and the response ---

    def _of_item(self, event: str, index: int, **more: Any) -> str:
        return self._event(event, item_id=self._items[index]["id"], output_index=index, **more)

    def _event(self, event: str, **more: Any) -> str:
        document = {"type": event, "sequence_number": self._number, **more}
        self._number += 1
        return f"event: {event}\ndata: {on_one_line(document)}\n\n"

    def _response(self, reason: str | None) -> Document:
        """The response: in progress without a `reason` of its end."""
        asked = self.request
        status = {None: "in_progress", "length": "incomplete"}.get(reason, "completed")
        return {
            "id": f"resp_{self.id}",
            "object": "response",
            "created_at": self.created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.model,
            "output": self._items,
            "parallel_tool_calls": asked.parallel_tool_calls,
            "previous_response_id": None,
            "reasoning": {"effort": None, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": self._format()},
            "tool_choice": asked.tool_choice if isinstance(asked.tool_choice, str) else asked.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools],
            "top_logprobs": asked.top_logprobs,
            "top_p": asked.top_p,
            "truncation": "disabled",
            "metadata": asked.metadata,
            "usage": None if reason is None else self._usage(),
            **({"notes": self.notes} if self.notes else {}),
        }

    def _format(self) -> Document:
        form = self.request.text.format
        return form.model_dump(by_alias=True, exclude_none=True) if form.type == "json_schema" else {"type": form.type}

    def _usage(self) -> Document:
        s = self.statistics()
        return {
            "input_tokens": s.prompt_tokens,
            "input_tokens_details": {"cached_tokens": s.reused_tokens},
            "output_tokens": s.generated_tokens,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": s.prompt_tokens + s.generated_tokens,
        }
