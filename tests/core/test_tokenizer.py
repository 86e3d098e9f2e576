"""A compacted tokenizer.json gives the same tokenizer."""

from __future__ import annotations

import json

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from merino_edge.data.bpe import train_tokenizer
from merino_edge.errors import ArtefactError
from merino_edge.tokenizer import compact

TRAINED = train_tokenizer(iter(["the moon, the sun and the moon's moon; žluťoučký kůň úpěl 1234 times\n" * 3]), 330)


@given(st.text())
def test_a_compact_tokenizer_encodes_alike(text: str) -> None:
    small = tokenizers.Tokenizer.from_str(compact(TRAINED.to_str(pretty=True), "t"))
    assert small.encode(text).ids == TRAINED.encode(text).ids
    assert small.get_vocab() == TRAINED.get_vocab()


def test_it_takes_far_fewer_bytes_and_stays_as_it_is() -> None:
    once = compact(TRAINED.to_str(pretty=True), "t")
    assert len(once) < 0.5 * len(TRAINED.to_str(pretty=True))
    assert compact(once, "t") == once


def test_merges_of_tokens_with_spaces_stay_pairs() -> None:
    spaced = {"model": {"merges": [["a b", "c"], ["d", "e"]]}}
    assert json.loads(compact(json.dumps(spaced), "t")) == spaced


def test_what_is_no_json_is_refused() -> None:
    with pytest.raises(ArtefactError, match="here is not valid JSON"):
        compact("{", "here")
