"""Run every writing verb on a machine with a fault: one line, the right exit code, and nothing left behind.

    python benchmarks/faults.py [--only export] [--fault memory] [--work FOLDER]

    disk full       a file system without a free byte, and ones with room for a part of the output
    file size       no file may be larger than a limit (ulimit -f)
    read-only       a file system that is mounted so
    no permission   another user's folder, without root's privileges
    handles         few files may be open at once (ulimit -n)
    memory          little address space is left (ulimit -v)
    clock           the clock goes back by a day while the verb runs

A file system of its own and a folder of another user need root; without it those faults are left out. A verb may also
succeed, where the fault leaves it room.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import os
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import writing_verbs as verbs
from writing_verbs import Verb

NOBODY = 65534
CAPABILITIES_V3, DAC = 0x20080522, 0b1110  # of capset(2): CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH, CAP_FOWNER
MB = 2**20
LINE = re.compile(r"merino-edge: [^\n]+")
CODES = {1, 2, 3, 6}  # a refusal; 1: out of memory
Setting = Callable[[], None]
Fill = Callable[[Path], None]  # puts what the verb changes into the folder, before the fault
Place = Callable[[Fill], contextlib.AbstractContextManager[Path]]


def limited(name: str, value: int) -> Setting:
    """The limit of a resource, as ulimit sets it."""
    return lambda: resource.setrlimit(getattr(resource, name), (value, value))


def little_memory(more_mb: int) -> Setting:
    """So much address space beyond what the process has when it begins."""

    def limit() -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        limited("RLIMIT_AS", pages * resource.getpagesize() + more_mb * MB)()

    return limit


def without_privileges() -> None:
    """Give up what lets root write into a folder of another user. Root's own libraries stay readable."""
    library = ctypes.CDLL(None, use_errno=True)
    header, sets = (ctypes.c_uint32 * 2)(CAPABILITIES_V3, 0), (ctypes.c_uint32 * 6)()
    library.capget(header, sets)
    sets[0] &= ~DAC  # of those in effect
    if library.capset(header, sets):
        raise OSError(ctypes.get_errno(), "capset")


@contextlib.contextmanager
def of_nobody(folder: Path, fill: Fill) -> Iterator[Path]:
    """A folder of another user."""
    with plain(folder, fill):
        for path in (folder, *folder.rglob("*")):
            os.chown(path, NOBODY, NOBODY)
        yield folder


def clock_back() -> None:
    """Every second call for the time gives that of a day before."""
    calls, now, now_ns = [0], time.time, time.time_ns

    def day() -> int:
        calls[0] += 1
        return 86400 * (calls[0] % 2)

    time.time = lambda: now() - day()
    time.time_ns = lambda: now_ns() - 10**9 * day()


@contextlib.contextmanager
def disk(folder: Path, fill: Fill, size: int, *, free: int | None = None, read_only: bool = False) -> Iterator[Path]:
    """A file system of `size` bytes, of which `free` are free; None: all."""
    folder.mkdir(parents=True, exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], check=True)
    try:
        fill(folder)
        if free is not None:
            (folder / "most").write_bytes(bytes(shutil.disk_usage(folder).free - free))
        if read_only:
            subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@contextlib.contextmanager
def plain(folder: Path, fill: Fill) -> Iterator[Path]:
    folder.mkdir(parents=True, exist_ok=True)
    try:
        fill(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def faults(folder: Path) -> list[tuple[str, Place, Setting]]:
    """(name, where the output goes, what is set in the process)"""
    found: list[tuple[str, Place, Setting]] = []
    nothing: Setting = lambda: None  # noqa: E731
    if os.geteuid() == 0:
        for free in (0, 4096, 16384, 65536):
            found.append(
                (f"disk full, {free} free", lambda fill, free=free: disk(folder, fill, 4 * MB, free=free), nothing)
            )  # type: ignore[misc]
        found.append(("read-only", lambda fill: disk(folder, fill, 4 * MB, read_only=True), nothing))
        found.append(("no permission", lambda fill: of_nobody(folder, fill), without_privileges))
    for size in (0, 1000, 20_000):
        found.append((f"file size {size}", lambda fill: plain(folder, fill), limited("RLIMIT_FSIZE", size)))
    for count in (10, 14, 20, 32):
        found.append((f"handles {count}", lambda fill: plain(folder, fill), limited("RLIMIT_NOFILE", count)))
    for more_mb in (1, 8, 64, 256):
        found.append((f"memory {more_mb} MB", lambda fill: plain(folder, fill), little_memory(more_mb)))
    found.append(("clock", lambda fill: plain(folder, fill), clock_back))
    return found


def failing(verb: Verb, inputs: Path, where: Path, log: Path, setting: Setting) -> str:
    """What is wrong with how the verb takes the fault; an empty text if nothing is."""
    before, old = sorted(path.name for path in where.iterdir()), verbs.content(where / verb.out) if verb.given else None
    code = verbs.run(verbs.words_of(verb, inputs, where / verb.out), log, setting)
    said, left = log.read_text(errors="replace"), sorted(path.name for path in where.iterdir())
    if code == 0:
        return "" if not verbs.leftovers(where) else f"done, but leaves {verbs.leftovers(where)}"
    lines = [line for line in said.splitlines() if LINE.fullmatch(line)]
    if "Traceback" in said or len(lines) != 1 or "unexpected" in said:
        return f"exit code {code}, says: {said.strip()[-300:]!r}"
    if code not in CODES:
        return f"exit code {code}: {lines[0]}"
    new, out = set(left) - set(before), where / verb.out
    if new and not (verb.goes_on and new <= {out.name, out.with_suffix(".json").name}):
        return f"leaves {sorted(new)}: {lines[0]}"
    return "" if old is None or verbs.content(out) == old else f"changes {verb.out}: {lines[0]}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default="", help="only verbs whose name begins so")
    parser.add_argument("--fault", default="", help="only faults whose name begins so, joined by commas")
    parser.add_argument("--work", type=Path, help="an empty folder to keep; without it a temporary one")
    options = parser.parse_args()
    verbs.warm_up()
    tries, wrong = Counter[str](), Counter[str]()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        verbs.make_inputs(work / "inputs")
        for name, place, setting in faults(work / "case"):
            if not name.startswith(tuple(options.fault.split(","))):
                continue
            for verb in verbs.VERBS:
                if not verb.name.startswith(options.only):
                    continue
                log = work / "log"
                log.touch()

                def fill(folder: Path, verb: Verb = verb) -> None:
                    if verb.given:
                        verbs.put(work / "inputs" / verb.given, folder / verb.out)

                with place(fill) as where:
                    problem = failing(verb, work / "inputs", where, log, setting)
                tries[name] += 1
                if problem:
                    wrong[name] += 1
                    print(f"  {verb.name}, {name}: {problem}", flush=True)
            print(f"{name}: {tries[name] - wrong[name]} of {tries[name]}", flush=True)
    print(f"{tries.total() - wrong.total()} of {tries.total()} take the fault in one line and leave nothing")
    sys.exit(wrong.total() > 0)


if __name__ == "__main__":
    main()
