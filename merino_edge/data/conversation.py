"""A conversation as tokens with a loss mask: only the assistant's words and its end tokens are learned.

The tokenizer's chat template renders the conversation. An assistant's turn begins where the rendered prompt before it
ends, so the template must only append. Text after a turn's last end token (ChatML's line break) is not learned, because
a generating model stops before it. A conversation ends with the assistant: later messages are left out. Where the
template writes no end token there, END_OF_TEXT is added. This module knows no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from merino_edge.data.records import Conversation
from merino_edge.errors import InputError, MerinoError
from merino_edge.tokenizer import Tokenizer

Span = tuple[int, int]  # first and last + 1, in characters


@dataclass(frozen=True)
class Rendered:
    """A conversation as the template renders it, and the spans where the assistant speaks."""

    text: str
    spans: tuple[Span, ...]
    markers: str = ""  # around control tokens that a message spells out; "" where none does


@dataclass(frozen=True)
class Placed:
    """Token ids [N] and the characters (first, last + 1) of each, as `tokenizers` gives them."""

    ids: list[int]
    offsets: list[Span]


def rendered(tokenizer: Tokenizer, conversation: Conversation) -> Rendered | None:
    """The conversation as text; None if the assistant says nothing. Raises InputError naming the conversation."""
    try:
        messages, markers = tokenizer.marked(conversation.messages)
    except MerinoError as error:
        raise InputError(f"{conversation.where}: {error.message}", "leave that text out") from None
    replies = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    text = ""
    spans: list[Span] = []
    for i in replies:
        try:
            prompt = tokenizer.apply_template(messages[:i])
            after = tokenizer.apply_template(messages[: i + 1], add_generation_prompt=False)
        except MerinoError as error:
            raise InputError(
                f"{conversation.where}: {error.message}", "use a tokenizer with another template"
            ) from None
        if not (prompt.startswith(text) and after.startswith(prompt)):
            what = f"{conversation.where}: the chat template does not write a prompt as it writes the conversation"
            raise InputError(what, "use a tokenizer whose template only adds to what it wrote")
        text = after
        spans.append((len(prompt), len(after)))
    return Rendered(text, tuple(spans), markers) if spans else None


def encoding_of(tokenizer: Tokenizer, item: Rendered) -> Placed:
    """The tokens of a conversation with markers. What they stand around is plain text, as in the prompts of a chat."""
    ids, begins = tokenizer.encode_marked(item.text, item.markers)
    return Placed(ids, [(begin, begin) for begin in begins])


def encoded(
    encoding: Any, spans: Sequence[Span], bos: int | None, eos: Sequence[int], end_of_text: int
) -> tuple[np.ndarray, np.ndarray]:
    """The tokens [N] of the rendered text, and the loss mask [N] bool. `encoding` is what `tokenizers` gives for it."""
    ids = np.array(encoding.ids, dtype=np.int64)
    begins = np.array(encoding.offsets, dtype=np.int64).reshape(-1, 2)[:, 0]  # [N] characters
    learned = np.zeros(len(ids), dtype=bool)
    ends = np.flatnonzero(np.isin(ids, eos))
    ended = False
    for first, stop in np.searchsorted(begins, np.array(spans)):
        inside = np.searchsorted(ends, (first, stop))  # the end tokens within the turn
        ended = bool(inside[0] < inside[1])
        learned[first : ends[inside[1] - 1] + 1 if ended else stop] = True
    if not ended:
        ids, learned = np.append(ids, end_of_text), np.append(learned, True)
    if bos is not None and ids[0] != bos:
        ids, learned = np.insert(ids, 0, bos), np.insert(learned, 0, False)
    return ids, learned
