"""Kill every writing verb at file-system calls and at random times, run it again, and count what is lost.

    python benchmarks/kills.py [--times 20] [--seed 0] [--only export] [--work FOLDER]

Half of the kills of a verb strike before one of its calls that change files or folders, spread evenly over all of them.
The others strike at random moments. Each verb also runs over an output that is there
already, where it replaces one. It counts:

    half-written   what stands at the output is refused by `show`, and no run can go on with it
    absent         an output that was there is gone
    dead ends      the command, given again as the message says, ends with an error
    leftovers      hidden names that stay after the next run
    other result   the output is not that of a run that nobody killed
"""

from __future__ import annotations

import argparse
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import writing_verbs as verbs
from writing_verbs import Verb

COUNTS = ("half-written", "absent", "dead ends", "leftovers", "other result")
CALLS = {"os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink"}
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


class Hook:
    """Counts the calls of this process that change files in `folder`, and kills it before number `at`."""

    def __init__(self, folder: Path, at: int = 0, count_file: int | None = None) -> None:
        self.folder, self.at, self.count_file, self.seen = str(folder), at, count_file, 0

    def __call__(self) -> None:
        sys.addaudithook(self._see)

    def _see(self, event: str, values: tuple[Any, ...]) -> None:
        if event == "open":
            changes = isinstance(values[2], int) and bool(values[2] & WRITES) and self._inside(values[0])
        elif event == "ctypes.dlsym":
            changes = values[1] == "renameat2"
        else:
            changes = event in CALLS and self._inside(values[0])
        if not changes:
            return
        self.seen += 1
        if self.count_file is not None:
            os.pwrite(self.count_file, f"{self.seen:9d}".encode(), 0)
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)

    def _inside(self, path: Any) -> bool:
        try:
            return os.fsdecode(path).startswith(self.folder)
        except TypeError:  # a number
            return False


@dataclass
class Case:
    """A verb, over an output that is there (`over`) or not."""

    verb: Verb
    over: bool
    inputs: Path
    folder: Path
    expected: dict[str, Any]
    old: Path | None = None

    @property
    def name(self) -> str:
        return f"{self.verb.name} over an old one" if self.over else self.verb.name

    @property
    def out(self) -> Path:
        return self.folder / "work" / self.verb.out

    def words(self) -> list[str]:
        return [
            *verbs.words_of(self.verb, self.inputs, self.out),
            *((self.verb.over or "").split() if self.over else ()),
        ]

    def reset(self) -> None:
        shutil.rmtree(self.folder / "work", ignore_errors=True)
        (self.folder / "work").mkdir(parents=True)
        if self.old is not None:
            verbs.put(self.old, self.out)

    def run(self, words: list[str], before: Callable[[], None] = lambda: None) -> int:
        return verbs.run(words, self.folder / "log", before)

    def log(self) -> str:
        return (self.folder / "log").read_text().strip()

    def check(self, found: Counter[str], say: Callable[[str], None]) -> None:
        """After a kill: look at the output, run the verb again, look once more."""
        verb, words = self.verb, self.words()
        if self.over and not self.out.exists():
            found["absent"] += 1
            say("absent")
        if self.out.exists() and not verb.goes_on and verb.name != "export-hf" and self.run(["show", str(self.out)]):
            found["half-written"] += 1
            say(f"half-written: {self.log()}")
        is_begun = any((self.out / "state" / name).exists() for name in ("state.json", "before.json"))
        goes_on = verb.again and (is_begun or words[0] != "train")
        first = [word for word in words if word != "--force"] if goes_on and self.over else words
        code = self.run([*first, *verb.again.split()] if goes_on else words)
        if code and re.search("already|exists;", self.log()):  # the killed run had ended
            code = self.run(words) if self.over else 0
        if code and verb.again:
            code = self.run(words)  # nothing to go on with
        if code:
            found["dead ends"] += 1
            say(f"dead end: {self.log()}")
        if left := verbs.leftovers(self.folder / "work"):
            found["leftovers"] += 1
            say(f"leftovers: {left}")
        now = verbs.content(self.out) if not code else self.expected
        is_other = now != self.expected if verb.exact else _names(now) != _names(self.expected)
        if not code and (is_other or (not verb.exact and self.run(["show", str(self.out / verb.shown)]))):
            found["other result"] += 1
            say(f"other result: {sorted(n for n in now.keys() | self.expected if now.get(n) != self.expected.get(n))}")


def _names(content: dict[str, Any]) -> list[str]:
    """The names of the files, without the hashes of what they hold."""
    return sorted(re.sub(r"-[0-9a-f]{12}\b", "", name) for name in content)


def prepare(verb: Verb, inputs: Path, folder: Path, *, over: bool) -> tuple[Case, int, float]:
    """The case, the number of its calls that change files, and its seconds."""
    case = Case(verb, over, inputs, folder, {})
    case.reset()
    if over and verb.given:
        case.old = inputs / verb.given
        case.reset()
    elif over:
        if case.run([*verbs.words_of(verb, inputs, case.out), *verb.old.split()]):
            raise RuntimeError(f"{case.name}: {case.log()}")
        case.old = folder / "old"
        shutil.rmtree(case.old, ignore_errors=True)
        verbs.put(case.out, case.old)
        case.reset()
    with open(folder / "count", "w+") as count:
        began = time.perf_counter()
        if case.run(case.words(), Hook(folder / "work", count_file=count.fileno())):
            raise RuntimeError(f"{case.name}: {case.log()}")
        seconds = time.perf_counter() - began
        case.expected = verbs.content(case.out)
        return case, int(count.read()), seconds


def kill(case: Case, at: int | float) -> bool:
    """Kill the verb before call number `at`, or after so many seconds. Returns False where it ended before."""
    case.reset()
    if isinstance(at, int):
        return case.run(case.words(), Hook(case.folder / "work", at)) == -signal.SIGKILL
    with open(os.devnull, "wb") as nothing:
        pid = verbs.start(case.words(), nothing.fileno())
    time.sleep(at)
    os.kill(pid, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--times", type=int, default=12, help="kills of each verb")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="only verbs whose name begins so")
    parser.add_argument("--skip", default="-", help="no verbs whose name begins so, joined by commas")
    parser.add_argument("--work", type=Path, help="an empty folder to keep; without it a temporary one")
    options = parser.parse_args()
    rng, total, kills = random.Random(options.seed), Counter[str](), 0
    verbs.warm_up()
    with tempfile.TemporaryDirectory() as temporary:
        work = (options.work or Path(temporary)).resolve()
        verbs.make_inputs(work / "inputs")
        for verb in verbs.VERBS:
            for over in (False, True)[verb.given != "" : 1 if verb.over is None else 2]:
                if not verb.name.startswith(options.only) or verb.name.startswith(tuple(options.skip.split(","))):
                    continue
                try:
                    case, calls, seconds = prepare(verb, work / "inputs", work / "case", over=over)
                except RuntimeError as error:
                    print(f"{verb.name} fails without a kill: {error}", flush=True)
                    total["dead ends"] += 1
                    continue
                half = min(calls, options.times // 2)
                moments: list[int | float] = [1 + calls * n // half for n in range(half)]
                moments += [rng.uniform(0, 0.95 * seconds) for _ in range(options.times - half)]
                found, killed = Counter[str](), 0
                for at in moments:
                    if kill(case, at):
                        killed += 1
                        case.check(found, partial(print, f"  {case.name} at {at}:", flush=True))
                counts = ", ".join(f"{found[name]} {name}" for name in COUNTS)
                print(f"{case.name}: {calls} calls, {seconds:.1f} s, {killed} kills: {counts}", flush=True)
                total.update(found)
                kills += killed
    print(f"{kills} kills: " + ", ".join(f"{total[name]} {name}" for name in COUNTS))
    sys.exit(any(total.values()))


if __name__ == "__main__":
    main()
