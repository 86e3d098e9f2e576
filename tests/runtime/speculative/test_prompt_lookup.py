"""Prompt lookup against its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from merino_edge.runtime.speculative.prompt_lookup import NGRAMS, PromptLookup


@given(ids=st.lists(st.integers(0, 3), max_size=60), max_tokens=st.integers(1, 8))
def test_it_proposes_what_followed_the_longest_earlier_ngram(ids: list[int], max_tokens: int) -> None:
    lookup = PromptLookup()
    for token in ids:
        lookup.push(token)
    expected: list[int] = []
    for n in NGRAMS:
        positions = [end for end in range(n, len(ids)) if ids[end - n : end] == ids[len(ids) - n :]]
        if positions:
            expected = ids[positions[-1] : positions[-1] + max_tokens]
            break
    assert lookup.propose(max_tokens) == expected
