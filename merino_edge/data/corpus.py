"""A corpus: memory-mapped tokens, and training batches by step number. It needs no PyTorch.

A batch is a pure function of seed and step. So resuming needs no reader state, and any number of workers sees the same
batches. The last tokens are held out for validation. In plain text a row begins anywhere. In a conversation it begins
with the conversation, so the part beyond a row's length is not trained on. Only the assistant's words are targets
(merino_edge.data.conversation); other targets are IGNORED.

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

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merino_edge import __version__, artefact, forms
from merino_edge.data import corpus_writer
from merino_edge.data.bpe import SMALLEST_VOCABULARY
from merino_edge.data.corpus_writer import CONVERSATIONS, HEADER, KIND, SCHEMA_VERSION, SHARD_TOKENS, token_dtype
from merino_edge.data.forms import Header
from merino_edge.data.shards import Shards, Verified, shard_name
from merino_edge.data.sources import resolve, texts
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.tokenizer import ChatFormat, Tokenizer
from merino_edge.unfinished import Unfinished

IGNORED = -100  # a target without loss
HELD_OUT = 0.05  # share of the tokens for validation
MAX_HELD_OUT_TOKENS = 2**20

Batch = tuple[np.ndarray, np.ndarray]  # inputs and the tokens that follow them, or IGNORED, each [B, T] int64


@dataclass(frozen=True)
class Corpus:
    """Tokens on disk, [N]. `header` is the content of corpus.json, `sha256` the fingerprint of its sources."""

    folder: Path
    tokens: Shards
    header: dict[str, Any]
    sha256: str
    learned: Shards | None = None  # the loss mask [N]; None: every token is learned
    conversations: np.ndarray | None = None  # [2, C]: first tokens, and last ones + 1

    @property
    def tokenizer_json(self) -> str:
        """The text of the corpus's tokenizer.json."""
        return artefact.read_text(self.folder / "tokenizer.json")

    @property
    def chat(self) -> ChatFormat:
        """The chat format of a model trained on this corpus."""
        return ChatFormat.load(self.folder / "chat.json")

    def training_tokens(self, sequence: int) -> int:
        """The number of tokens before the held-out tail. Raises InputError where either part has no whole sequence."""
        held_out = max(sequence + 1, min(int(len(self.tokens) * HELD_OUT), MAX_HELD_OUT_TOKENS))
        first = int(self._row_starts(np.array([max(0, len(self.tokens) - held_out)]))[0])
        if first <= sequence:
            what = f"the corpus has {len(self.tokens)} tokens, too few for sequences of {sequence}"
            raise InputError(what, f"add text, or lower --sequence below {max(1, len(self.tokens) // 2 - 1)}")
        return first

    def batch(self, step: int, size: int, sequence: int, seed: int = 0) -> Batch:
        """`size` rows of the training part: the same for the same arguments on every machine."""
        return self.rows(self.starts(step, size, sequence, seed), sequence)

    def starts(self, step: int, size: int, sequence: int, seed: int = 0) -> np.ndarray:
        """The first tokens [size] of the rows of `batch`."""
        last_start = self.training_tokens(sequence) - sequence - 1
        starts = np.random.default_rng([seed, step]).integers(0, last_start, size=size, endpoint=True)
        return self._row_starts(starts)

    def validation(self, max_rows: int, sequence: int) -> Batch:
        """At most `max_rows` rows spread evenly over the held-out tail, without overlap."""
        starts = self._held_out_starts(sequence)
        spread = np.linspace(0, len(starts) - 1, min(max_rows, len(starts))).astype(np.int64)
        return self.rows(starts[spread], sequence)

    def _held_out_starts(self, sequence: int) -> np.ndarray:
        first, last = self.training_tokens(sequence), len(self.tokens) - sequence - 1
        if self.conversations is None:
            return np.arange(first, last + 1, sequence)
        starts = []
        while first <= last:
            starts.append(first)
            following = int(self._row_starts(np.array([first + sequence]))[0])
            inside = following < first + sequence  # the row ends within a conversation: go on after that
            first = self._conversation_end(following) if inside else following
        return np.array(starts)

    def _row_starts(self, tokens: np.ndarray) -> np.ndarray:
        """Where rows may begin: for each token index the first token of its conversation, else the token itself."""
        if self.conversations is None:
            return tokens
        begins, ends = self.conversations
        index = np.searchsorted(begins, tokens, side="right") - 1  # the last conversation that begins up to there
        clipped = np.maximum(index, 0)
        return np.where((index >= 0) & (tokens < ends[clipped]), begins[clipped], tokens)

    def _conversation_end(self, begin: int) -> int:
        """The end of the conversation that begins at `begin`."""
        assert self.conversations is not None
        begins, ends = self.conversations
        return int(ends[np.searchsorted(begins, begin)])

    def rows(self, starts: np.ndarray, sequence: int) -> Batch:
        """The rows [B, T] that begin at tokens `starts` [B]: inputs and targets."""
        rows = np.stack([self.tokens.window(start, start + sequence + 1) for start in starts]).astype(np.int64)
        if rows.max() >= self.header["tokenizer_tokens"]:
            what = f"{self.folder} holds token {rows.max()}, its tokenizer has {self.header['tokenizer_tokens']}"
            raise ArtefactError(what, f"remove {self.folder} and make it again")
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
    replaces: bool = True,
    resume: bool | None = None,
) -> Corpus:
    """The corpus of the sources, with token ids below `vocab_size`.

    A source that is a prepared corpus is used as it is. Otherwise the corpus in `folder` is used, if it was made of the
    same sources. Otherwise it is made there, with `tokenizer` or with one that is trained on the sources. A corpus of
    other sources is replaced, unless `replaces` is False. With `resume` an interrupted one goes on; None: an
    interrupted one is not kept. Raises InputError (no text, not text, a tokenizer that does not fit), ArtefactError,
    OutputError.
    """
    if (prepared := _prepared(sources)) is not None:
        _require_fitting(prepared, vocab_size, tokenizer)
        return load(prepared)
    if tokenizer is None and vocab_size < SMALLEST_VOCABULARY:
        what = f"a vocabulary of {vocab_size} is too small for byte-level BPE"
        raise InputError(what, f"search with a vocabulary of at least {SMALLEST_VOCABULARY}")
    if tokenizer is not None and (size := corpus_writer.required_vocab_size(tokenizer.backend)) > vocab_size:
        what = f"the tokenizer has {size} tokens, more than a vocabulary of {vocab_size}"
        raise InputError(what, "use a tokenizer that fits, or a larger vocabulary")
    folder, corpus_sha256 = Path(folder), fingerprint(sources, tokenizer)
    key = {"corpus": corpus_sha256, "vocab_size": vocab_size, "shard_tokens": shard_tokens, "tool": __version__}
    if (folder / HEADER).is_file():
        header = _header(folder)
        if header["corpus_sha256"] == corpus_sha256 and header["vocab_size"] == vocab_size:
            if resume is not None:
                Unfinished(folder, key, resume=False)  # removes what a kill after the last step left
            return dataclasses.replace(load(folder), sha256=corpus_sha256)
        if not replaces:
            what = f"{folder} is a corpus already, of other sources or another vocabulary"
            raise OutputError(what, "add --force to replace it, or choose another --out")
    with contextlib.ExitStack() as kept:
        corpus_writer.write(
            folder,
            resolve(sources),
            vocab_size=vocab_size,
            tokenizer=tokenizer,
            corpus_sha256=corpus_sha256,
            shard_tokens=shard_tokens,
            on_tokens=on_tokens,
            unfinished=None if resume is None else kept.enter_context(Unfinished(folder, key, resume=resume)),
        )
    return dataclasses.replace(load(folder), sha256=corpus_sha256)


def pieces(source: Path | str) -> Iterator[str]:
    """The text of a source, in pieces that end where a document or a line does. Raises InputError."""
    return (text for one in resolve([source]) for record in one.records() for text in texts(record))


def fingerprint(sources: Sequence[Path | str], tokenizer: Tokenizer | None = None) -> str:
    """One sha256 over the contents of the sources, in order, and over `tokenizer`. File names do not count.

    A prepared corpus has a fingerprint of its own. Raises InputError, ArtefactError.
    """
    if (folder := _prepared(sources)) is not None:
        return _identity(_header(folder))
    content: Any = [source.fingerprint() for source in resolve(sources)]
    if tokenizer is not None:
        content = {"sources": content, "tokenizer": tokenizer.backend.to_str(), "chat": tokenizer.chat.to_json()}
    return artefact.sha256_text(artefact.canonical_json(content))


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
        if not shape[1]:
            raise ArtefactError(f"{folder / HEADER} counts no conversation", f"remove {folder} and make it again")
        conversations = np.memmap(folder / CONVERSATIONS, dtype=np.dtype("<i8"), mode="r", shape=shape)
        _check_conversations(conversations, len(tokens), folder)
        learned = _shards(folder, "learned", np.dtype("u1"), header, verified)
    verified.save()
    return Corpus(folder, tokens, header, _identity(header), learned, conversations)


def _shards(folder: Path, stem: str, dtype: np.dtype[Any], header: dict[str, Any], verified: Verified) -> Shards:
    parts = []
    for number, shard in enumerate(header["shards"]):
        name = shard_name(stem, number)
        verified.check(name, shard[f"{stem}_sha256"], shard["tokens"] * dtype.itemsize)
        parts.append(np.memmap(folder / name, dtype=dtype, mode="r"))
    return Shards(parts)


def _check_conversations(conversations: np.ndarray, tokens: int, folder: Path) -> None:
    """Raise ArtefactError unless conversations [2, C] follow each other within the tokens, none of them empty."""
    begins, ends = conversations
    apart = bool((begins[1:] >= ends[:-1]).all())
    if not (apart and bool((begins < ends).all()) and begins[0] >= 0 and ends[-1] <= tokens):
        what = f"{folder / CONVERSATIONS} holds conversations that overlap or lie outside"
        raise ArtefactError(what, f"remove {folder} and make it again")


def _header(folder: Path) -> dict[str, Any]:
    header = artefact.read_json(folder / HEADER, KIND, SCHEMA_VERSION)
    if header["schema_version"] < SCHEMA_VERSION:
        what = f"{folder / HEADER} has schema version {header['schema_version']}, this tool reads {SCHEMA_VERSION}"
        raise ArtefactError(what, f"remove {folder} and make it again")
    forms.check(header, Header, str(folder / HEADER), f"remove {folder} and make it again")
    return header


def _identity(header: dict[str, Any]) -> str:
    """The fingerprint of a prepared corpus. Two tokenizers make two corpora of the same sources."""
    return artefact.sha256_text(artefact.canonical_json([header["corpus_sha256"], header["tokenizer_sha256"]]))


def _prepared(sources: Sequence[Path | str]) -> Path | None:
    """The source that is a prepared corpus, if there is one. Raises InputError where it is not the only source."""
    folders = [Path(source) for source in sources if (Path(source) / HEADER).is_file()]
    if folders and len(sources) > 1:
        raise InputError(
            f"{folders[0]} is a prepared corpus, and not the only source", "make one corpus of all sources"
        )
    return folders[0] if folders else None


def _require_fitting(folder: Path, vocab_size: int, tokenizer: Tokenizer | None) -> None:
    """Raise InputError unless a prepared corpus fits the model's vocabulary and tokenizer."""
    header = _header(folder)
    if header["tokenizer_tokens"] > vocab_size:
        what = f"{folder} has {header['tokenizer_tokens']} tokens, the model's vocabulary {vocab_size}"
        raise InputError(what, f"make it again: merino-edge tokenize SOURCES --vocab {vocab_size} --out {folder}")
    if tokenizer is not None and tokenizer.sha256 != header["tokenizer_sha256"]:
        what = f"{folder} was made with another tokenizer than the model's"
        raise InputError(what, f"make it again: merino-edge tokenize SOURCES --tokenizer CKPT --out {folder}")
