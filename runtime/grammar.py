"""Answers of a given form: a JSON schema or a regular expression, as the tokens that may come next.

The grammar engine is llguidance (the extra `grammar`): it never fetches what a schema refers to, and bounds what a
grammar may cost. JSON is written with one space after a comma or colon and no other: where white space is free, small
models write it for ever.
"""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge import limits
from merino_edge.errors import InputError, require
from merino_edge.runtime.engine import Logits
from merino_edge.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
ANY_OBJECT = {"type": "object"}


class Constraint:
    """One answer on its way through a grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)

    def masked(self, logits: Logits) -> Logits:
        """A copy of `logits` [V] in which what may not come next is infinitely unlikely."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=logits.size)
        return np.where(allowed.view(np.bool_), logits, np.float32(-np.inf))

    def push(self, token: int) -> bool:
        """Take the token that was chosen; True when nothing may follow it."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the form cannot be followed ({_line(self._matcher.get_error())})", "use a simpler one")


class Grammar:
    """A form, compiled for a vocabulary. Any number of answers may take it."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher, self._vocab_size = matcher, vocab_size

    def begin(self) -> Constraint:
        return Constraint(self._matcher.deep_copy(), self._vocab_size)


class Grammars:
    """Compiles forms for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size`: of the logits. Raises MissingExtraError."""
        require("llguidance", "grammar")
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._native: LLTokenizer | None = None  # a third of a second for fifty thousand tokens

    def json_schema(self, schema: str | dict[str, Any]) -> Grammar:
        """Raises InputError: no JSON, no schema, or one that is not understood."""
        from llguidance import LLMatcher

        _check_size(schema if isinstance(schema, str) else json.dumps(schema))
        try:
            grammar = LLMatcher.grammar_from_json_schema(schema, defaults=JSON_FORM)
        except ValueError as error:
            raise InputError(f"the schema is no JSON object ({_line(str(error))})", "give a JSON schema") from None
        return self._compiled(grammar, "JSON schema")

    def regex(self, pattern: str) -> Grammar:
        """Of Rust's syntax. Raises InputError."""
        from llguidance import LLMatcher

        _check_size(pattern)
        return self._compiled(LLMatcher.grammar_from_regex(pattern), "regular expression")

    def _compiled(self, grammar: str, kind: str) -> Grammar:
        from llguidance import LLMatcher, LLTokenizer

        if self._native is None:
            ends = list(self._tokenizer.chat.eos_token_ids) or None
            text = self._tokenizer.backend.to_str()
            self._native = LLTokenizer(text, n_vocab=self._vocab_size, eos_token=ends)
        matcher = LLMatcher(self._native, grammar, log_level=0)
        if matcher.is_error():
            raise InputError(f"this {kind} cannot be used ({_line(matcher.get_error())})", "see docs/runtime.md")
        return Grammar(matcher, self._vocab_size)


def _check_size(text: str) -> None:
    if len(text) > limits.MAX_GRAMMAR_CHARACTERS:
        raise InputError(f"a form of more than {limits.MAX_GRAMMAR_CHARACTERS} characters", "see merino_edge/limits.py")


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
