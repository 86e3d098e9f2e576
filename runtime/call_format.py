"""Formats of tool calls: how the calls of an answer are written, one for each family of chat templates.

A call is a JSON object with the function's name and its arguments. Formats differ in what stands around the calls. The
template's own text says which one its model was trained on. A grammar then holds the answer to that format from the
first character of a call, and its arguments to the function's schema. Knows no HTTP.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from merino_edge import chat_template
from merino_edge.runtime.grammar import JSON_FORM, check_size
from merino_edge.runtime.json_schema.preparation import prepare
from merino_edge.tokenizer import Tokenizer

MOST_CALLS = 16  # in one answer: a small model would go on for ever
COMBINED = ("$ref", "allOf", "anyOf", "oneOf", "patternProperties", "unevaluatedProperties", "if")
NAME = '{"name": "'  # every call begins so


@dataclass(frozen=True)
class Function:
    """A function that may be called, and the JSON schema of its arguments, an object."""

    name: str
    parameters: dict[str, Any]


@dataclass(frozen=True)
class CallFormat:
    """`begin` calls[0] `between` calls[1] ... `end`. Without `between` there is one call in an answer."""

    begin: str
    end: str
    between: str | None
    arguments: str = "arguments"  # the key of the arguments
    short_ids: bool = False  # the template wants ids of nine letters and digits

    @property
    def key(self) -> str:
        """What stands between a function's name and its arguments."""
        return f'", "{self.arguments}": '

    @property
    def trigger(self) -> str:
        """What begins a call in a text. A format without one begins at the answer's first character."""
        return self.begin.rstrip(" [\n")

    def call(self, name: str, arguments: Any) -> str:
        """One call, as an answer writes it."""
        return f"{NAME}{name}{self.key}{json.dumps(arguments, ensure_ascii=False)}}}"

    def text(self, calls: Sequence[tuple[str, Any]]) -> str:
        """The calls, (name, arguments) each, as an answer writes them."""
        between = self.end + self.begin if self.between is None else self.between
        return self.begin + between.join(self.call(*call) for call in calls) + self.end


HERMES = CallFormat("<tool_call>\n", "\n</tool_call>", "\n</tool_call>\n<tool_call>\n")  # Qwen, SmolLM3, EXAONE
LLAMA = CallFormat("", "", None, "parameters")
MISTRAL = CallFormat("[TOOL_CALLS] [", "]", ", ", short_ids=True)
MISTRAL_DENSE = CallFormat("[TOOL_CALLS][", "]", ", ", short_ids=True)
GRANITE = CallFormat("<|tool_call|>[", "]", ", ")
LFM2 = CallFormat("<|tool_call_start|>[", "]<|tool_call_end|>", ", ")
WRITTEN = {  # what the templates of each format write
    "<tool_call>": HERMES,
    "[TOOL_CALLS] [": MISTRAL,
    "[TOOL_CALLS]": MISTRAL_DENSE,
    "[AVAILABLE_TOOLS]": MISTRAL,
    "<|tool_call_start|>": LFM2,
    "<|tool_call|>": GRANITE,
    '"parameters": ': LLAMA,
    "Environment: ipython": LLAMA,
}


@functools.lru_cache(maxsize=4)
def format_of(tokenizer: Tokenizer) -> CallFormat:
    """The format of a tokenizer's chat template. Hermes' is the default, for templates that know no calls too."""
    written = chat_template.literals(tokenizer.chat.chat_template or "")
    return next((form for text, form in WRITTEN.items() if text in written), HERMES)


def control_tokens(form: CallFormat, tokenizer: Tokenizer) -> dict[str, int]:
    """The format's words that are tokens of their own, such as [TOOL_CALLS]."""
    text = f"{form.begin}{form.between}{form.end}"
    added = tokenizer.backend.get_added_tokens_decoder()
    return {token.content: i for i, token in added.items() if token.content in text and not token.content.isspace()}


def grammar(
    form: CallFormat,
    functions: Sequence[Function],
    tokenizer: Tokenizer,
    *,
    forced: bool,
    parallel: bool,
    answer: dict[str, Any] | None = None,
) -> str:
    """The grammar of an answer that calls some `functions`, in llguidance's form of Lark.

    Unless calls are `forced`, the answer may be a text, with or without calls behind it. `answer` is the schema of an
    answer that calls nothing. Source: https://github.com/guidance-ai/llguidance/blob/main/docs/syntax.md.
    """
    tokens = control_tokens(form, tokenizer)

    def literal(text: str) -> str:
        parts = re.split("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)", text)
        found = [tokens[word] for word in _words(text, tokens)]
        terms: list[str] = []
        for i, part in enumerate(parts):
            terms += [json.dumps(part)] if part else []
            terms += [f"<[{found[i]}]>"] if i < len(found) else []
        return " ".join(terms)

    calls = "call"
    if parallel and form.between is not None:
        calls = f"call ({literal(form.between)} call){{0,{MOST_CALLS - 1}}}"
    by_token = any(form.trigger.startswith(word) for word in tokens)
    begin, rules = literal(form.begin), [f"calls: {calls} {literal(form.end)}"]
    if forced:
        start = f"{begin} calls"
    elif answer is not None:
        start, rules = f"answer | {begin} calls", [*rules, f"answer: {_json(answer)}"]
    elif not form.trigger:
        start, rules = "TEXT | calls", [*rules, "TEXT: /([^{](.|\\n)*)?/"]
    elif by_token:
        start, rules = f"TEXT | TEXT {begin} calls", [*rules, "TEXT: /(.|\\n)*/"]
    else:
        head = f"head[lazy]: /(.|\\n)*/ {json.dumps(form.trigger)}"
        rest = literal(form.begin[len(form.trigger) :])
        start, rules = f"TEXT | head {rest} calls", [*rules, head, "TEXT: /(.|\\n)*/"]
    rules.append("call: " + " | ".join(f"call{i}" for i in range(len(functions))))
    for i, function in enumerate(functions):
        opening = json.dumps(f"{NAME}{function.name}{form.key}")
        rules.append(f'call{i}: {opening} {_json(_object(function.parameters))} "}}"')
    return "\n".join(["%llguidance {}", f"start: {start}", *rules])


def _words(text: str, tokens: dict[str, int]) -> list[str]:
    pattern = "|".join(map(re.escape, sorted(tokens, key=len, reverse=True)))
    return re.findall(pattern, text) if pattern else []


def _object(parameters: dict[str, Any]) -> dict[str, Any]:
    """The schema of a function's arguments. One that only lists its properties has no others: models invent them."""
    closed = {} if any(word in parameters for word in COMBINED) else {"additionalProperties": False}
    return {"type": "object", **closed, **parameters}


def _json(schema: dict[str, Any]) -> str:
    check_size(json.dumps(schema))
    return "%json " + json.dumps({**prepare(schema).schema, "x-guidance": JSON_FORM})
