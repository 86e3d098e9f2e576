"""Writes of which a reader sees all or nothing: files and folders grow under a hidden name, and one rename ends that.

    .NAME.PID-STARTED-MACHINE-RANDOM.new    beside NAME, what a process is writing

A killed process leaves it. The next one that writes NAME finds by PID and STARTED that no such process runs here.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import functools
import hashlib
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from merino_edge.errors import OutputError
from merino_edge.kind import head, head_of, refuse_other, words_of

HIDDEN = re.compile(r"\.(?P<name>.+)\.(?P<pid>\d+)-(?P<started>\d+)-(?P<machine>[0-9a-f]{8})-[0-9a-f]{6}\.(new|old)")
LONGEST_NAME = 160  # bytes of a name within a hidden one; file systems take 255
AT_FDCWD, RENAME_EXCHANGE = -100, 2  # of renameat2(2)
CANNOT_EXCHANGE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM)  # a file system that knows no such call


def hidden_name(path: Path) -> Path:
    """A free, hidden name beside `path`. It is fixed before anything is made, so an interruption can clean it up."""
    pid = os.getpid()
    return path.with_name(f".{short(path.name)}.{pid}-{_started(pid)}-{_machine()}-{secrets.token_hex(3)}.new")


def sweep(folder: Path, name: str | None = None, *, held: bool = False) -> None:
    """Remove what dead processes left in `folder`, of the output `name` or of all.

    Where a process of another machine or container may still run is only known while the output is `held`.
    """
    with contextlib.suppress(OSError):
        for entry in os.listdir(folder):
            found = HIDDEN.fullmatch(entry) if entry.startswith(".") else None
            if found is None or (name is not None and found["name"] != short(name)):
                continue
            is_here = found["machine"] == _machine()
            if (_started(int(found["pid"])) != int(found["started"])) if is_here else held:
                if entry.endswith(".old") and not os.path.lexists(folder / found["name"]):
                    os.rename(folder / entry, folder / found["name"])  # killed between two renames
                else:
                    remove(folder / entry)


def remove(path: Path) -> None:
    """Remove a file or a folder with all that is in it, as far as it can be."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        with contextlib.suppress(OSError):  # rmtree holds two handles for each level, and there may be one left
            for name in os.listdir(path):
                remove(path / name)
            path.rmdir()
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def short(name: str) -> str:
    return os.fsdecode(os.fsencode(name)[:LONGEST_NAME])


def _started(pid: int) -> int:
    """When the process started, in ticks since the machine did; 0 where none runs."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()
        return 0 if fields[0] in (b"Z", b"X") else int(fields[19])
    except (OSError, IndexError, ValueError):
        return 0


@functools.cache
def _machine() -> str:
    """A hash of this start of the machine and of the container: where a process number means something."""
    parts = [os.uname().nodename]
    with contextlib.suppress(OSError):
        parts = [Path("/proc/sys/kernel/random/boot_id").read_text(), os.readlink("/proc/self/ns/pid")]
    return hashlib.sha256("".join(parts).encode()).hexdigest()[:8]


def write_bytes(path: Path | str, data: bytes) -> None:
    """Write a file atomically: readers see the old file or the new one. Raises OutputError.

    It writes a hidden file in the same folder, calls fsync, and renames it. A file of another kind is never replaced.
    """
    path = Path(path)
    with replacing(path) as hidden:
        if (there := head_of(path)) is not None and there["kind"] != (head(data) or {}).get("kind"):
            raise OutputError(f"{path} is {words_of(there['kind'])}, another kind of file", "choose another name")
        with open(hidden, "xb") as file:
            file.write(data)


@contextlib.contextmanager
def new_file(path: Path | str, kind: str) -> Iterator[Path]:
    """Yield the name of a hidden file beside `path` that becomes `path` on success and is removed on any failure.

    For what a library writes. A file of another kind is never replaced. Raises OutputError.
    """
    path = Path(os.path.realpath(path))
    with translate_os_errors(path):
        refuse_other(path, kind)
    with replacing(path) as hidden:
        yield hidden


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a hidden name beside the file `path`, and give the file of that name, synced, the name `path`."""
    with translate_os_errors(path):
        if path.exists() and not path.is_file():  # the rename would replace a device too
            raise OutputError(f"{path} exists and is not a plain file", "choose another --out")
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        hidden = hidden_name(path)
        try:
            yield hidden
            with open(hidden, "rb+") as file:
                os.fsync(file.fileno())
            os.replace(hidden, path)
        except BaseException:
            remove(hidden)
            raise


@contextlib.contextmanager
def new_folder(path: Path | str, kind: str) -> Iterator[Path]:
    """Yield a hidden folder beside `path` that becomes `path` on success and is removed on any failure.

    A folder of the same kind is replaced, but only at the end and by one rename. Every other folder is refused, so a
    typing error never deletes a home folder. Raises OutputError.
    """
    path = Path(os.path.realpath(path))
    with translate_os_errors(path):
        refuse_other(path, kind)
        path.parent.mkdir(parents=True, exist_ok=True)
        sweep(path.parent, path.name)
        hidden = hidden_name(path)
        try:
            hidden.mkdir()
            yield hidden
            publish(hidden, path)
        finally:
            remove(hidden)


def publish(new: Path, path: Path) -> None:
    """Give the folder `new` the name `path`; a folder that has it gets the name `new`. Raises OSError."""
    try:
        os.rename(new, path)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        _exchange(new, path)


def _exchange(new: Path, path: Path) -> None:
    """Exchange two names by one call of the kernel: at every moment both exist.

    Where a file system cannot, there are two renames. A process killed between them leaves the old folder under a name
    that `sweep` gives back.
    """
    library = ctypes.CDLL(None, use_errno=True)
    number: int = errno.ENOSYS
    if hasattr(library, "renameat2"):
        names = (AT_FDCWD, os.fsencode(new), AT_FDCWD, os.fsencode(path))
        if library.renameat2(*names, RENAME_EXCHANGE) == 0:
            return
        number = ctypes.get_errno()
    if number not in CANNOT_EXCHANGE:
        raise OSError(number, os.strerror(number), str(path))
    old = new.with_suffix(".old")
    os.rename(path, old)
    try:
        os.rename(new, path)
    except BaseException:
        os.rename(old, path)
        raise
    os.rename(old, new)


@contextlib.contextmanager
def translate_os_errors(path: Path) -> Iterator[None]:
    """Turn an OSError while `path` is written into a one-line OutputError."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise OutputError(f"cannot write {path} ({reason})", "choose another --out or free the disk") from error
