"""Text files to training batches: a byte-level BPE tokenizer, a memory-mapped token file, batches by step number.

A source is a UTF-8 text file (plain or `.xz`) or a folder of `*.txt` and `*.txt.xz`. `<|endoftext|>` written in
a text separates documents, and one follows every file. The last tokens are held out for validation. A batch is
a pure function of seed and step, so resuming needs no reader state.

Artefact: a folder, reused when the sources' hashes and the vocabulary size are the same:

    corpus.json       kind "corpus", schema 1: vocab_size, tokens, sources (file names),
                      corpus_sha256 (over the sources' hashes), tokens_sha256, tokenizer_sha256
    tokens.bin        little-endian uint16, or uint32 above 65,536 tokens of vocabulary
    tokenizer.json    the `tokenizers` library's format
"""

from __future__ import annotations

import lzma
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np

from merino_edge import artefact
from merino_edge.errors import ArtefactError, InputError
from merino_edge.tokenizer import ChatFormat

if TYPE_CHECKING:
    import tokenizers

KIND = "corpus"
SCHEMA_VERSION = 1
END_OF_TEXT = "<|endoftext|>"
SPECIAL_TOKENS = (END_OF_TEXT, "<|im_start|>", "<|im_end|>")
END_OF_TEXT_ID = 0  # the trainer numbers special tokens first
SMALLEST_VOCABULARY = 256 + len(SPECIAL_TOKENS)  # every byte, and the special tokens
HELD_OUT = 0.05  # of the tokens
MOST_HELD_OUT = 2**20
PIECE_CHARACTERS = 2**16  # of text encoded at a time
PIECES_AT_ONCE = 64

# A model trained on plain text continues text: the conversation so far, one message after the other.
CONTINUATION_TEMPLATE = "{% for message in messages %}{{ message.content }}{% endfor %}"

_HASHED = {"tokens_sha256": "tokens.bin", "tokenizer_sha256": "tokenizer.json"}

Batch = tuple[np.ndarray, np.ndarray]  # inputs and the tokens that follow them, each [B, T] int64


@dataclass(frozen=True)
class Corpus:
    """Token ids on disk. `tokens` is memory-mapped [N]; `header` is what corpus.json holds."""

    folder: Path
    tokens: np.ndarray
    header: dict[str, Any]

    @property
    def sha256(self) -> str:
        return str(self.header["corpus_sha256"])

    @property
    def tokenizer_json(self) -> str:
        return artefact.read_text(self.folder / "tokenizer.json")

    def training_tokens(self, sequence: int) -> int:
        """How many tokens precede the held-out tail. Raises InputError where either part has no whole sequence."""
        held_out = max(sequence + 1, min(int(len(self.tokens) * HELD_OUT), MOST_HELD_OUT))
        if len(self.tokens) - held_out <= sequence:
            what = f"the corpus has {len(self.tokens)} tokens, too few for sequences of {sequence}"
            raise InputError(what, f"add text, or lower --sequence below {max(1, len(self.tokens) // 2 - 1)}")
        return len(self.tokens) - held_out

    def batch(self, step: int, size: int, sequence: int, seed: int = 0) -> Batch:
        """`size` windows of the training part, the same for the same arguments on every machine."""
        last_start = self.training_tokens(sequence) - sequence - 1
        starts = np.random.default_rng([seed, step]).integers(0, last_start, size=size, endpoint=True)
        return self._windows(starts, sequence)

    def validation(self, most: int, sequence: int) -> Batch:
        """At most `most` windows spread evenly over the held-out tail, without overlap."""
        first = self.training_tokens(sequence)
        windows = (len(self.tokens) - first - 1) // sequence
        chosen = np.linspace(0, windows - 1, min(most, windows)).astype(np.int64)
        return self._windows(first + sequence * chosen, sequence)

    def _windows(self, starts: np.ndarray, sequence: int) -> Batch:
        rows = np.stack([self.tokens[start : start + sequence + 1] for start in starts]).astype(np.int64)
        return rows[:, :-1], rows[:, 1:]


def prepare(sources: Sequence[Path | str], vocab_size: int, folder: Path | str) -> Corpus:
    """Read the corpus in `folder` if it was made from these sources for this vocabulary, else make it there.

    Raises InputError (no text, not text, vocabulary too small for bytes), OutputError.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        what = f"a vocabulary of {vocab_size} is too small for byte-level BPE"
        raise InputError(what, f"search with a vocabulary of at least {SMALLEST_VOCABULARY}")
    folder, files = Path(folder), _text_files(sources)
    corpus_sha256 = fingerprint(files)
    if (folder / "corpus.json").is_file():
        found = load(folder)
        if found.sha256 == corpus_sha256 and found.header["vocab_size"] == vocab_size:
            return found
        shutil.rmtree(folder)
    tokenizer = train_tokenizer(_pieces(files), vocab_size)
    with artefact.new_folder(folder) as new:
        count = _write_tokens(new / "tokens.bin", tokenizer, files, _dtype(vocab_size))
        artefact.write_text(new / "tokenizer.json", tokenizer.to_str())
        names = [file.name for file in files]
        header = {"vocab_size": vocab_size, "tokens": count, "sources": names, "corpus_sha256": corpus_sha256}
        hashes = {name: artefact.sha256_file(new / file) for name, file in _HASHED.items()}
        artefact.write_json(new / "corpus.json", KIND, {**header, **hashes}, SCHEMA_VERSION)
    return load(folder)


def pieces(source: Path | str) -> Iterator[str]:
    """The text of a source, cut where documents end or lines do. Raises InputError."""
    return _pieces(_text_files([source]))


def fingerprint(sources: Sequence[Path | str]) -> str:
    """One sha256 over the sources' hashes, in order; names do not count. Raises InputError."""
    return artefact.sha256_text(artefact.canonical_json([artefact.sha256_file(f) for f in _text_files(sources)]))


def load(folder: Path | str) -> Corpus:
    """Read and verify a prepared corpus. Raises ArtefactError."""
    folder = Path(folder)
    header = artefact.read_json(folder / "corpus.json", KIND, SCHEMA_VERSION)
    for name, file in _HASHED.items():
        if not (folder / file).is_file() or artefact.sha256_file(folder / file) != header.get(name):
            raise ArtefactError(f"{folder / file} is missing or altered", f"remove {folder} and train again")
    return Corpus(folder, np.memmap(folder / "tokens.bin", dtype=_dtype(header["vocab_size"]), mode="r"), header)


def _dtype(vocab_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


def train_tokenizer(texts: Iterator[str], vocab_size: int) -> tokenizers.Tokenizer:
    """A byte-level BPE tokenizer (no prefix space). Small corpora give fewer than `vocab_size` tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    documents = (document for text in texts for document in text.split(END_OF_TEXT))
    tokenizer.train_from_iterator(documents, trainer)
    return tokenizer


def chat_format() -> ChatFormat:
    """Chat conventions of a model trained here: stop at the end of a document, continue what was written."""
    return ChatFormat((END_OF_TEXT_ID,), None, CONTINUATION_TEMPLATE)


# --- reading text ----------------------------------------------------------------------------------


def _text_files(sources: Sequence[Path | str]) -> list[Path]:
    files: list[Path] = []
    for source in map(Path, sources):
        if source.is_dir():
            found = sorted(p for pattern in ("*.txt", "*.txt.xz") for p in source.rglob(pattern) if p.is_file())
            if not found:
                raise InputError(f"{source} holds no .txt or .txt.xz file", "give another --corpus")
            files += found
        elif source.is_file():
            files.append(source)
        else:
            raise InputError(f"{source} does not exist", "give another --corpus")
    if not files:
        raise InputError("no corpus was named", "add: --corpus FILE")
    return files


def _pieces(files: Sequence[Path]) -> Iterator[str]:
    """The files' text in pieces of whole lines, END_OF_TEXT after every file. Raises InputError."""
    for path in files:
        lines: list[str] = []
        size = 0
        try:
            with _open_text(path) as file:
                for line in file:
                    if "\0" in line:
                        raise InputError(f"{path} is not text (it holds zero bytes)", "unpack it, or give a text file")
                    lines.append(line)
                    size += len(line)
                    if size >= PIECE_CHARACTERS:
                        yield "".join(lines)
                        lines, size = [], 0
        except UnicodeDecodeError as error:
            raise InputError(f"{path} is not UTF-8 text ({error.reason})", "convert it to UTF-8") from None
        except (lzma.LZMAError, EOFError) as error:
            raise InputError(f"{path} is not a whole .xz file ({error})", "fetch it again") from None
        except OSError as error:
            raise InputError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None
        yield "".join(lines) + END_OF_TEXT


def _open_text(path: Path) -> IO[str]:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8-sig")
    return open(path, encoding="utf-8-sig")


def _write_tokens(path: Path, tokenizer: tokenizers.Tokenizer, files: Sequence[Path], dtype: np.dtype[Any]) -> int:
    """Encode the files into `path` and return the number of tokens. Raises InputError where there is no text."""
    count = ends = 0
    with open(path, "wb") as output:

        def flush(pieces: list[str]) -> None:
            nonlocal count, ends
            for encoding in tokenizer.encode_batch(pieces, add_special_tokens=False):
                ids = np.array(encoding.ids, dtype=dtype)
                count, ends = count + len(ids), ends + int((ids == END_OF_TEXT_ID).sum())
                ids.tofile(output)

        pieces: list[str] = []
        for piece in _pieces(files):
            pieces.append(piece)
            if len(pieces) == PIECES_AT_ONCE:
                flush(pieces)
                pieces = []
        flush(pieces)
    if count == ends:
        raise InputError("the corpus holds no text, zero tokens", "give another --corpus")
    return count
