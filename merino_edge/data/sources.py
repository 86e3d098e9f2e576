"""Sources of text: files, folders of files, and data sets of the `datasets` library, read as a stream.

A source is a UTF-8 file or a folder of such files (`*.txt` and `*.jsonl`, each also as `.xz`), or `hf:NAME`
(merino_edge.data.hub_dataset). A file whose name does not end in `.jsonl` is plain text: `<|endoftext|>` separates
documents in it, and one is added after every file. A line of JSON is a document or a conversation
(merino_edge.data.records). Only one line at a time is completely in memory. This module knows no tokens.
"""

from __future__ import annotations

import contextlib
import io
import lzma
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

from merino_edge import artefact, limits, names
from merino_edge.data import hub_dataset, records
from merino_edge.data.bpe import END_OF_TEXT
from merino_edge.data.records import Conversation, Record
from merino_edge.errors import InputError
from merino_edge.packed_text import open_text

PIECE_CHARACTERS = 2**16  # of text, about
PATTERNS = ("*.txt", "*.txt.xz", "*.jsonl", "*.jsonl.xz")


class Source(Protocol):
    """One file, or one split of a data set."""

    @property
    def name(self) -> str:
        """The name in the corpus's header."""

    def fingerprint(self) -> str:
        """A hash of the content. Raises InputError."""

    def records(self) -> Iterator[Record]:
        """The documents and conversations, in order. Raises InputError."""


@dataclass(frozen=True)
class File:
    """A source that is a file. Its name tells its format."""

    path: Path

    @property
    def name(self) -> str:
        return self.path.name

    def fingerprint(self) -> str:
        with _reading(self.path):
            return artefact.sha256_file(self.path)

    def records(self) -> Iterator[Record]:
        return self._lines() if ".jsonl" in self.path.suffixes[-2:] else self._text()

    def _text(self) -> Iterator[str]:
        with _reading(self.path), open_text(self.path) as file:
            for piece in _pieces(file):
                if "\0" in piece:
                    what = f"{self.path} is not text (it holds zero bytes)"
                    raise InputError(what, "unpack it, or give a text file")
                yield piece

    def _lines(self) -> Iterator[Record]:
        with _reading(self.path), open_text(self.path) as file:
            for number, line in enumerate(iter(lambda: file.readline(limits.MAX_LINE_CHARACTERS), ""), start=1):
                where = f"{self.path} line {number}"
                if len(line) == limits.MAX_LINE_CHARACTERS:
                    raise InputError(f"{where} is longer than {len(line)} characters", "see merino_edge/limits.py")
                if line.strip():
                    yield from documents(records.parse_line(line, where))


@dataclass(frozen=True)
class Rows:
    """A source that is a split of a data set."""

    dataset: hub_dataset.HubDataset

    @property
    def name(self) -> str:
        return self.dataset.spelling

    def fingerprint(self) -> str:
        return self.dataset.fingerprint()

    def records(self) -> Iterator[Record]:
        for record in self.dataset.records():
            yield from documents(record)


def resolve(sources: Sequence[Path | str]) -> list[Source]:
    """The sources of these names; a folder gives its files. Raises InputError, MissingExtraError."""
    resolved: list[Source] = []
    for source in sources:
        path = Path(source)
        if str(source).startswith(hub_dataset.PREFIX):
            resolved.append(Rows(hub_dataset.parse(str(source))))
        elif path.is_dir():
            inside = sorted({p for pattern in PATTERNS for p in path.rglob(pattern) if p.is_file()})
            if not inside:
                raise InputError(f"{path} holds no .txt or .jsonl file, nor .xz of one", "name a folder with text")
            resolved += map(File, inside)
        elif path.is_file():
            resolved.append(File(path))
        else:
            raise InputError(f"{path} does not exist", names.beside(path) or "check the path")
    if not resolved:
        raise InputError("no corpus was named", "name a file, a folder or hf:NAME")
    return resolved


def texts(record: Record) -> Iterator[str]:
    """The texts of a record. In a conversation the role stands before each message."""
    if isinstance(record, Conversation):
        for message in record.messages:
            yield f"{message['role']}\n{message['content']}"
    else:
        yield record


def documents(record: Record) -> Iterator[Record]:
    """A complete document in pieces, or a conversation unchanged. An empty document gives nothing."""
    if isinstance(record, Conversation):
        yield record
    elif record:
        yield from _pieces(io.StringIO(record, newline="\n"))


def _pieces(file: IO[str]) -> Iterator[str]:
    """The text in pieces of whole lines, with END_OF_TEXT at its end. A line longer than a piece is cut."""
    lines: list[str] = []
    size = 0
    for line in iter(lambda: file.readline(PIECE_CHARACTERS), ""):
        lines.append(line)
        size += len(line)
        if size >= PIECE_CHARACTERS:
            yield "".join(lines)
            lines, size = [], 0
    yield "".join(lines) + END_OF_TEXT


@contextlib.contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn errors of the operating system and of the decoders into one-line InputErrors."""
    try:
        yield
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error.reason})", "convert it to UTF-8") from None
    except (lzma.LZMAError, EOFError) as error:
        raise InputError(f"{path} is not a whole .xz file ({error})", "fetch it again") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None
