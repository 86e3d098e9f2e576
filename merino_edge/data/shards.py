"""An array that is larger than memory: on disk in files of equal length, memory-mapped, read as if it were one.

    STEM-00000.bin, STEM-00001.bin, ...     little-endian values, `shard_tokens` in each but the last

Who reads them knows their lengths and hashes (merino_edge.data.corpus: corpus.json). Hashing all at every start would take
hours, so `Verified` remembers what was found whole, in a file beside:

    verified.json    kind "verified", schema 1: header_sha256, files {name: [bytes, mtime_ns]}

A file is hashed again when its size or time, or the header, has changed. Knows no text.
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
from merino_edge.errors import ArtefactError, MerinoError

VERIFIED = "verified.json"
SETTLED_NS = 2 * 10**9  # a file younger than this could change again without its time changing


def name_of(stem: str, number: int) -> str:
    return f"{stem}-{number:05d}.bin"


class Shards:
    """Arrays that follow each other, as one [N]."""

    def __init__(self, parts: Sequence[np.ndarray]) -> None:
        self.parts = list(parts)
        self.dtype = self.parts[0].dtype
        self._ends = np.cumsum([len(part) for part in self.parts])

    def __len__(self) -> int:
        return int(self._ends[-1])

    def window(self, start: int, stop: int) -> np.ndarray:
        """Values `start` to `stop`, a copy, from however many parts hold them."""
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
    """Writes shards of `length` values. `hashes` are of those that are whole, once closed of all."""

    def __init__(self, folder: Path, stem: str, dtype: np.dtype[Any], length: int) -> None:
        self.folder, self.stem, self.dtype, self.length = folder, stem, dtype, length
        self.lengths: list[int] = []
        self.hashes: list[str] = []
        self._file: IO[bytes] | None = None
        self._digest = hashlib.sha256()
        self._held = 0  # values in the open shard

    def append(self, values: np.ndarray) -> None:
        while len(values):
            if self._file is None:
                self._file = open(self.folder / name_of(self.stem, len(self.hashes)), "xb")  # noqa: SIM115
                self._digest, self._held = hashlib.sha256(), 0
            part, values = values[: self.length - self._held], values[self.length - self._held :]
            content = part.astype(self.dtype).tobytes()
            self._file.write(content)
            self._digest.update(content)
            self._held += len(part)
            if self._held == self.length:
                self.close()

    def close(self) -> None:
        """End the open shard, safe on the disk."""
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self.abandon()
            self.lengths.append(self._held)
            self.hashes.append(self._digest.hexdigest())

    def abandon(self) -> None:
        """Let go of the open shard: its folder is about to be removed."""
        if self._file is not None:
            self._file.close()
            self._file = None


class Verified:
    """Which files of a folder are known to be what its header says."""

    def __init__(self, folder: Path, header_sha256: str) -> None:
        self.folder, self.header_sha256 = folder, header_sha256
        self.files: dict[str, list[int]] = {}
        self._changed = False
        with contextlib.suppress(MerinoError):  # nothing is known then
            known = artefact.read_json(folder / VERIFIED, "verified")
            if known.get("header_sha256") == header_sha256:
                self.files = known["files"]

    def check(self, name: str, sha256: str, size_bytes: int | None = None) -> None:
        """Raise ArtefactError unless the file is there and is the one with this hash."""
        path = self.folder / name
        hint = f"remove {self.folder} and make it again"
        try:
            state = path.stat()
            known = [state.st_size, state.st_mtime_ns]
            if size_bytes is not None and state.st_size != size_bytes:
                raise ArtefactError(f"{path} has {state.st_size} bytes, not {size_bytes}", hint)
            if self.files.get(name) == known:
                return
            if artefact.sha256_file(path) != sha256:
                raise ArtefactError(f"{path} is missing or altered", hint)
        except OSError as error:
            raise ArtefactError(f"{path} is missing or altered ({error.strerror})", hint) from None
        if time.time_ns() - state.st_mtime_ns > SETTLED_NS:
            self.files[name] = known
            self._changed = True

    def save(self) -> None:
        """Remember for the next start; where the folder cannot be written, that one hashes again."""
        if self._changed:
            with contextlib.suppress(MerinoError):
                payload = {"header_sha256": self.header_sha256, "files": self.files}
                artefact.write_json(self.folder / VERIFIED, "verified", payload)
