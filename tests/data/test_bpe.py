"""Training a tokenizer: what goes wrong in the library's own code is one line."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

pytest.importorskip("tokenizers")

from merino_edge.data.bpe import SMALLEST_VOCABULARY, train_tokenizer
from merino_edge.errors import ArtefactError, InputError


class Panic(BaseException):
    """As a panic in Rust arrives: no Exception."""


def texts(failure: BaseException) -> Iterator[str]:
    yield "One morning a dog ran."
    raise failure


def test_a_panic_of_the_library_is_one_line() -> None:
    # With 8 MB of address space left, the library cannot start its threads, and panics.
    with pytest.raises(ArtefactError, match=re.escape("the tokenizer cannot be trained (no threads)")):
        train_tokenizer(texts(Panic("no threads")), SMALLEST_VOCABULARY + 10)


@pytest.mark.parametrize("failure", [InputError("an unreadable text", "give another"), KeyboardInterrupt()])
def test_what_the_texts_raise_is_passed_on(failure: BaseException) -> None:
    with pytest.raises(type(failure)):
        train_tokenizer(texts(failure), SMALLEST_VOCABULARY + 10)
