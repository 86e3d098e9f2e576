"""Text files, plain or packed as .xz. A small .xz file can unpack to gigabytes, so what comes out of one is bounded.

A bound is not what text needs: text unpacks to 3 to 20 times its size. Errors are those of the standard library, or
InputError.
"""

from __future__ import annotations

import io
import lzma
from pathlib import Path
from typing import IO, Any

from merino_edge import limits
from merino_edge.errors import InputError


def open_text(path: Path, encoding: str = "utf-8-sig", limit_bytes: int | None = None) -> IO[str]:
    """Open the text file for reading as a stream. Reading more than `limit_bytes`, if given, raises InputError.

    An .xz file has a limit of its own. Raises OSError, LZMAError, EOFError, UnicodeDecodeError as it is read.
    """
    if path.suffix == ".xz":
        most = max(limits.MAX_UNPACKED_BYTES, limits.MAX_UNPACKED_RATIO * path.stat().st_size)
        unpacked = lzma.LZMAFile(path)  # noqa: SIM115  the text file closes it, as the other
        raw: Any = _Bounded(unpacked, path, most if limit_bytes is None else limit_bytes)
    else:
        raw = open(path, "rb", buffering=0)  # noqa: SIM115
        raw = raw if limit_bytes is None else _Bounded(raw, path, limit_bytes)
    return io.TextIOWrapper(io.BufferedReader(raw, 2**18), encoding=encoding)


def read_text(path: Path, limit_bytes: int, encoding: str = "utf-8-sig") -> str:
    """The whole text of a file, which has at most `limit_bytes` when unpacked. Raises as `open_text` does."""
    with open_text(path, encoding, limit_bytes) as file:
        return file.read()


class _Bounded(io.RawIOBase):
    """A stream of bytes that ends with InputError where it is longer than it may be."""

    def __init__(self, stream: Any, path: Path, limit_bytes: int) -> None:
        self._stream, self._path, self._limit_bytes = stream, path, limit_bytes
        self._left_bytes = limit_bytes

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        data = self._stream.read(len(buffer)) or b""
        self._left_bytes -= len(data)
        if self._left_bytes < 0:
            what = f"{self._path} holds more than {self._limit_bytes / 2**20:,.0f} MB of text"
            raise InputError(what, "split it, or see merino_edge/limits.py")
        buffer[: len(data)] = data
        return len(data)

    def close(self) -> None:
        if not self.closed:
            self._stream.close()
        super().close()
