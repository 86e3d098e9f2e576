"""Prompt lookup: proposes the tokens that followed the same n-gram earlier in the text.

Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding. Knows no engine and no text,
only token ids.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

NGRAMS = (4, 3, 2)  # n-gram lengths, in the order in which they are looked up


class PromptLookup:
    """An index of n-grams and their last positions. Implements merino_edge.runtime.speculative.drafter.Proposer."""

    free = True

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._next_position: dict[tuple[int, ...], int] = {}  # n-gram -> the position after its last occurrence

    def begin(self, prompt: Sequence[int], cancel: threading.Event | None = None) -> None:
        """Start a new text, which begins with `prompt`."""
        self._ids, self._next_position = [], {}
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """Append a token. The n-grams that end before it are indexed now, because something follows them."""
        end = len(self._ids)
        for n in NGRAMS:
            if end >= n:
                self._next_position[tuple(self._ids[end - n :])] = end
        self._ids.append(token)

    def propose(self, max_tokens: int) -> list[int]:
        """Return up to `max_tokens` tokens that followed the longest known n-gram at the text's end; possibly none."""
        end = len(self._ids)
        for n in NGRAMS:
            if end > n and (position := self._next_position.get(tuple(self._ids[end - n :]))) is not None:
                return self._ids[position : position + max_tokens]
        return []

    def close(self) -> None:
        """Nothing to free."""
