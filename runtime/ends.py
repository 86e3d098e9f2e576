"""Which tokens end an answer, and from when on. Knows no engine and no text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from merino_edge import limits
from merino_edge.errors import InputError
from merino_edge.runtime.engine import Logits


@dataclass(frozen=True)
class Ends:
    """`token_ids` end an answer beside the model's own end tokens.

    None of them comes before `min_tokens`, and the model's own never with `ignore_eos`: their probability is zero
    then. What a form demands comes first.
    """

    token_ids: tuple[int, ...] = ()
    min_tokens: int = 0
    ignore_eos: bool = False

    @property
    def forbids_some(self) -> bool:
        """Whether end tokens are forbidden at any time."""
        return self.min_tokens > 0 or self.ignore_eos

    def check(self, vocab_size: int) -> None:
        """Raise InputError for ids outside the vocabulary and lengths outside their range."""
        limits.check_range("min_tokens", self.min_tokens, 0, limits.MAX_NEW_TOKENS)
        for token in self.token_ids:
            if not 0 <= token < vocab_size:
                raise InputError(f"stop_token_ids has token {token}", f"give ids of 0 to {vocab_size - 1}")

    def ids(self, own: Iterable[int]) -> set[int]:
        """All tokens that end an answer. `own` are the model's."""
        return {*self.token_ids, *(() if self.ignore_eos else own)}

    def masked(self, logits: Logits, own: Iterable[int], count: int) -> Logits:
        """A copy of `logits` [V] without the end tokens that may not come after `count` tokens.

        Where nothing else may come, because a form is complete, it is `logits` themselves.
        """
        forbidden = {*own} if self.ignore_eos else set()
        if count < self.min_tokens:
            forbidden |= {*own, *self.token_ids}
        if not forbidden:
            return logits
        masked = logits.copy()
        masked[list(forbidden)] = -np.inf
        return masked if masked.max() > -np.inf else logits
