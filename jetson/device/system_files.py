"""Small files of the running system: procfs, sysfs, release files, the package database.

They come and go, may be closed to this user, and may answer a read with an error (a thermal zone that is switched off
does). So a read is bounded and never raises: what cannot be read is empty, and `why_unreadable` says why when asked.
"""

from __future__ import annotations

import errno
import math
import stat
from pathlib import Path

from merino_edge.limits import MAX_SYSTEM_FILE_BYTES

UNKNOWN = "unknown"
CHUNK_BYTES = 65536  # /proc/sys refuses to be asked for megabytes at once


def read_text(path: Path) -> str:
    """The file's text, empty where it is missing or unreadable."""
    try:
        return _read(path)
    except OSError:
        return ""


def first_line(path: Path) -> str:
    return next(iter(read_text(path).strip("\0\n ").splitlines()), UNKNOWN)


def number(path: Path) -> float | None:
    """The one number that the file holds, else None."""
    try:
        value = float(read_text(path))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def why_unreadable(path: Path) -> str | None:
    """What the system answers to a read that fails; None where it succeeds."""
    try:
        _read(path)
    except OSError as error:
        return error.strerror or str(error)
    return None


def _read(path: Path) -> str:
    if not stat.S_ISREG(path.stat().st_mode):  # a pipe would wait for ever
        raise OSError(errno.EINVAL, "not a plain file")
    data = bytearray()
    with open(path, "rb", buffering=0) as file:
        while chunk := file.read(CHUNK_BYTES):
            data += chunk
            if len(data) > MAX_SYSTEM_FILE_BYTES:
                raise OSError(errno.EFBIG, f"more than {MAX_SYSTEM_FILE_BYTES} bytes")
    return data.decode("utf-8", errors="replace")
