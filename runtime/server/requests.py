"""Requests of clients: validates them and turns them into prompts and parameters.

Fields of other servers are added, such as `top_k`, `regex` and `ignore_eos`. A field that would change the answer but
is not supported is refused by name, unless its value has no effect. Fields about the caller or the storage of answers
are accepted and ignored. Missing fields get the defaults of `Sampling`: OpenAI's temperature of 1 is too high for small
models. Source: https://platform.openai.com/docs/api-reference.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, model_validator

from merino_edge import limits
from merino_edge.errors import InputError
from merino_edge.runtime.call_format import CallFormat
from merino_edge.runtime.ends import Ends
from merino_edge.runtime.grammar import ANY_OBJECT, Grammar, Grammars
from merino_edge.runtime.logprobs import LogprobRecorder
from merino_edge.runtime.sampling_parameters import Sampling
from merino_edge.runtime.server.strict import Checked, FieldError, Strict
from merino_edge.tokenizer import Tokenizer

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
    "best_of": (1,),
    "suffix": ("",),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
}


class StreamOptions(Strict):
    include_usage: bool = False
    include_obfuscation: bool = False  # accepted and ignored: no padding against eavesdroppers is added
    continuous_usage_stats: bool = False  # accepted and ignored: the usage comes at the end


class NamedSchema(Strict):
    name: str = ""
    description: str | None = None
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    strict: bool | None = None  # ignored: an answer always follows the schema


class ResponseFormat(Strict):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Annotated[dict[str, Any] | None, Field(alias="schema")] = None  # llama.cpp's, with json_object


class Request(Checked, ABC):
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
    n: int = 1
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = Field(default_factory=list)
    min_tokens: int = 0
    ignore_eos: bool = False
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
                raise FieldError(name, "not served here", "unsupported_parameter")
        return {name: field for name, field in value.items() if name not in NEUTRAL and name not in UNUSED}

    @property
    def include_usage(self) -> bool:
        """Whether a streamed answer ends with its usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    @property
    def token_limit(self) -> int:
        """The most tokens of the answer; without `max_tokens` as many as the context has room for."""
        return limits.MAX_NEW_TOKENS if self.max_tokens is None else self.max_tokens

    def sampling(self, number: int = 0) -> Sampling:
        """The sampling parameters of one of `n` answers. Raises InputError for a value out of its range."""
        names = ["temperature", "top_p", "top_k", "min_p", "typical_p", "seed"]
        names += ("repetition_penalty", "frequency_penalty", "presence_penalty")
        parameters: dict[str, Any] = {name: value for name in names if (value := getattr(self, name)) is not None}
        if self.logit_bias:
            if not all(TOKEN_ID.fullmatch(token) for token in self.logit_bias):
                raise InputError("logit_bias has a key that is no token id", "give whole numbers as keys")
            parameters["logit_bias"] = {int(token): bias for token, bias in self.logit_bias.items()}
        if self.seed is not None and self.seed >= 0:
            parameters["seed"] = (self.seed + number) % (limits.MAX_SEED + 1) if number else self.seed
        return Sampling(**parameters)

    def ends(self) -> Ends:
        """What ends the answer beside the model's own end tokens and stop strings."""
        return Ends(tuple(self.stop_token_ids), self.min_tokens, self.ignore_eos)

    def check(self) -> None:
        """Raise FieldError for fields that do not go together."""
        if not self.stream and self.include_usage:
            raise FieldError("stream_options", "only for a stream")
        if not 1 <= self.n <= limits.MAX_CHOICES:
            raise FieldError("n", f"outside 1 to {limits.MAX_CHOICES}")

    @property
    def continues(self) -> bool:
        """Whether the answer goes on within the prompt's text, so that a space between them counts."""
        return False

    @abstractmethod
    def prompts(
        self, tokenizer: Tokenizer, *, control_tokens: bool = False, options: Mapping[str, Any] | None = None
    ) -> list[list[int]]:
        """The prompts' token ids. Special tokens in messages are text, unless `control_tokens`.

        `options` of the chat template are the server's; the request's own come first.

        Raises InputError (no template, refused by the template, too long), ArtefactError (the template fails).
        """

    def recorder(self) -> LogprobRecorder | None:
        """What collects log-probabilities of one answer; None where they are not asked for."""
        return None

    @property
    def top(self) -> int | None:
        """How many of the most likely tokens to show at each place; None where no log-probabilities are shown."""
        return None

    def echoed(self, tokenizer: Tokenizer, number: int) -> str:
        """The text of prompt `number` where it is to be repeated before its answer, or "" """
        return ""

    def call_grammar(self, tokenizer: Tokenizer, grammars: Callable[[], Grammars]) -> tuple[CallFormat, Grammar] | None:
        """The format and the grammar of an answer that may call tools; None where it may not. Raises InputError."""
        return None

    def notes(self, tokenizer: Tokenizer, options: Mapping[str, Any] | None = None) -> list[str]:
        """What the client should know of how its prompt was understood."""
        return []

    def grammar(self, grammars: Callable[[], Grammars]) -> Grammar | None:
        """The compiled `response_format` or `regex`, or None. Raises InputError, MissingExtraError."""
        field = "response_format" if self.regex is None else "regex"
        try:
            return self._grammar(grammars)
        except InputError as error:
            raise FieldError(field, error.message) from None

    def _grammar(self, grammars: Callable[[], Grammars]) -> Grammar | None:
        response_format = self.response_format or ResponseFormat(type="text")
        if self.regex is not None:
            if response_format.type != "text":
                raise InputError("regex and response_format cannot be combined", "give one")
            return grammars().regex(self.regex)
        if response_format.type == "json_schema":
            if response_format.json_schema is None:
                raise InputError("response_format.json_schema is missing", "give the schema")
            return grammars().json_schema(response_format.json_schema.schema_)
        any_object = response_format.schema_ or ANY_OBJECT
        return grammars().json_schema(any_object) if response_format.type == "json_object" else None

    def stop_strings(self) -> list[str]:
        """The stop strings as a list, possibly empty."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


Q = TypeVar("Q", bound=Checked)


def parse(kind: type[Q], body: bytes) -> Q:
    """Parse a request's JSON. Raises InputError that names the wrong field."""
    try:
        request = kind.model_validate_json(body)
    except ValidationError as error:
        # A value of two possible types has errors for both. The deepest error belongs to the type that fits better.
        deepest = max(error.errors(include_url=False, include_input=False), key=lambda entry: len(entry["loc"]))
        where = ".".join(str(part) for part in deepest["loc"] if "[" not in str(part))  # without names of lists' types
        message = deepest["msg"].removeprefix("Value error, ")
        code = "unknown_parameter" if deepest["type"] == "extra_forbidden" else None
        raise (FieldError(where, message, code) if where else InputError(message, "see docs/runtime.md")) from None
    request.check()
    return request
