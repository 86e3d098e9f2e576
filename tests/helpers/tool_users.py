"""Requests with tools, and servers whose template has words of its own for calls."""

from __future__ import annotations

import tokenizers

from merino_edge.tokenizer import ChatFormat, Tokenizer

WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "Tells the weather.",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Ulm", "Köln"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NOW = {"type": "function", "function": {"name": "now"}}
TEMPLATE = """{% for t in tools or [] %}[{{ t | tojson }}]{% endfor %}{% for m in messages %}<{{ m.role }}>
{{- " " + m.content }}
{%- for c in m.tool_calls or [] %}{{ c.function.name }}{{ c.function.arguments | tojson }}{% endfor %}
{% endfor %}{% if add_generation_prompt %}<assistant> {% endif %}"""
MISTRAL = "[TOOL_CALLS] ["


def mistral_like(tokenizer: Tokenizer) -> Tokenizer:
    """The small tokenizer with [TOOL_CALLS] as special token 1, an end token, and a template of that kind."""
    backend = tokenizers.Tokenizer.from_str(tokenizer.backend.to_str().replace("<|im_start|>", "[TOOL_CALLS]"))
    written = "{% if false %}" + MISTRAL + "{% endif %}"
    return Tokenizer(backend, ChatFormat((2,), None, TEMPLATE + written))


def hermes_like(tokenizer: Tokenizer) -> Tokenizer:
    """The small tokenizer with an end token, and a template that knows tools."""
    return tokenizer.with_chat(ChatFormat((2,), None, TEMPLATE))
