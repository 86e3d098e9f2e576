"""The token ids of a prompt as a program may give them: whole numbers of Python or NumPy, in any sequence."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import SupportsIndex

from merino_edge.errors import InputError


def as_ids(prompt: Iterable[SupportsIndex]) -> list[int]:
    """`prompt` as a list of token ids. Raises InputError for a text, and for what is no whole number."""
    if isinstance(prompt, str):
        raise InputError("the prompt is a text in place of token ids", "give tokenizer.encode(TEXT)")
    ids = []
    try:
        for token in prompt:
            if isinstance(token, bool):
                raise TypeError
            ids.append(operator.index(token))
    except TypeError:
        raise InputError("the prompt is no sequence of token ids", "give tokenizer.encode(TEXT)") from None
    return ids
