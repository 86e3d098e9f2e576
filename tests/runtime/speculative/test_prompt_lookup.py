"""Prompt lookup against its definition."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from merino_edge.runtime.speculative.prompt_lookup import NGRAMS, PromptLookup


@given(ids=st.lists(st.integers(0, 3), max_size=60), most=st.integers(1, 8))
def test_a_guess_is_what_followed_the_longest_run_that_came_before(ids: list[int], most: int) -> None:
    lookup = PromptLookup()
    for token in ids:
        lookup.push(token)
    expected: list[int] = []
    for n in NGRAMS:
        places = [end for end in range(n, len(ids)) if ids[end - n : end] == ids[len(ids) - n :]]
        if places:
            expected = ids[places[-1] : places[-1] + most]
            break
    assert lookup.propose(most) == expected
