"""The language of chat templates: what transformers adds to Jinja, and what a template's own refusal is.

Added are the tags `generation`, `break` and `continue`, the functions `raise_exception` and `strftime_now`, and a
`tojson` that neither escapes for web pages nor sorts. Source: render_jinja_template of transformers 5. This module
bounds nothing (merino_edge.chat_template does), except the pattern of a date.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, LoopControlExtension
from jinja2.parser import Parser

DATE_PATTERN = re.compile(r"(?:[^%]|%[-_0^#]?[a-zA-Z%]){0,200}")  # a width, as in %9d, could be a gigabyte


class Refusal(jinja2.TemplateError):
    """What a template says by `raise_exception`: it does not take this conversation."""


class GenerationTag(Extension):
    """{% generation %} ... {% endgeneration %} marks the assistant's words for training. It renders what is in it."""

    tags = {"generation"}  # noqa: RUF012  as Jinja declares it

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A block of its own, so that a variable set in it ends with it, as in transformers.
        return nodes.CallBlock(self.call_method("_unchanged"), [], [], body).set_lineno(line)

    def _unchanged(self, caller: Callable[[], str]) -> str:
        return caller()


EXTENSIONS = (GenerationTag, LoopControlExtension)


def tojson(
    value: Any,
    ensure_ascii: bool = False,  # noqa: FBT001, FBT002  templates give it by place
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,  # noqa: FBT001, FBT002
) -> str:
    """The filter `tojson`: plain JSON, in the order of the keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def raise_exception(message: Any = "") -> None:
    """Refuse the conversation, in the template's words."""
    raise Refusal(str(message))


def strftime_now(pattern: str) -> str:
    """Today's date by a pattern of strftime. Raises ValueError for a pattern with widths, or a long one."""
    if not DATE_PATTERN.fullmatch(pattern):
        raise ValueError("strftime_now gets no plain pattern of a date")
    return datetime.now().strftime(pattern)
