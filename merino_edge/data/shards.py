"""Shards: an array larger than memory in files of equal length, which are memory-mapped and read as one.

    STEM-00000.bin, STEM-00001.bin, ...     little-endian values, `shard_tokens` in each but the last

The reader knows their lengths and hashes (corpus.json of merino_edge.data.corpus). To hash all files at every start
would take hours, so `Verified` records in a file beside them which ones were correct:

    verified.json    kind "verified", schema 1: header_sha256, files {name: [bytes, mtime_ns]}

A file is hashed again when its size, its time or the header has changed. This module knows no text.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np

from merino_edge import artefact
from merino_edge.data.forms import Verified as Record
from merino_edge.errors import ArtefactError, MerinoError

VERIFIED = "verified.json"
SETTLED_NS = 2 * 10**9  # a younger file could change again while its time stays the same


def shard_name(stem: str, number: int) -> str:
    """The file name of a shard."""
    return f"{stem}-{number:05d}.bin"


class Shards:
    """Consecutive arrays, read as one [N]."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.dtype = self.parts[0].dtype
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def window(self, start: int, stop: int) -> np.ndarray:
        """A copy of the values `start` to `stop`, from any number of parts."""
        first = int(np.searchsorted(self._ends, start, side="right"))
        pieces = []
        for part, end in zip(self.parts[first:], self._ends[first:], strict=True):
            begin = int(end) - len(part)
            pieces.append(part[max(0, start - begin) : stop - begin])
            if stop <= end:
                break
        return np.concatenate(pieces)

    def __array__(self, dtype: Any = None, *, copy: bool | None = None) -> np.ndarray:
        return np.concatenate(self.parts).astype(dtype or self.dtype)


class ShardWriter:
    """Writes shards of `length` values. `hashes` holds the hashes of the complete shards; after `close`, of all."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype[Any], length: int) -> None:
        self.folder, self.stem, self.dtype, self.length = folder, stem, dtype, length
        self.lengths: list[int] = []
        self.hashes: list[str] = []
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._open_values = 0  # in the open shard

    def append(self, values: np.ndarray) -> None:
        """Write values [N], into as many shards as they fill."""
        while len(values):
            if self._file is None:
                self._file = open(self.folder / shard_name(self.stem, len(self.hashes)), "xb")  # noqa: SIM115
                self._digest, self._open_values = hashlib.sha256(), 0
            part, values = values[: self.length - self._open_values], values[self.length - self._open_values :]
            content = part.astype(self.dtype).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._open_values += len(part)
            if self._open_values == self.length:
                self.close()

    def state(self) -> dict[str, Any]:
        """What `restore` goes on from; everything so far is on the disk."""
        self._flush()
        return {"lengths": self.lengths, "hashes": self.hashes, "open_values": self._open_values}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from `state`, without what was written after it. Raises OSError where a file has less."""
        self.lengths, self.hashes = list(state["lengths"]), list(state["hashes"])
        for number, values in enumerate([*self.lengths, state["open_values"]]):
            path, size = self.folder / shard_name(self.stem, number), values * self.dtype.itemsize
            if values and path.stat().st_size < size:
                raise OSError(f"{path} is shorter than {size} bytes")
        for later in self.folder.glob(f"{self.stem}-*.bin"):
            if later.name > path.name or (later == path and not values):
                later.unlink()
        if state["open_values"]:
            self._file = open(path, "r+b")  # noqa: SIM115
            self._file.truncate(size)
            self._digest, self._open_values = hashlib.sha256(), state["open_values"]
            while chunk := self._file.read(1 << 20):
                self._digest.update(chunk)

    def _flush(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Complete the open shard and flush it to disk."""
        if self._file is not None:
            self._flush()
            self.abandon()
            self.lengths.append(self._open_values)
            self.hashes.append(self._digest.hexdigest())
            self._open_values = 0

    def abandon(self) -> None:
        """Close the open shard without completing it, because its folder is about to be removed."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Verified:
    """A record of which files of a folder match the hashes in its header."""

    def __init__(self, folder: Path, header_sha256: str) -> None:
        self.folder, self.header_sha256 = folder, header_sha256
        self.files: dict[str, list[int]] = {}
        self._changed = False
        with contextlib.suppress(MerinoError):  # without a record every file is hashed
            record = artefact.read_json(folder / VERIFIED, "verified", form=Record)
            if record["header_sha256"] == header_sha256:
                self.files = record["files"]

    def check(self, name: str, sha256: str, size_bytes: int | None = None) -> None:
        """Raise ArtefactError unless the file exists and has this hash and size."""
        path = self.folder / name
        hint = f"remove {self.folder} and make it again"
        try:
            state = path.stat()
            size_and_time = [state.st_size, state.st_mtime_ns]
            if size_bytes is not None and state.st_size != size_bytes:
                raise ArtefactError(f"{path} has {state.st_size} bytes, not {size_bytes}", hint)
            if self.files.get(name) == size_and_time:
                return
            if artefact.sha256_file(path) != sha256:
                raise ArtefactError(f"{path} is missing or altered", hint)
        except OSError as error:
            raise ArtefactError(f"{path} is missing or altered ({error.strerror})", hint) from None
        if time.time_ns() - state.st_mtime_ns > SETTLED_NS:
            self.files[name] = size_and_time
            self._changed = True

    def save(self) -> None:
        """Write the record for the next start. If the folder cannot be written, the next start hashes again."""
        if self._changed:
            with contextlib.suppress(MerinoError):
                payload = {"header_sha256": self.header_sha256, "files": self.files}
                artefact.write_json(self.folder / VERIFIED, "verified", payload)
