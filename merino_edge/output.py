"""Outputs: who may write where. A verb claims its output before its work begins.

Another kind of artefact is never replaced, and what took long to make only when that is asked for. A second process is
refused while one writes: the empty file `.NAME.lock` beside the output NAME is locked.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from pathlib import Path

from merino_edge.atomic import short, sweep, translate_os_errors
from merino_edge.errors import OutputError
from merino_edge.kind import CONTAINERS, MARKERS, Existing, refuse_other, what_is, words_of

PATIENCE_S = 2.0  # with a process that ends, such as the worker of a killed one

_held: dict[Path, int] = {}  # how often this process has claimed each output


@contextlib.contextmanager
def claim(path: Path | str, kind: str, *, force: bool | None = None, resumes: bool = False) -> Iterator[None]:
    """Hold the output `path` for this process, after a look at what stands there.

    What took long is replaced only with `force`; None: the verb has no such option. A verb that `resumes` goes on with
    what is there. Leftovers of dead processes are removed. Raises OutputError.
    """
    path = Path(os.path.realpath(path))
    with lock(path):
        if _held[path] == 1:  # else the verb has looked, and this is the function that writes
            sweep(path.parent, path.name, held=True)
            with translate_os_errors(path):
                if what_is(path) != Existing(None):  # a folder of somebody else may hold anything
                    for folder, _, _ in os.walk(path):
                        sweep(Path(folder), held=True)
                check(path, kind, force=force, resumes=resumes)
        yield


def check(path: Path, kind: str, *, force: bool | None = None, resumes: bool = False) -> None:
    """Raise OutputError where a verb that writes this kind must not write to `path`."""
    for folder in path.parents:
        inside = what_is(folder) if any((folder / marker).is_file() for marker in MARKERS) else None
        if inside is not None and inside.kind is not None and inside.kind not in CONTAINERS:
            raise OutputError(f"{path} is inside {folder}, {words_of(inside.kind)}", "choose another --out")
    there = refuse_other(path, kind)
    if there is None or resumes:
        return
    if there.is_unfinished and not force:
        raise OutputError(f"{path} holds an unfinished training", "add --continue, or choose another --out")
    if there.is_dear and force is False:
        raise OutputError(f"{path} is {words_of(kind)} already", "add --force to replace it, or choose another --out")


@contextlib.contextmanager
def lock(path: Path | str) -> Iterator[None]:
    """Keep every other process from writing `path`. Raises OutputError where one writes it."""
    path = Path(os.path.realpath(path))
    if path in _held:  # a verb claims its output, and then the function that writes it does
        _held[path] += 1
        try:
            yield
        finally:
            _held[path] -= 1
        return
    made = [folder for folder in path.parents if not folder.exists()]
    file = -1
    try:
        with translate_os_errors(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            file, name = _locked(path)
        _held[path] = 1
        yield
    finally:
        _held.pop(path, None)
        if file >= 0:
            with contextlib.suppress(OSError):
                if name is not None:
                    os.unlink(name)  # before the lock is given up: who waits for this file sees that it is gone
            os.close(file)
        else:
            _remove_unheld(path)  # a signal may strike between the file and the lock
        for folder in made:  # only those that stayed empty
            with contextlib.suppress(OSError):
                folder.rmdir()


def _remove_unheld(path: Path) -> None:
    """Remove the lock's file where no process holds it."""
    with contextlib.suppress(OSError):
        file = os.open(lock_file(path), os.O_RDWR | os.O_CLOEXEC)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(lock_file(path))
        finally:
            os.close(file)


def lock_file(path: Path) -> Path:
    """The file that is locked while `path` is written, where its folder may be written."""
    return path.with_name(f".{short(path.name)}.lock")


def _locked(path: Path) -> tuple[int, Path | None]:
    """The locked file, and its name if it is one of our own. Raises OutputError where another process has it."""
    name, until_s = lock_file(path), time.monotonic() + PATIENCE_S
    while True:
        file, is_ours = _opened(path, name)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() < until_s:
                os.close(file)
                time.sleep(0.05)
                continue
            owner = _holder(file)
            os.close(file)
            who = f"process {owner}" if owner else "another process"
            raise OutputError(
                f"{path} is being written by {who}", "wait until it ends, or choose another --out"
            ) from None
        except OSError:  # a file system without locks
            return file, name if is_ours else None
        except BaseException:
            os.close(file)
            raise
        if not is_ours:
            return file, None
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file), os.stat(name)):
                return file, name
        os.close(file)  # its holder has removed it meanwhile


def _holder(file: int) -> str:
    """The number of the process that has locked the file; empty where the system does not say."""
    with contextlib.suppress(OSError):
        inode = str(os.fstat(file).st_ino)
        for line in Path("/proc/locks").read_text().splitlines():
            fields = line.split()  # 4: FLOCK ADVISORY WRITE 11045 fe:00:2147575 0 EOF
            if len(fields) > 5 and fields[1] == "FLOCK" and fields[5].endswith(f":{inode}") and fields[4].isdigit():
                return fields[4] if fields[4] != "0" else ""
    return ""


def _opened(path: Path, name: Path) -> tuple[int, bool]:
    """The file to lock, and whether it is the one called `name`. Raises OSError."""
    try:
        return os.open(name, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666), True
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EROFS, errno.EPERM):
            raise
        if name.exists():  # of another user
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC), True
        if not os.access(path, os.W_OK):
            raise
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC), False  # a volume within a folder that is closed
