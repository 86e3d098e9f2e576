"""A real file system of 200 kB, for tests that fill a disk."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

SIZE_KB = 200


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount the file system at `folder`, which is made. Skips the test where this process may not."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={SIZE_KB}k", "none", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("this machine lets us mount no small file system")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def fill(disk: Path, but_bytes: int = 0) -> None:
    """Fill what is free, but for so many bytes."""
    (disk / "most").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - but_bytes)))
