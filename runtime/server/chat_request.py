"""The request to /v1/chat/completions: a conversation, tools, and what the answer may be.

Source: https://platform.openai.com/docs/api-reference/chat.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from pydantic import Field

from merino_edge import limits
from merino_edge.errors import InputError
from merino_edge.runtime import call_format, tool_prompt
from merino_edge.runtime.call_format import CallFormat
from merino_edge.runtime.grammar import ANY_OBJECT, Grammar, Grammars
from merino_edge.runtime.logprobs import LogprobRecorder
from merino_edge.runtime.server.messages import ChatMessage, to_messages
from merino_edge.runtime.server.requests import Request, ResponseFormat
from merino_edge.runtime.server.strict import FieldError
from merino_edge.runtime.server.tools import ToolChoice, Tools, ToolUse, tool_use
from merino_edge.tokenizer import Message, Tokenizer


class ChatRequest(Request):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    tools: Tools | None = None
    tool_choice: ToolChoice | None = None
    parallel_tool_calls: bool = True
    logprobs: bool = False
    top_logprobs: int = 0
    continue_final_message: bool | None = None
    add_generation_prompt: bool | None = None

    def check(self) -> None:
        super().check()
        if not 0 <= self.top_logprobs <= limits.MAX_LOGPROBS:
            raise FieldError("top_logprobs", f"outside 0 to {limits.MAX_LOGPROBS}")
        if self.top_logprobs and not self.logprobs:
            raise FieldError("top_logprobs", "only with logprobs")
        last = self.messages[-1]
        if self.continue_final_message and (last.role != "assistant" or last.tool_calls or self.add_generation_prompt):
            raise FieldError("continue_final_message", "the last message is no text of the assistant that may go on")
        if self.add_generation_prompt is False and not self.continues:
            raise FieldError("add_generation_prompt", "false only where the last message of the assistant goes on")
        if self.continues and len(self.messages) == 1:
            raise FieldError("messages", "there is nothing before the assistant's answer")
        if self.continues and self.messages[-2].role == "assistant":
            raise FieldError("messages", "the last two are both the assistant's")

    @property
    def continues(self) -> bool:
        last = self.messages[-1]
        asked = self.add_generation_prompt is not True if self.continue_final_message is None else True
        return last.role == "assistant" and not last.tool_calls and asked and self.continue_final_message is not False

    @property
    def token_limit(self) -> int:
        return super().token_limit if self.max_completion_tokens is None else self.max_completion_tokens

    def prompts(
        self, tokenizer: Tokenizer, *, control_tokens: bool = False, options: Mapping[str, Any] | None = None
    ) -> list[list[int]]:
        messages, tools, begun = self._conversation(tokenizer)
        template_options = self._template_options(options)
        ids = tokenizer.encode_chat(
            messages, control_tokens=control_tokens, options=template_options, tools=tools, begun=begun
        )
        return [ids]

    def notes(self, tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> list[str]:
        messages, _, _ = self._conversation(tokenizer)
        return ["the chat template leaves the system message out"] * tokenizer.drops_system(
            messages, self._template_options(options)
        )

    def recorder(self) -> LogprobRecorder | None:
        return LogprobRecorder(self.top_logprobs) if self.logprobs else None

    @property
    def top(self) -> int | None:
        return self.top_logprobs if self.logprobs else None

    def call_grammar(self, tokenizer: Tokenizer, grammars: Callable[[], Grammars]) -> tuple[CallFormat, Grammar] | None:
        use = self._tool_use()
        if use is None:
            return None
        form = call_format.format_of(tokenizer)
        answer = self._answer_schema(forced=use.forced, form=form)
        try:
            text = call_format.grammar(
                form, use.callable, tokenizer, forced=use.forced, parallel=use.parallel, answer=answer
            )
            return form, grammars().lark(text)
        except InputError as error:
            raise FieldError("tools", error.message) from None

    def _answer_schema(self, *, forced: bool, form: CallFormat) -> dict[str, Any] | None:
        """The schema of an answer that calls nothing. Raises FieldError where it cannot be told from a call."""
        asked = self.response_format or ResponseFormat(type="text")
        if self.regex is not None:
            raise FieldError("regex", "not with tools")
        if forced or asked.type == "text":
            return None
        if not form.trigger:
            raise FieldError("response_format", "not with tools: this model's calls are JSON objects too")
        return asked.json_schema.schema_ if asked.json_schema is not None else asked.schema_ or ANY_OBJECT

    def _tool_use(self) -> ToolUse | None:
        return tool_use(self.tools, self.tool_choice, parallel=self.parallel_tool_calls)

    def _conversation(self, tokenizer: Tokenizer) -> tuple[list[Message], Sequence[Mapping[str, Any]], str]:
        """The messages and tools for the template, and the beginning of the answer."""
        messages, use = to_messages(self.messages), self._tool_use()
        begun = messages.pop()["content"] if self.continues else ""
        if use is None and not any(message["role"] == "tool" or "tool_calls" in message for message in messages):
            return messages, (), begun
        form = call_format.format_of(tokenizer)
        return *tool_prompt.prepared(tokenizer, messages, use.described if use else (), form), begun

    def _template_options(self, of_server: Mapping[str, Any] | None) -> dict[str, Any]:
        return {**(of_server or {}), **(self.chat_template_kwargs or {})}
