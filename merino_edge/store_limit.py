"""The limit of the engine store: where a new engine brings it above, those that were used least recently are removed.

$MERINO_ENGINES_GB is the limit in GB; 0 is none. A use is a change of the file's time, since many file systems do not
keep the time of a reading. An engine that a process has open is locked by it, and stays. Engines of profiles go before
those of bundles: a profile compiles its own again, while a bundle runs on the CPU until someone builds it.
"""

from __future__ import annotations

import fcntl
import math
import os
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

from merino_edge.errors import InputError

VARIABLE = "MERINO_ENGINES_GB"
USUAL_GB = 8.0
BUNDLES, PROFILES = "*.plan", "profile/*.engine"  # where engines lie below the store


def limit_bytes() -> float:
    """The most bytes of all engines; infinite where there is no limit. Raises InputError."""
    text = os.environ.get(VARIABLE) or str(USUAL_GB)
    with suppress(ValueError):
        limit = float(text)
        if 0 <= limit < math.inf:
            return limit * 1e9 or math.inf
    raise InputError(f"{VARIABLE} is {text!r}", "give a number of GB; 0 is no limit")


def mark_used(path: Path) -> None:
    """Note that the engine `path` is used now. A store that is read-only removes nothing, so it needs no note."""
    now_ns = time.time_ns()  # the system's own clock of files is coarser
    with suppress(OSError):
        os.utime(path, ns=(now_ns, now_ns))


def hold(path: Path) -> BinaryIO:
    """Keep the engine `path` in the store until the returned file is closed. Raises OSError where it is missing."""
    file = open(path, "rb")  # noqa: SIM115
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH)
    mark_used(path)
    return file


def remove_least_used(store: Path, keep: Iterable[Path], *, of_bundles: bool = True) -> str:
    """Remove engines from `store` until they are within the limit; a line that names them, "" where none was removed.

    Those in `keep` stay and count as used now, in this order. `of_bundles`: whether engines of bundles may go too.
    Raises InputError for a limit that is no number.
    """
    limit, kept = limit_bytes(), list(keep)
    for path in kept:
        mark_used(path)
    found = []
    for kind in (PROFILES, BUNDLES):
        for path in store.glob(kind):
            with suppress(OSError):  # another process has removed it
                found.append((kind == BUNDLES, path.stat().st_mtime_ns, path, path.stat().st_size))
    total, removed = sum(size for *_, size in found), []
    for of_bundle, _, path, size in sorted(found):
        if total > limit and path not in kept and (of_bundles or not of_bundle) and _is_removed(path):
            total -= size
            removed.append(path.name)
    if not removed:
        return ""
    return f"the engine store is limited to {limit / 1e9:g} GB ({VARIABLE}): removed {', '.join(removed)}"


def _is_removed(path: Path) -> bool:
    """Remove an engine, unless a process holds it."""
    try:
        with open(path, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        name = path.stem.rpartition("-")[0]
        if not any(path.parent.glob(f"{name}-*{path.suffix}")):
            path.with_name(f"{name}.json").unlink(missing_ok=True)  # no entry names a plan that is gone
    except OSError:
        return False
    return True
