"""Constrained decoding: restricts an answer to a JSON schema or a regular expression.

A grammar masks the logits of all tokens that may not come next. The grammar engine is llguidance (the extra
`grammar`). It never fetches a schema's references, and it bounds the cost of a grammar. JSON gets one space after a
comma or colon and no other white space, because small models would write white space without end. For the same reason
`json_schema` bounds what a schema leaves open. A form that the engine gives up on is refused before an answer begins:
a few steps are tried first.
"""

from __future__ import annotations

import json
import random
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge import limits
from merino_edge.errors import ArtefactError, InputError, require
from merino_edge.foreign_call import call
from merino_edge.runtime.engine import Logits
from merino_edge.runtime.json_schema.preparation import prepare
from merino_edge.strict_json import parse_bounded
from merino_edge.tokenizer import Tokenizer

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

JSON_FORM: Any = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
# No \uXXXX: a name could be spelled with it to pass for another one. Characters are written as they are.
JSON_FORM |= {"json_allowed_escapes": 'nrbtf\\"'}
ANY_OBJECT = {"type": "object"}
COMPILE_SECONDS = 4.0
TRIED_STEPS = 12  # of an answer, before it begins
# Of the parser. The engine's own are passed by 500 optional properties; a schema of MAX_GRAMMAR_CHARACTERS has 4,000.
MOST_ITEMS_IN_ROW, MOST_ITEMS_IN_STEP = 20_000, 200_000


class Constraint:
    """The state of one answer within a grammar."""

    def __init__(self, matcher: LLMatcher, vocab_size: int) -> None:
        self._matcher = matcher
        self._bits = np.zeros((vocab_size + 31) // 32, np.int32)

    def masked(self, logits: Logits) -> Logits:
        """A copy of `logits` [V] with -infinity for all tokens that may not come next."""
        self._matcher.unsafe_compute_mask_ptr(self._bits.ctypes.data, self._bits.nbytes)
        self._check()
        allowed = np.unpackbits(self._bits.view(np.uint8), bitorder="little", count=logits.size)
        return np.where(allowed.view(np.bool_), logits, np.float32(-np.inf))

    @property
    def is_met(self) -> bool:
        """Whether the answer so far is whole: it may end here."""
        return bool(self._matcher.is_accepting())

    def push(self, token: int) -> bool:
        """Add the sampled token. Returns True if nothing may follow it."""
        self._matcher.consume_token(token)
        self._check()
        return bool(self._matcher.is_stopped())

    def _check(self) -> None:
        if self._matcher.is_error():
            raise InputError(f"the form cannot be followed ({_line(self._matcher.get_error())})", "use a simpler one")


class Grammar:
    """A compiled schema or regular expression. It may be used for any number of answers.

    `notes` say what of a schema its answers are not held to.
    """

    def __init__(self, matcher: LLMatcher, vocab_size: int, notes: tuple[str, ...] = ()) -> None:
        self._matcher, self._vocab_size, self.notes = matcher, vocab_size, notes

    def begin(self) -> Constraint:
        """The constraint of a new answer."""
        return Constraint(self._matcher.deep_copy(), self._vocab_size)


class Grammars:
    """Compiles schemas and regular expressions for one tokenizer."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        """`vocab_size` is the number of logits. Raises MissingExtraError without llguidance."""
        require("llguidance", "grammar")
        self._tokenizer, self._vocab_size = tokenizer, vocab_size
        self._native: LLTokenizer | None = None  # built on first use: a third of a second for 50,000 tokens

    def json_schema(self, schema: str | dict[str, Any]) -> Grammar:
        """Compile a JSON schema. Raises InputError where it is not JSON, too long or cannot be held."""
        from llguidance import LLMatcher

        try:
            text = schema if isinstance(schema, str) else json.dumps(schema)
            check_size(text)
            parsed = parse_bounded(text.removeprefix("\ufeff"))
            if not isinstance(parsed, dict):
                raise ValueError("it is of another type")
            prepared = prepare(parsed)
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(prepared.schema), defaults=JSON_FORM)
        except (ValueError, RecursionError) as error:
            reason = _line(str(error))
            raise InputError(f"the schema is no JSON object ({reason})", "give a JSON schema") from None
        return self._compiled(grammar, "JSON schema", prepared.notes)

    def regex(self, pattern: str) -> Grammar:
        """Compile a regular expression in Rust's syntax. Raises InputError where it is too long or not valid."""
        from llguidance import LLMatcher

        check_size(pattern)
        return self._compiled(LLMatcher.grammar_from_regex(pattern), "regular expression")

    def lark(self, text: str) -> Grammar:
        """Compile a grammar in llguidance's Lark, such as that of tool calls. Raises InputError."""
        from llguidance import LLMatcher

        check_size(text)
        return self._compiled(LLMatcher.grammar_from_lark(text), "grammar")

    def _compiled(self, grammar: str, kind: str, notes: tuple[str, ...] = ()) -> Grammar:
        from llguidance import LLTokenizer

        if self._native is None:
            ends = list(self._tokenizer.chat.eos_token_ids) or None
            text = self._tokenizer.backend.to_str()
            make = partial(LLTokenizer, text, n_vocab=self._vocab_size, eos_token=ends)
            self._native = call(make, "this tokenizer cannot follow a form", "leave the form out", quiet=True)
        try:
            tried = partial(self._tried, grammar)
            simpler = "use a simpler one"
            matcher, reason = call(tried, f"this {kind} fails", simpler, seconds=COMPILE_SECONDS, quiet=True)
        except ArtefactError as error:  # it is the form that fails, and whoever asks gave it
            raise InputError(error.message, error.hint) from None
        if reason:
            raise InputError(f"this {kind} cannot be used ({_line(reason)})", "see docs/runtime.md")
        return Grammar(matcher, self._vocab_size, notes)

    def _tried(self, grammar: str) -> tuple[LLMatcher, str]:
        """A matcher, and why it cannot be used: some forms fail only in an answer. Some steps of one are tried."""
        from llguidance import LLMatcher, LLParserLimits

        most = LLParserLimits(max_items_in_row=MOST_ITEMS_IN_ROW, step_max_items=MOST_ITEMS_IN_STEP)
        matcher = LLMatcher(self._native, grammar, log_level=0, limits=most)  # type: ignore[arg-type]
        trial, rng = matcher.deep_copy(), random.Random(0)
        bits = np.zeros((self._vocab_size + 31) // 32, np.int32)
        for _ in range(TRIED_STEPS):
            if trial.is_error() or trial.is_stopped():
                break
            trial.unsafe_compute_mask_ptr(bits.ctypes.data, bits.nbytes)
            allowed = np.flatnonzero(np.unpackbits(bits.view(np.uint8), bitorder="little", count=self._vocab_size))
            if trial.is_error() or not allowed.size:
                break
            trial.consume_token(int(rng.choice(allowed)))
        return matcher, trial.get_error() or matcher.get_error()


def check_size(text: str) -> None:
    """Raise InputError for a form that is too long, or not valid UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InputError("the form is not valid UTF-8", "convert it, for example with iconv") from None
    if len(text) > limits.MAX_GRAMMAR_CHARACTERS:
        raise InputError(f"a form of more than {limits.MAX_GRAMMAR_CHARACTERS} characters", "see merino_edge/limits.py")


def _line(text: str) -> str:
    return " ".join(text.split())[:200]
