"""The request to /v1/responses, which is turned into one to /v1/chat/completions.

Nothing is stored: a conversation comes whole with each request. Fields that need a store are refused by name.
Source: https://platform.openai.com/docs/api-reference/responses.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from merino_edge import limits
from merino_edge.runtime.server.chat_request import ChatRequest
from merino_edge.runtime.server.messages import CalledFunction, ChatMessage, TextPart, ToolCall
from merino_edge.runtime.server.requests import UNUSED, NamedSchema, ResponseFormat, StreamOptions
from merino_edge.runtime.server.strict import Checked, FieldError, Strict
from merino_edge.runtime.server.tools import ChosenFunction, ChosenTool, Name, OfferedFunction, Tool

STORED = ("previous_response_id", "conversation", "background", "prompt")  # need what is not kept here
ADVICE = ("reasoning", "truncation", "max_tool_calls")
NO_EFFECT_INCLUDED = ("reasoning.encrypted_content",)
LOGPROBS = "message.output_text.logprobs"


class InputPart(Strict):
    type: Literal["input_text", "output_text", "text"]
    text: str
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


class InputMessage(Strict):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[InputPart]
    id: str | None = None
    status: str | None = None
    phase: str | None = None


class InputCall(Strict):
    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: str
    id: str | None = None
    status: str | None = None


class InputResult(Strict):
    type: Literal["function_call_output"]
    call_id: str
    output: str | list[InputPart]
    id: str | None = None
    status: str | None = None


class InputThoughts(Strict):
    type: Literal["reasoning"]  # left out: templates leave the thoughts of earlier turns out too
    id: str | None = None
    summary: list[Any] | None = None
    content: list[Any] | None = None
    encrypted_content: str | None = None
    status: str | None = None


Item = Annotated[InputMessage | InputCall | InputResult | InputThoughts, Field(discriminator="type")]
ITEMS: dict[str, type[Strict]] = {
    "message": InputMessage,
    "function_call": InputCall,
    "function_call_output": InputResult,
    "reasoning": InputThoughts,
}


class FlatTool(Strict):
    type: Literal["function"]
    name: Name
    description: str = ""
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class FlatChoice(Strict):
    type: Literal["function"]
    name: str


class TextFormat(Strict):
    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None
    strict: bool | None = None


class TextOptions(Strict):
    format: TextFormat = TextFormat()
    verbosity: str | None = None


class ResponsesRequest(Checked):
    """A request to /v1/responses."""

    model: str = ""
    input: str | Annotated[list[Item], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    instructions: str | None = None
    tools: Annotated[list[FlatTool], Field(max_length=limits.MAX_TOOLS, default_factory=list)]
    tool_choice: Literal["auto", "none", "required"] | FlatChoice = "auto"
    parallel_tool_calls: bool = True
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int = 0
    include: list[str] = Field(default_factory=list)
    text: TextOptions = TextOptions()
    stream: bool = False
    stream_options: StreamOptions | None = None
    metadata: dict[str, Any] = Field(default_factory=dict)
    store: bool = False
    # Beyond OpenAI's, as in a chat.
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_and_refuse(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in STORED:
            if value.get(name) not in (None, False):
                raise FieldError(name, "not served: nothing is stored here", "unsupported_parameter")
        unused = (UNUSED | {*STORED, *ADVICE}) - {"store", "metadata"}
        return {name: field for name, field in value.items() if name not in unused}

    @model_validator(mode="before")
    @classmethod
    def _name_what_items_are(cls, value: Any) -> Any:
        """Give each item the type that it has without saying so, and refuse others by name."""
        items = value.get("input") if isinstance(value, dict) else None
        if not isinstance(items, list):
            return value
        parsed = []
        for i, item in enumerate(items):
            kind = item.get("type", "message") if isinstance(item, dict) else None
            if not isinstance(kind, str) or kind not in ITEMS:
                raise FieldError(f"input.{i}.type", f"not one of {', '.join(ITEMS)}")
            parsed.append({"type": kind, **item})
        return {**value, "input": parsed}

    def check(self) -> None:
        """Raise FieldError for what cannot be held."""
        if self.max_output_tokens is not None and self.max_output_tokens < 1:
            raise FieldError("max_output_tokens", "less than 1")
        if self.store:
            raise FieldError("store", "not served: nothing is stored here; send false", "unsupported_parameter")
        for i, name in enumerate(self.include):
            if name not in (*NO_EFFECT_INCLUDED, LOGPROBS):
                raise FieldError(f"include.{i}", f"{name[:60]!r} is not served", "unsupported_value")

    def chat(self) -> ChatRequest:
        """The same request to /v1/chat/completions. Raises FieldError."""
        choice = self.tool_choice
        chat = ChatRequest(
            model=self.model,
            messages=self._messages(),
            max_completion_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=self.seed,
            tools=[Tool(type="function", function=_offered(tool)) for tool in self.tools] or None,
            tool_choice=choice if isinstance(choice, str) else _chosen(choice),
            parallel_tool_calls=self.parallel_tool_calls,
            response_format=self._response_format(),
            logprobs=LOGPROBS in self.include or self.top_logprobs > 0,
            top_logprobs=self.top_logprobs,
            chat_template_kwargs=self.chat_template_kwargs,
        )
        chat.check()
        return chat

    def _messages(self) -> list[ChatMessage]:
        messages: list[ChatMessage] = []
        if self.instructions:
            messages.append(ChatMessage(role="system", content=self.instructions))
        if isinstance(self.input, str):
            return [*messages, ChatMessage(role="user", content=self.input)]
        for item in self.input:
            if isinstance(item, InputMessage):
                messages.append(ChatMessage(role=item.role, content=_content(item.content)))
            elif isinstance(item, InputResult):
                messages.append(ChatMessage(role="tool", content=_content(item.output), tool_call_id=item.call_id))
            elif isinstance(item, InputCall):
                function = CalledFunction(name=item.name, arguments=item.arguments)
                call = ToolCall(id=item.call_id, function=function)
                last = messages[-1] if messages else None
                if last is not None and last.role == "assistant":  # calls of one turn are one message
                    messages[-1] = last.model_copy(update={"tool_calls": [*(last.tool_calls or []), call]})
                else:
                    messages.append(ChatMessage(role="assistant", content="", tool_calls=[call]))
        if all(message.role == "system" for message in messages):
            raise FieldError("input", "holds no message")
        return messages

    def _response_format(self) -> ResponseFormat | None:
        form = self.text.format
        if form.type == "text":
            return None
        if form.type == "json_object":
            return ResponseFormat(type="json_object")
        if form.schema_ is None:
            raise FieldError("text.format.schema", "missing")
        return ResponseFormat(type="json_schema", json_schema=NamedSchema.model_validate({"schema": form.schema_}))


def _content(content: str | list[InputPart]) -> str | list[TextPart]:
    if isinstance(content, str):
        return content
    return [TextPart(type="text", text=part.text) for part in content]


def _offered(tool: FlatTool) -> OfferedFunction:
    return OfferedFunction(name=tool.name, description=tool.description, parameters=tool.parameters)


def _chosen(choice: FlatChoice) -> ChosenTool:
    return ChosenTool(type="function", function=ChosenFunction(name=choice.name))
