"""A corpus: sources as memory-mapped tokens, and training batches of them by step number. Needs no PyTorch.

A batch is a pure function of seed and step, so resuming needs no reader state and any number of workers sees the same
batches. The last tokens are held out for validation. Of plain text a row begins anywhere; a row that would begin within
a conversation begins with it, so what a conversation has beyond a row's length is not trained on. Of conversations
only the assistant's words are targets (merino_edge.data.conversation); other targets are IGNORED.

Artefact: a folder, made by `merino-edge tokenize` or by training:

    corpus.json         kind "corpus", schema 2: vocab_size, tokenizer_tokens (largest id + 1), tokens, learned_tokens,
                        conversations, unanswered (conversations left out: the assistant says nothing), sources (names),
                        corpus_sha256 (over the sources and a tokenizer that was given), tokenizer_sha256, chat_sha256,
                        conversations_sha256 or null, shards [{tokens, tokens_sha256, learned_sha256 or null}, ...]
    tokens-00000.bin    little-endian uint16, or uint32 above 65,536 tokens of vocabulary; more of these as needed
    learned-00000.bin   uint8 for each token, 1: it is a target; only with conversations
    conversations.bin   little-endian int64 [2, C]: where each conversation begins and ends; only with conversations
    tokenizer.json      chat.json (merino_edge.tokenizer)
    verified.json       what was found whole (merino_edge.data.shards)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merino_edge import artefact
from merino_edge.data import corpus_writer
from merino_edge.data.bpe import SMALLEST_VOCABULARY
from merino_edge.data.corpus_writer import CONVERSATIONS, HEADER, KIND, SCHEMA_VERSION, SHARD_TOKENS, token_dtype
from merino_edge.data.shards import Shards, Verified, name_of
from merino_edge.data.sources import named, texts
from merino_edge.errors import ArtefactError, InputError
from merino_edge.tokenizer import ChatFormat, Tokenizer

IGNORED = -100  # a target that nothing is learned from
HELD_OUT = 0.05  # of the tokens
MOST_HELD_OUT = 2**20

HEADER_FIELDS = (
    *("vocab_size", "tokenizer_tokens", "tokens", "conversations", "shards"),
    *("corpus_sha256", "tokenizer_sha256", "chat_sha256", "conversations_sha256"),
)

Batch = tuple[np.ndarray, np.ndarray]  # inputs and the tokens that follow them, or IGNORED, each [B, T] int64


@dataclass(frozen=True)
class Corpus:
    """Tokens on disk, [N]. `header` is what corpus.json holds, `sha256` what the corpus was made from."""

    folder: Path
    tokens: Shards
    header: dict[str, Any]
    sha256: str
    learned: Shards | None = None  # [N]; None: all are
    conversations: np.ndarray | None = None  # [2, C]: first tokens, and those after the last

    @property
    def tokenizer_json(self) -> str:
        return artefact.read_text(self.folder / "tokenizer.json")

    @property
    def chat(self) -> ChatFormat:
        """How a model trained on this is talked to."""
        return ChatFormat.load(self.folder / "chat.json")

    def training_tokens(self, sequence: int) -> int:
        """How many tokens precede the held-out tail. Raises InputError where either part has no whole sequence."""
        held_out = max(sequence + 1, min(int(len(self.tokens) * HELD_OUT), MOST_HELD_OUT))
        first = int(self._begun(np.array([max(0, len(self.tokens) - held_out)]))[0])
        if first <= sequence:
            what = f"the corpus has {len(self.tokens)} tokens, too few for sequences of {sequence}"
            raise InputError(what, f"add text, or lower --sequence below {max(1, len(self.tokens) // 2 - 1)}")
        return first

    def batch(self, step: int, size: int, sequence: int, seed: int = 0) -> Batch:
        """`size` windows of the training part, the same for the same arguments on every machine."""
        return self.rows(self.starts(step, size, sequence, seed), sequence)

    def starts(self, step: int, size: int, sequence: int, seed: int = 0) -> np.ndarray:
        """Where the windows of `batch` begin, [size]."""
        last_start = self.training_tokens(sequence) - sequence - 1
        starts = np.random.default_rng([seed, step]).integers(0, last_start, size=size, endpoint=True)
        return self._begun(starts)

    def validation(self, most: int, sequence: int) -> Batch:
        """At most `most` windows spread evenly over the held-out tail, without overlap."""
        starts = self._held_out_starts(sequence)
        chosen = np.linspace(0, len(starts) - 1, min(most, len(starts))).astype(np.int64)
        return self.rows(starts[chosen], sequence)

    def _held_out_starts(self, sequence: int) -> np.ndarray:
        first, last = self.training_tokens(sequence), len(self.tokens) - sequence - 1
        if self.conversations is None:
            return np.arange(first, last + 1, sequence)
        starts = []
        while first <= last:
            starts.append(first)
            begun = int(self._begun(np.array([first + sequence]))[0])
            inside = begun < first + sequence  # go on behind the conversation that a row ends in
            first = self._end_after(begun) if inside else begun
        return np.array(starts)

    def _begun(self, places: np.ndarray) -> np.ndarray:
        """For each token the first of its conversation, or itself outside of one."""
        if self.conversations is None:
            return places
        begins, ends = self.conversations
        of = np.searchsorted(begins, places, side="right") - 1
        known = np.maximum(of, 0)
        return np.where((of >= 0) & (places < ends[known]), begins[known], places)

    def _end_after(self, begin: int) -> int:
        """Where the conversation that begins at `begin` ends."""
        assert self.conversations is not None
        begins, ends = self.conversations
        return int(ends[np.searchsorted(begins, begin)])

    def rows(self, starts: np.ndarray, sequence: int) -> Batch:
        """The windows that begin at `starts` [B]."""
        rows = np.stack([self.tokens.window(start, start + sequence + 1) for start in starts]).astype(np.int64)
        targets = rows[:, 1:]
        if self.learned is not None:
            learned = np.stack([self.learned.window(start + 1, start + sequence + 1) for start in starts])  # [B, T]
            targets = np.where(learned == 1, targets, IGNORED)
        return rows[:, :-1], targets


def prepare(
    sources: Sequence[Path | str],
    vocab_size: int,
    folder: Path | str,
    tokenizer: Tokenizer | None = None,
    *,
    shard_tokens: int = SHARD_TOKENS,
    on_tokens: Callable[[int], None] = lambda _: None,
) -> Corpus:
    """A corpus of the sources whose tokens a vocabulary of `vocab_size` holds.

    Of one prepared corpus folder: that one. Else what `folder` holds if it was made of them, else made there, with
    `tokenizer` or one trained on them. Raises InputError (no text, not text, a tokenizer that does not fit),
    ArtefactError, OutputError.
    """
    if (found := _prepared(sources)) is not None:
        _require_fitting(found, vocab_size, tokenizer)
        return load(found)
    if tokenizer is None and vocab_size < SMALLEST_VOCABULARY:
        what = f"a vocabulary of {vocab_size} is too small for byte-level BPE"
        raise InputError(what, f"search with a vocabulary of at least {SMALLEST_VOCABULARY}")
    if tokenizer is not None and (size := corpus_writer.tokens_of(tokenizer.backend)) > vocab_size:
        what = f"the tokenizer has {size} tokens, more than a vocabulary of {vocab_size}"
        raise InputError(what, "use a tokenizer that fits, or a larger vocabulary")
    folder, corpus_sha256 = Path(folder), fingerprint(sources, tokenizer)
    if (folder / HEADER).is_file():
        header = _header(folder)
        if header["corpus_sha256"] == corpus_sha256 and header["vocab_size"] == vocab_size:
            return dataclasses.replace(load(folder), sha256=corpus_sha256)
    corpus_writer.write(folder, named(sources), vocab_size=vocab_size, tokenizer=tokenizer, corpus_sha256=corpus_sha256, shard_tokens=shard_tokens, on_tokens=on_tokens)
    return dataclasses.replace(load(folder), sha256=corpus_sha256)


def pieces(source: Path | str) -> Iterator[str]:
    """The text of a source, cut where documents end or lines do. Raises InputError."""
    return (text for one in named([source]) for record in one.records() for text in texts(record))


def fingerprint(sources: Sequence[Path | str], tokenizer: Tokenizer | None = None) -> str:
    """One sha256 over the sources' contents, in order (files' names do not count), and over `tokenizer`; of a prepared
    corpus over its own. Raises InputError, ArtefactError."""
    if (folder := _prepared(sources)) is not None:
        return _identity(_header(folder))
    of: Any = [source.fingerprint() for source in named(sources)]
    if tokenizer is not None:
        of = {"sources": of, "tokenizer": tokenizer.backend.to_str(), "chat": tokenizer.chat.to_json()}
    return artefact.sha256_text(artefact.canonical_json(of))


def load(folder: Path | str) -> Corpus:
    """Read and verify a prepared corpus. Raises ArtefactError."""
    folder = Path(folder)
    header = _header(folder)
    verified = Verified(folder, header["sha256"])
    for name in ("tokenizer", "chat"):
        verified.check(f"{name}.json", header[f"{name}_sha256"])
    dtype, conversations = token_dtype(header["vocab_size"]), None
    tokens = _shards(folder, "tokens", dtype, header, verified)
    learned = None
    if header["conversations_sha256"] is not None:
        shape = (2, header["conversations"])
        verified.check(CONVERSATIONS, header["conversations_sha256"], 8 * 2 * shape[1])
        conversations = np.memmap(folder / CONVERSATIONS, dtype=np.dtype("<i8"), mode="r", shape=shape)
        learned = _shards(folder, "learned", np.dtype("u1"), header, verified)
    verified.save()
    return Corpus(folder, tokens, header, _identity(header), learned, conversations)


def _shards(folder: Path, stem: str, dtype: np.dtype[Any], header: dict[str, Any], verified: Verified) -> Shards:
    parts = []
    for number, shard in enumerate(header["shards"]):
        name = name_of(stem, number)
        verified.check(name, shard[f"{stem}_sha256"], shard["tokens"] * dtype.itemsize)
        parts.append(np.memmap(folder / name, dtype=dtype, mode="r"))
    return Shards(parts)


def _header(folder: Path) -> dict[str, Any]:
    header = artefact.read_json(folder / HEADER, KIND, SCHEMA_VERSION)
    if header["schema_version"] < SCHEMA_VERSION:
        what = f"{folder / HEADER} has schema version {header['schema_version']}, this tool reads {SCHEMA_VERSION}"
        raise ArtefactError(what, f"remove {folder} and make it again")
    if missing := [name for name in HEADER_FIELDS if name not in header]:
        raise ArtefactError(f"{folder / HEADER} has no {missing[0]}", f"remove {folder} and make it again")
    return header


def _identity(header: dict[str, Any]) -> str:
    """Of a corpus that stands by itself: two tokenizers make two of the same sources."""
    return artefact.sha256_text(artefact.canonical_json([header["corpus_sha256"], header["tokenizer_sha256"]]))


def _prepared(sources: Sequence[Path | str]) -> Path | None:
    """The folder of the prepared corpus that was named, if one was. Raises InputError where it is not alone."""
    found = [Path(source) for source in sources if (Path(source) / HEADER).is_file()]
    if found and len(sources) > 1:
        raise InputError(f"{found[0]} is a prepared corpus, and not the only source", "make one corpus of all sources")
    return found[0] if found else None


def _require_fitting(folder: Path, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    header = _header(folder)
    if header["tokenizer_tokens"] > vocab_size:
        what = f"{folder} has {header['tokenizer_tokens']} tokens, the model's vocabulary {vocab_size}"
        raise InputError(what, f"make it again: merino-edge tokenize SOURCES --vocab {vocab_size} --out {folder}")
    if tokenizer is not None and tokenizer.sha256 != header["tokenizer_sha256"]:
        what = f"{folder} was made with another tokenizer than the model's"
        raise InputError(what, f"make it again: merino-edge tokenize SOURCES --tokenizer CKPT --out {folder}")
