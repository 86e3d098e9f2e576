"""Writes a corpus folder, completely or not at all. Its form stands in merino_edge.data.corpus.

The sources are read once with a given tokenizer, and twice where one is trained on them.
"""

from __future__ import annotations

import itertools
import os
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge import artefact, atomic, limits
from merino_edge.data import bpe, sources
from merino_edge.data.encoding import Encoded, Encoder
from merino_edge.data.records import Conversation, Record
from merino_edge.data.shards import ShardWriter
from merino_edge.data.sources import Source
from merino_edge.errors import InputError
from merino_edge.tokenizer import Tokenizer
from merino_edge.unfinished import Unfinished

if TYPE_CHECKING:
    import tokenizers

KIND = "corpus"
SCHEMA_VERSION = 2
HEADER = "corpus.json"
CONVERSATIONS = "conversations.bin"
SHARD_TOKENS = 2**27  # 256 MiB of uint16
SAVE_SECONDS = 10.0  # between notes of where an interrupted corpus goes on
PROGRESS = "progress"  # the part of an interrupted corpus (merino_edge.unfinished) with the last of them
SPANS = "spans.bin"  # of an interrupted corpus: where its conversations begin and end, in turns


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every token id."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def required_vocab_size(backend: tokenizers.Tokenizer) -> int:
    """The vocabulary size that a model needs for every token of the tokenizer: its largest id + 1."""
    return max(backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1


def write(
    folder: Path,
    from_sources: Sequence[Source],
    *,
    vocab_size: int,
    tokenizer: Tokenizer | None,
    corpus_sha256: str,
    shard_tokens: int,
    on_tokens: Callable[[int], None],
    unfinished: Unfinished | None = None,
) -> None:
    """Make the corpus in `folder`; it replaces a corpus there. `on_tokens` gets the number of tokens written so far.

    With `unfinished` a corpus that was interrupted goes on. Raises InputError for sources without text, OutputError.
    """
    limits.check_range("shard_tokens", shard_tokens, 1, SHARD_TOKENS)
    with atomic.new_folder(folder, KIND) as new:
        if tokenizer is None:
            tokenizer = _trained(from_sources, vocab_size, unfinished)
        encoder = Encoder(tokenizer)
        work = new if unfinished is None else unfinished.folder
        work.mkdir(parents=True, exist_ok=True)
        writer = _restored(work, encoder, token_dtype(vocab_size), shard_tokens, unfinished)
        saved_s = time.monotonic()
        try:
            for batch in encoder.encode(itertools.islice(_records(from_sources), encoder.records, None)):
                for encoded in batch:
                    writer.append(encoded)
                on_tokens(writer.count)
                if unfinished is not None and time.monotonic() - saved_s >= SAVE_SECONDS:
                    unfinished.add(PROGRESS, {"encoder": encoder.state(), "writer": writer.state()})
                    saved_s = time.monotonic()
        except BaseException:
            writer.abandon()
            raise
        if not writer.has_more_than(encoder.end_of_text):
            raise InputError("the corpus holds no text, zero tokens", "give another file or folder")
        header = {
            "vocab_size": vocab_size,
            "tokenizer_tokens": required_vocab_size(tokenizer.backend),
            "unanswered": encoder.unanswered,
            "sources": [source.name for source in from_sources],
            "corpus_sha256": corpus_sha256,
        }
        for name, text in (("tokenizer", tokenizer.backend.to_str()), ("chat", encoder.chat.to_json())):
            artefact.write_text(new / f"{name}.json", text)
            header[f"{name}_sha256"] = artefact.sha256_text(text)
        written = writer.finish()
        if work != new:
            for file in work.glob("*-*.bin"):  # the shards
                os.rename(file, new / file.name)
        if (spans := writer.spans()) is not None:
            artefact.write_bytes(new / CONVERSATIONS, spans)
        artefact.write_json(new / HEADER, KIND, {**header, **written}, SCHEMA_VERSION)


def _restored(
    folder: Path, encoder: Encoder, dtype: np.dtype[Any], shard_tokens: int, unfinished: Unfinished | None
) -> _TokenWriter:
    """The writer in `folder`, and the encoder, where the interrupted run noted them, or at the beginning."""
    progress = {} if unfinished is None else unfinished.parts.get(PROGRESS, {})
    writer = _TokenWriter(folder, dtype, shard_tokens)
    if progress:
        try:
            writer.restore(progress["writer"])
            encoder.restore(progress["encoder"])
            return writer
        except OSError:  # killed while the finished shards were moved to their place
            writer.abandon()
            writer = _TokenWriter(folder, dtype, shard_tokens)
    for file in folder.glob("*.bin"):
        file.unlink()
    return writer


def _records(from_sources: Sequence[Source]) -> Iterator[Record]:
    return (record for source in from_sources for record in source.records())


def _trained(from_sources: Sequence[Source], vocab_size: int, unfinished: Unfinished | None) -> Tokenizer:
    """A tokenizer trained on the sources, with ChatML where they hold a conversation; or that of an interrupted run."""
    import tokenizers

    conversations = False

    def texts() -> Iterator[str]:
        nonlocal conversations
        for record in _records(from_sources):
            conversations = conversations or isinstance(record, Conversation)
            yield from sources.texts(record)

    def make() -> list[Any]:
        return [bpe.train_tokenizer(texts(), vocab_size).to_str(), conversations]

    if unfinished is None:
        return Tokenizer(bpe.train_tokenizer(texts(), vocab_size), bpe.chat_format(conversations=conversations))
    text, with_roles = unfinished.part("tokenizer", make)
    return Tokenizer(tokenizers.Tokenizer.from_str(text), bpe.chat_format(conversations=with_roles))


class _TokenWriter:
    """Writes the shards of a corpus. The shards of the loss mask start to be written at the first conversation."""

    def __init__(self, folder: Path, dtype: np.dtype[Any], shard_tokens: int) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.tokens = ShardWriter(folder, "tokens", dtype, shard_tokens)
        self.learned: ShardWriter | None = None
        self.begins, self.ends = array("q"), array("q")
        self._noted = 0  # conversations in the file SPANS
        self.count = self.learned_count = 0
        self._seen: set[int] = set()  # at least two different ids, where there are two

    def append(self, encoded: Encoded) -> None:
        if encoded.learned is not None:
            if self.learned is None:
                self.learned = ShardWriter(self.folder, "learned", np.dtype("u1"), self.shard_tokens)
                for first in range(0, self.count, 2**20):
                    self.learned.append(np.ones(min(2**20, self.count - first), dtype=bool))
            self.begins.append(self.count)
            self.ends.append(self.count + len(encoded.ids))
        learned = np.ones(len(encoded.ids), dtype=bool) if encoded.learned is None else encoded.learned
        self.tokens.append(encoded.ids)
        if self.learned is not None:
            self.learned.append(learned)
        self.count += len(encoded.ids)
        self.learned_count += int(learned.sum())
        if len(self._seen) < 2:
            self._seen.update(encoded.ids.tolist())

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from; everything so far is on the disk."""
        with open(self.folder / SPANS, "ab") as file:
            for pair in zip(self.begins[self._noted :], self.ends[self._noted :], strict=True):
                file.write(array("q", pair).tobytes())
            file.flush()
            os.fsync(file.fileno())
        self._noted = len(self.begins)
        names = ("count", "learned_count", "_noted")
        return {
            **{name: getattr(self, name) for name in names},
            "seen": sorted(self._seen),
            "tokens": self.tokens.state(),
            "learned": None if self.learned is None else self.learned.state(),
        }

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`. Raises OSError where a file is missing or has less."""
        self.count, self.learned_count, self._noted = state["count"], state["learned_count"], state["_noted"]
        self._seen = set(state["seen"])
        pairs = array("q", (self.folder / SPANS).read_bytes()[: 16 * self._noted])
        if len(pairs) != 2 * self._noted:
            raise OSError(f"{self.folder / SPANS} is too short")
        os.truncate(self.folder / SPANS, 16 * self._noted)
        self.begins, self.ends = pairs[::2], pairs[1::2]
        self.tokens.restore(state["tokens"])
        learned = ShardWriter(self.folder, "learned", np.dtype("u1"), self.shard_tokens)
        learned.restore(state["learned"] or {"lengths": [], "hashes": [], "open_values": 0})
        self.learned = None if state["learned"] is None else learned

    def has_more_than(self, token: int) -> bool:
        return bool(self._seen - {token})

    def abandon(self) -> None:
        for shards in filter(None, (self.tokens, self.learned)):
            shards.abandon()

    def spans(self) -> bytes | None:
        """The content of the file CONVERSATIONS, if there is one."""
        return None if self.learned is None else np.array([self.begins, self.ends], dtype="<i8").tobytes()

    def finish(self) -> dict[str, Any]:
        """Close the last shards. Returns the header's fields about them."""
        for shards in filter(None, (self.tokens, self.learned)):
            shards.close()
        spans = self.spans()
        hashes = [None] * len(self.tokens.hashes) if self.learned is None else self.learned.hashes
        return {
            "tokens": self.count,
            "learned_tokens": self.learned_count,
            "conversations": len(self.begins),
            "conversations_sha256": None if spans is None else artefact.sha256_bytes(spans),
            "shards": [
                {"tokens": tokens, "tokens_sha256": tokens_sha256, "learned_sha256": learned_sha256}
                for tokens, tokens_sha256, learned_sha256 in zip(
                    self.tokens.lengths, self.tokens.hashes, hashes, strict=True
                )
            ],
        }
