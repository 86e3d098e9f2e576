"""Small files of the running system: procfs, sysfs, release files, the package database.

Such files come and go, and may be closed to this user. They may answer a read with an error, as a disabled thermal zone
does. So a read is bounded and never raises. What cannot be read is empty, and `why_unreadable` gives the reason.
"""

from __future__ import annotations

import errno
import math
import stat
from pathlib import Path

from merino_edge.limits import MAX_SYSTEM_FILE_BYTES

UNKNOWN = "unknown"
CHUNK_BYTES = 65536  # /proc/sys refuses reads of megabytes


def read_text(path: Path) -> str:
    """The file's text; "" where it is missing or unreadable."""
    try:
        return _read(path)
    except OSError:
        return ""


def first_line(path: Path) -> str:
    """The file's first line; "unknown" where there is none."""
    return next(iter(read_text(path).strip("\0\n ").splitlines()), UNKNOWN)


def number(path: Path) -> float | None:
    """The number that the file holds; None where it holds anything else."""
    try:
        value = float(read_text(path))
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def why_unreadable(path: Path) -> str | None:
    """The system's error on reading the file; None where reading succeeds."""
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
