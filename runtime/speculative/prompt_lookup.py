"""Guesses from the text so far: after the same few tokens, the same again ("prompt lookup").

Source: prompt lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding. Knows no engine and no text.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence

NGRAMS = (4, 3, 2)  # tokens that must be the same; the longest that is found before counts


class PromptLookup:
    """An index of the last places of all short runs of tokens. Implements merino_edge.runtime.speculative.drafter.Proposer."""

    free = True

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # a run of tokens: the place after its last one

    def begin(self, prompt: Sequence[int], cancel: threading.Event | None = None) -> None:
        self._ids, self._after = [], {}
        for token in prompt:
            self.push(token)

    def push(self, token: int) -> None:
        """Append. A run is indexed once something follows it."""
        end = len(self._ids)
        for n in NGRAMS:
            if end >= n:
                self._after[tuple(self._ids[end - n :])] = end
        self._ids.append(token)

    def propose(self, most: int) -> list[int]:
        """What followed the longest run that ends here when it came before; at most so many tokens, perhaps none."""
        end = len(self._ids)
        for n in NGRAMS:
            if end > n and (place := self._after.get(tuple(self._ids[end - n :]))) is not None:
                return self._ids[place : place + most]
        return []

    def close(self) -> None:
        pass
