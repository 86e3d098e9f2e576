"""Watches one execution: its time, its memory, what it raises, and whether it writes outside its folder."""

from __future__ import annotations

import contextlib
import gc
import io
import os
import resource
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from merino_edge.errors import MerinoError

ROOT = Path(__file__).resolve().parents[2]
ROOMS = ("merino_edge", "search", "export", "runtime", "jetson")
LONGEST_LINE = 3_000  # characters of a refusal: what it quotes is cut, and a hint follows
WRITES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.link", "os.symlink", "os.truncate", "os.chmod"}
LINKS = ("os.link", "os.symlink")
STARTS = {"subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "socket.connect", "os.fork"}


@dataclass(frozen=True)
class Finding:
    """What must not happen: the kind of it, and the place in our code."""

    kind: str
    place: str
    detail: str = ""


@dataclass(frozen=True)
class Outcome:
    """How an execution ended. `refused`: with a typed error."""

    refused: bool
    seconds: float
    more_mb: float  # than the process had before
    finding: Finding | None


class Hang(BaseException):
    """An execution took longer than it may."""


class Silent(io.TextIOBase):
    """A stream that swallows what is printed."""

    encoding = "utf-8"

    def write(self, text: str) -> int:
        return len(text)

    def isatty(self) -> bool:
        return False


class Watch:
    """Runs functions under limits. One watch lives for a process, because an audit hook cannot be removed."""

    def __init__(self, folder: Path, seconds: float = 5, memory_mb: float = 650) -> None:
        """`memory_mb`: how much an execution may add to what the process had before the first one."""
        self.folder, self.seconds, self.memory_mb = str(folder), seconds, memory_mb
        self._began = self._began_cpu = self._base_mb = 0.0
        self._watching, self._rang = False, ""
        self._outside: list[str] = []
        sys.addaudithook(self._audit)

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self._watching:
            return
        if event == "open":
            path, _, flags = arguments
            if not (isinstance(flags, int) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)):
                return
            paths: tuple[Any, ...] = (path,)
        elif event in WRITES:
            if event != "os.truncate" and arguments[-1] != -1:
                return  # within a folder that is open already
            paths = arguments[:2] if event == "os.rename" else arguments[1:2] if event in LINKS else arguments[:1]
        elif event in STARTS:
            self._outside.append(f"{event} {arguments!r}"[:200])
            return
        else:
            return
        for path in paths:
            if isinstance(path, (str, bytes, os.PathLike)):
                full = os.path.abspath(os.fsdecode(path))
                if not full.startswith((self.folder, "/dev/null", "/proc/self")):
                    self._outside.append(f"{event} {full}"[:200])

    def _alarm(self, number: int, frame: FrameType | None) -> None:
        cpu, wall = time.process_time() - self._began_cpu, time.monotonic() - self._began
        if cpu < self.seconds and wall < 4 * self.seconds:  # other programs had the processor meanwhile
            signal.setitimer(signal.ITIMER_REAL, self.seconds / 5)
            return
        self._rang = _place_of((one, one.f_lineno) for one in _stack(frame))
        raise Hang

    @contextlib.contextmanager
    def limited(self) -> Iterator[None]:
        """Within it `memory_mb` more than now can be had, the clock's alarm is ours, and all is silent."""
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        old_limits = resource.getrlimit(resource.RLIMIT_AS)
        room = int((self.memory_mb + 400) * 2**20)  # threads reserve memory that they do not use
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + room, old_limits[1]))
        _forget_peak()
        self._base_mb = peak_mb()
        old_folder, tempfile.tempdir = tempfile.tempdir, self.folder
        old_alarm = signal.signal(signal.SIGALRM, self._alarm)
        streams, bytecode = (sys.stdout, sys.stderr), sys.dont_write_bytecode
        sys.stdout, sys.stderr, sys.dont_write_bytecode = Silent(), Silent(), True
        try:
            yield
        finally:
            sys.stdout, sys.stderr = streams
            sys.dont_write_bytecode, tempfile.tempdir = bytecode, old_folder
            signal.signal(signal.SIGALRM, old_alarm)
            resource.setrlimit(resource.RLIMIT_AS, old_limits)

    def run(self, use: Callable[[Path], object], folder: Path) -> Outcome:
        """Run `use` once, within `limited`."""
        self._outside.clear()
        refused, finding, self._rang = False, None, ""
        self._began, self._began_cpu, self._watching = time.monotonic(), time.process_time(), True
        try:
            signal.setitimer(signal.ITIMER_REAL, self.seconds)
            try:
                use(folder)
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        except MerinoError as error:
            refused = True
            finding = self._untidy(error)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            finding = Finding(type(error).__name__, place(error), " ".join(str(error).split())[:300])
        finally:
            self._watching = False
        seconds, more_mb = time.monotonic() - self._began, peak_mb() - self._base_mb
        if self._rang:  # also where somebody caught it
            finding = Finding("Hang", self._rang, f"{seconds:.0f} s")
        if more_mb > self.memory_mb:
            finding = finding or Finding("Memory", "", f"{more_mb:.0f} MB more")
            gc.collect()
            _forget_peak()
        if finding is None and self._outside:
            finding = Finding("WroteOutside", self._outside[0])
        return Outcome(refused, seconds, more_mb, finding)

    def _untidy(self, error: MerinoError) -> Finding | None:
        """A refusal that a user could not read."""
        from merino_edge.cli.main import _one_line

        line = _one_line(error)
        if not line or len(line) > LONGEST_LINE:
            return Finding("LongLine", place(error), f"{len(line)} characters: {line[:80]}")
        return None


def peak_mb() -> float:
    """The largest memory of this process since `_forget_peak`."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _forget_peak() -> None:
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def place(error: BaseException) -> str:
    """Where in our code an error was raised: the innermost frame that is ours."""
    return _place_of(traceback.walk_tb(error.__traceback__))


def _stack(frame: FrameType | None) -> list[FrameType]:
    frames: list[FrameType] = []
    while frame is not None:
        frames.insert(0, frame)
        frame = frame.f_back
    return frames


def _place_of(frames: Iterable[tuple[FrameType, int]]) -> str:
    ours = "elsewhere"
    for frame, line in frames:
        path = Path(os.path.realpath(frame.f_code.co_filename))
        with contextlib.suppress(ValueError):
            relative = path.relative_to(ROOT)
            if relative.parts[0] in ROOMS:
                ours = f"{relative}:{line} {frame.f_code.co_name}"
    return ours
