"""Requests of clients: validates the two requests of OpenAI's API and turns them into a prompt and parameters.

The fields `top_k`, `min_p`, `typical_p`, `repetition_penalty`, `regex` and `chat_template_kwargs` are added. A field
that would change the answer but is not supported is refused by name, unless its value has no effect. Fields about the
caller or the storage of answers are accepted and ignored. Missing fields get the defaults of `Sampling`: OpenAI's
temperature of 1 is too high for small models. Source: https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from merino_edge import limits
from merino_edge.errors import InputError
from merino_edge.runtime.grammar import ANY_OBJECT, Grammar, Grammars
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.tokenizer import Message, Tokenizer

TOKEN_ID = re.compile("[0-9]{1,9}")
# About the caller, the storage of answers, or advice that this server does not need.
UNUSED = frozenset(
    [
        *("user", "metadata", "store", "service_tier", "prompt_cache_key", "safety_identifier"),
        *("prompt_cache_retention", "reasoning_effort", "verbosity", "cache_prompt", "prediction"),
        *("timings_per_token", "return_progress"),
    ]
)
NEUTRAL: dict[str, tuple[Any, ...]] = {  # fields that are not supported: values without an effect
    "n": (1,),
    "best_of": (1,),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "echo": (False,),
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}


class FieldError(InputError):
    """A field of a request cannot be used. `field` is its path."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}", "see docs/runtime.md")
        self.field = field


class _Strict(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_what_asks_for_nothing(cls, value: Any) -> Any:
        """Clients send back what they were sent, with fields such as `"refusal": null` and `"tool_calls": []`."""
        if not isinstance(value, dict):
            return value
        known = {field.alias or name for name, field in cls.model_fields.items()}
        return {
            name: field
            for name, field in value.items()
            if field is not None and (name in known or field not in ("", [], {}))
        }


class TextPart(_Strict):
    type: Literal["text"]
    text: str


class ChatMessage(_Strict):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None  # no template here uses it

    @model_validator(mode="before")
    @classmethod
    def _allow_a_silent_assistant(cls, value: Any) -> Any:
        silent = isinstance(value, dict) and value.get("role") == "assistant" and value.get("content") is None
        return {**value, "content": ""} if silent else value

    def to_message(self) -> Message:
        """The message for the chat template. Text parts are joined; a developer is the system."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class StreamOptions(_Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted and ignored: no padding against eavesdroppers is added
    continuous_usage_stats: bool = False  # accepted and ignored: the usage comes at the end


class NamedSchema(_Strict):
    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # ignored: an answer always follows the schema


class ResponseFormat(_Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None


class Request(_Strict, ABC):
    """The fields of both requests."""

    model: str = ""  # the one that is served
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    typical_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    response_format: ResponseFormat | None = None
    regex: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _drop_neutral_fields(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        for name in NEUTRAL.keys() & value.keys():
            if value[name] not in (None, *NEUTRAL[name]):
                raise ValueError(f"{name} is not served here")
        return {name: field for name, field in value.items() if name not in NEUTRAL and name not in UNUSED}

    @property
    def include_usage(self) -> bool:
        """Whether a streamed answer ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int:
        """The most tokens of the answer; without `max_tokens` as many as the context has room for."""
        return limits.MAX_NEW_TOKENS if self.max_tokens is None else self.max_tokens

    def sampling(self) -> Sampling:
        """The sampling parameters. Raises InputError for a value out of its range."""
        names = ["temperature", "top_p", "top_k", "min_p", "typical_p", "seed"]
        names += ("repetition_penalty", "frequency_penalty", "presence_penalty")
        parameters: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            if not all(TOKEN_ID.fullmatch(token) for token in self.logit_bias):
                raise InputError("logit_bias has a key that is no token id", "give whole numbers as keys")
            parameters["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        return Sampling(**parameters)

    @abstractmethod
    def prompt_ids(
        self, tokenizer: Tokenizer, *, control_tokens: bool = False, options: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The prompt's token ids. Special tokens in messages are text, unless `control_tokens`.

        `options` of the chat template are the server's; the request's own come first.

        Raises InputError (no template, refused by the template, too long), ArtefactError (the template fails).
        """

    def notes(self, tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> list[str]:
        """What the client should know of how its prompt was understood."""
        return []

    def grammar(self, grammars: Callable[[], Grammars]) -> Grammar | None:
        """The compiled `response_format` or `regex`, or None. Raises InputError, MissingExtraError."""
        response_format = self.response_format or ResponseFormat(type="text")
        if self.regex is not None:
            if response_format.type != "text":
                raise InputError("regex and response_format cannot be combined", "give one")
            return grammars().regex(self.regex)
        if response_format.type == "json_schema":
            if response_format.json_schema is None:
                raise InputError("response_format.json_schema is missing", "give the schema")
            return grammars().json_schema(response_format.json_schema.schema_)
        return grammars().json_schema(ANY_OBJECT) if response_format.type == "json_object" else None

    def stop_strings(self) -> list[str]:
        """The stop strings as a list, possibly empty."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class ChatRequest(Request):
    """A request to /v1/chat/completions."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=limits.MAX_MESSAGES)]
    max_completion_tokens: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @property
    def token_limit(self) -> int:
        return super().token_limit if self.max_completion_tokens is None else self.max_completion_tokens

    def prompt_ids(
        self, tokenizer: Tokenizer, *, control_tokens: bool = False, options: Mapping[str, Any] | None = None
    ) -> list[int]:
        return tokenizer.encode_chat(
            self._messages(), control_tokens=control_tokens, options=self._template_options(options)
        )

    def notes(self, tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> list[str]:
        return ["the chat template leaves the system message out"] * tokenizer.drops_system(
            self._messages(), self._template_options(options)
        )

    def _template_options(self, of_server: Mapping[str, Any] | None) -> dict[str, Any]:
        return {**(of_server or {}), **(self.chat_template_kwargs or {})}

    def _messages(self) -> list[Message]:
        return [message.to_message() for message in self.messages]


class TextRequest(Request):
    """A request to /v1/completions."""

    prompt: str | list[str] | list[int]

    def prompt_ids(
        self, tokenizer: Tokenizer, *, control_tokens: bool = False, options: Mapping[str, Any] | None = None
    ) -> list[int]:
        if isinstance(self.prompt, str):
            return tokenizer.encode(self.prompt)
        if self.prompt and isinstance(self.prompt[0], int):
            return [token for token in self.prompt if isinstance(token, int)]
        if len(self.prompt) != 1:
            raise InputError(f"prompt is a list of {len(self.prompt)} texts", "ask for one at a time")
        return tokenizer.encode(str(self.prompt[0]))


def parse(kind: type[Request], body: bytes) -> Request:
    """Parse a request's JSON. Raises InputError that names the wrong field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # A value of two possible types has errors for both. The deepest error belongs to the type that fits better.
        deepest = max(error.errors(include_url=False, include_input=False), key=lambda entry: len(entry["loc"]))
        where = ".".join(map(str, deepest["loc"]))
        message = deepest["msg"].removeprefix("Value error, ")
        raise (FieldError(where, message) if where else InputError(message, "see docs/runtime.md")) from None
