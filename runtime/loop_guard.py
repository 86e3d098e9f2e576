"""Keeps an answer from repeating itself for ever: a token that would go on with a repeated sequence gets less likely.

The last tokens of an answer may have stood in it before. Each such place takes from the logit of the token that
followed there. The longer the two sequences agree, the more it takes. An answer without repeated sequences is not
changed at all. The prompt does not count, so it can be quoted. Source: DRY ("don't repeat yourself") of llama.cpp and
text-generation-webui, which count the prompt and the longest place only.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence

LEAST = 4  # tokens that agree; "\n* **" and the like are shorter
GROWTH = 1.5  # for each further token that agrees
LONGEST, MOST_PLACES = 32, 16  # tokens that are compared, and newest places
LARGEST = 100.0  # more than logits are apart


class LoopGuard:
    """What repeats in one answer. It reads the answer's tokens as they come."""

    def __init__(self, strength: float) -> None:
        """`strength` is taken from a logit where LEAST tokens agree, for each such place. 0: nothing is."""
        self._strength = strength
        self._places: dict[tuple[int, ...], list[int]] = defaultdict(list)  # where a sequence of LEAST tokens ends
        self._read = 0  # tokens of the answer that are in `_places`

    def penalties(self, tokens: Sequence[int]) -> Mapping[int, float]:
        """What to take from the logits after the answer `tokens`, by token id."""
        length = len(tokens)
        if self._strength == 0 or length <= LEAST:
            return {}
        if length < self._read:  # another answer
            self._places.clear()
            self._read = 0
        for end in range(max(self._read, LEAST), length):
            self._places[tuple(tokens[end - LEAST : end])].append(end)
        self._read = length
        found: dict[int, float] = {}
        for end in self._places.get(tuple(tokens[length - LEAST :]), ())[-MOST_PLACES:]:
            agree = LEAST
            while agree < min(end, LONGEST) and tokens[end - 1 - agree] == tokens[length - 1 - agree]:
                agree += 1
            taken = found.get(tokens[end], 0.0) + self._strength * GROWTH ** (agree - LEAST)
            found[tokens[end]] = min(taken, LARGEST)
        return found
