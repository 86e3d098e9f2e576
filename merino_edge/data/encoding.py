"""Records to tokens: plain text and conversations in order, in batches for the tokenizer's threads.

A document ends with an end token and, where the tokenizer has a BOS, begins with that. This module knows no files.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from merino_edge.data import bpe, conversation
from merino_edge.data.bpe import END_OF_TEXT
from merino_edge.data.conversation import Rendered
from merino_edge.data.records import Conversation, Record
from merino_edge.errors import InputError
from merino_edge.tokenizer import ChatFormat, Tokenizer

BATCH_CHARACTERS = 2**22
BATCH_RECORDS = 2**13


@dataclass(frozen=True)
class Encoded:
    """Token ids [N] and their loss mask [N] bool. In plain text all tokens are learned, and the mask is None."""

    ids: np.ndarray
    learned: np.ndarray | None = None


class Encoder:
    """Turns records into tokens.

    `chat` is the chat format for the model. From the first conversation on it is ChatML, where the tokenizer's own
    format does not mark roles. `unanswered` counts the conversations that are left out.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Raises InputError for a tokenizer without a token that ends a document."""
        self.tokenizer = tokenizer
        self.unanswered = self.records = 0  # how many were read
        end = tokenizer.backend.token_to_id(END_OF_TEXT)
        eos = tokenizer.chat.eos_token_ids
        if end is None and not eos:
            raise InputError("the tokenizer has no token that ends a document", "use a tokenizer with one")
        self.end_of_text = int(eos[0] if end is None else end)
        self._begins = True  # the next piece of text is the beginning of a document
        self._has_conversations = False

    @property
    def chat(self) -> ChatFormat:
        """The chat format for the model."""
        return self.tokenizer.chat

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from, after a batch."""
        names = ("records", "unanswered", "_begins", "_has_conversations")
        return {name.removeprefix("_"): getattr(self, name) for name in names}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on after the batch after which `state` was taken."""
        self.records, self.unanswered, self._begins = state["records"], state["unanswered"], state["begins"]
        if state["has_conversations"]:
            self._expect_conversations()

    def encode(self, records: Iterable[Record]) -> Iterator[list[Encoded]]:
        """The tokens of the records in order, in batches. After one, `records` is how many records are done.

        Raises InputError for a conversation that the template cannot render.
        """
        waiting: list[str | Rendered] = []
        size = read = 0
        before = self.records
        for read, record in enumerate(records, start=1):
            item = self._rendered(record) if isinstance(record, Conversation) else record
            if item is None:
                self.unanswered += 1
                continue
            waiting.append(item)
            size += len(item.text if isinstance(item, Rendered) else item)
            if size >= BATCH_CHARACTERS or len(waiting) >= BATCH_RECORDS:
                batch, self.records = list(self._encoded(waiting)), before + read
                yield batch
                waiting, size = [], 0
        batch, self.records = list(self._encoded(waiting)), before + read
        yield batch

    def _rendered(self, record: Conversation) -> Rendered | None:
        if not self._has_conversations:
            self._expect_conversations()
        return conversation.rendered(self.tokenizer, record)

    def _expect_conversations(self) -> None:
        self._has_conversations = True
        chat = bpe.for_conversations(self.tokenizer.backend, self.tokenizer.chat)
        self.tokenizer = self.tokenizer.with_chat(chat)

    def _encoded(self, waiting: list[str | Rendered]) -> Iterator[Encoded]:
        """The tokens of a batch. Text is split at END_OF_TEXT, so the tokenizer need not know that token."""
        tokenizer, bos, eos = self.tokenizer, self.chat.bos_token_id, self.chat.eos_token_ids
        plain = iter(
            tokenizer.encode_batch(
                [part for item in waiting if isinstance(item, str) for part in item.split(END_OF_TEXT) if part]
            )
        )
        conversations = iter(
            tokenizer.encode_batch(
                [item.text for item in waiting if isinstance(item, Rendered) and not item.markers], offsets=True
            )
        )
        run: list[int] = []  # of plain text
        for item in waiting:
            if isinstance(item, Rendered):
                if run:
                    yield Encoded(np.array(run, dtype=np.int64))
                    run = []
                made = conversation.encoding_of(tokenizer, item) if item.markers else next(conversations)
                yield Encoded(*conversation.encoded(made, item.spans, bos, eos, self.end_of_text))
                continue
            for number, part in enumerate(item.split(END_OF_TEXT)):
                if number:
                    run.append(self.end_of_text)
                    self._begins = True
                if part:
                    ids = next(plain).ids
                    if self._begins and bos is not None and ids[:1] != [bos]:
                        run.append(bos)
                    run += ids
                    self._begins = False
        if run:
            yield Encoded(np.array(run, dtype=np.int64))
