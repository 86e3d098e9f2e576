"""Call parser: pieces of an answer's text in, text and tool calls out, as soon as they are certain.

The answer follows the grammar of its format (merino_edge.runtime.call_format), so the parser only has to find where
each part ends. Where the answer is cut, its last call stays unfinished, and the parser says so.
"""

from __future__ import annotations

import secrets
from dataclasses import dataclass, field
from typing import Literal

from merino_edge.runtime.call_format import NAME, CallFormat


@dataclass
class Call:
    """A call, perhaps still without some of its arguments."""

    name: str
    arguments: str = ""
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


@dataclass(frozen=True)
class Part:
    """News of an answer: more `text` outside calls, or of the arguments of call `index`. A call's first is empty."""

    text: str
    index: int | None = None


class CallParser:
    """The text and the calls of one answer. `content` and `calls` hold what has been found so far."""

    def __init__(self, form: CallFormat) -> None:
        self.content = ""
        self.calls: list[Call] = []
        self._form, self._buffer, self._space = form, "", ""  # the space before a call is left out
        self._state: Literal["text", "opening", "name", "arguments", "after"] = "text"
        self._depth, self._in_string, self._escaped = 0, False, False

    @property
    def is_cut(self) -> bool:
        """Whether a call has begun that has not ended."""
        return self._state in ("opening", "name", "arguments") or (self._state == "after" and not self._ended())

    def push(self, piece: str) -> list[Part]:
        """Add a piece of the answer and return what is certain now."""
        self._buffer += piece
        parts: list[Part] = []
        while self._advance(parts):
            pass
        return parts

    def finish(self) -> list[Part]:
        """Return the rest of the text, once the answer has ended."""
        if self._state != "text":
            return []
        parts, self._buffer = self._text(self._buffer), ""
        return parts

    def _advance(self, parts: list[Part]) -> bool:
        """Take the next element from the buffer. Returns False where more is needed."""
        if self._state == "text":
            return self._find_trigger(parts)
        if self._state == "opening":
            return self._open(parts)
        if self._state == "name":
            name, key, _ = self._buffer.partition(self._form.key)
            if not key:
                return False
            self._buffer = self._buffer[len(name) + len(key) :]
            self.calls.append(Call(name))
            parts.append(Part("", len(self.calls) - 1))
            self._state = "arguments"
            return True
        if self._state == "arguments":
            return self._take_arguments(parts)
        if self._state == "after" and self._form.between is not None:
            following = f"}}{self._form.between}{NAME}"
            if self._buffer.startswith(following):
                self._buffer, self._state = self._buffer[len(following) :], "name"
                return True
        return False

    def _find_trigger(self, parts: list[Part]) -> bool:
        trigger = self._form.trigger
        if not trigger:  # the answer is a call from its start, or not at all
            if self.content or not self._buffer:
                parts += self._text(self._buffer)
                self._buffer = ""
                return False
            at, trigger = (0, NAME[0]) if self._buffer.startswith(NAME[0]) else (-1, NAME[0])
        else:
            at = self._buffer.find(trigger)
        if at >= 0:
            before = self._buffer[:at].rstrip()
            parts += self._text(before)
            self._space, self._buffer, self._state = self._buffer[len(before) : at], self._buffer[at:], "opening"
            return True
        certain = self._buffer[: len(self._buffer) - _overlap(self._buffer, trigger)].rstrip()
        parts += self._text(certain)
        self._buffer = self._buffer[len(certain) :]
        return False

    def _open(self, parts: list[Part]) -> bool:
        opening = self._form.begin + NAME
        if self._buffer.startswith(opening):
            self._buffer, self._state = self._buffer[len(opening) :], "name"
            return True
        if not opening.startswith(self._buffer):  # the text spells the trigger's token out
            length = len(self._form.trigger) or 1
            parts += self._text(self._space + self._buffer[:length])
            self._buffer, self._state = self._buffer[length:], "text"
            return True
        return False

    def _take_arguments(self, parts: list[Part]) -> bool:
        end = next((i + 1 for i, character in enumerate(self._buffer) if self._closes(character)), None)
        taken = self._buffer[:end]
        self._buffer = self._buffer[len(taken) :]
        self.calls[-1].arguments += taken
        if taken:
            parts.append(Part(taken, len(self.calls) - 1))
        if end is not None:
            self._state = "after"
        return end is not None

    def _closes(self, character: str) -> bool:
        """Whether this character of the arguments is their last."""
        if self._in_string:
            if self._escaped:
                self._escaped = False
            elif character == "\\":
                self._escaped = True
            elif character == '"':
                self._in_string = False
        elif character == '"':
            self._in_string = True
        elif character in "{[":
            self._depth += 1
        elif character in "}]":
            self._depth -= 1
            return self._depth == 0
        return False

    def _ended(self) -> bool:
        """Whether all that follows the last call's arguments has come."""
        return self._buffer == "}" + self._form.end

    def _text(self, text: str) -> list[Part]:
        self.content += text
        return [Part(text)] if text else []


def _overlap(text: str, trigger: str) -> int:
    """Length of the longest suffix of `text` that is a prefix of `trigger`."""
    return next((n for n in range(min(len(trigger) - 1, len(text)), 0, -1) if text.endswith(trigger[:n])), 0)
