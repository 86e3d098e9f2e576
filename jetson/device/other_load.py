"""Other load: how much of the cores other programs take while something is measured, and which ones.

The kernel counts in /proc/stat how long each core was busy. The own process's share of it is known, and the rest is
other load. A hypervisor's guests are seen there as stolen time. Which programs they were is read from /proc/PID/stat,
as far as this user sees them: from within a container, one outside has no name.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from merino_edge.jetson.device.system_files import read_text

TICK_S = 1 / os.sysconf("SC_CLK_TCK")
NAMED_CORES = 0.05  # a program that takes less than this of a core is not named
MOST_NAMED = 3
STOLEN = "other guests of the host"


@dataclass(frozen=True)
class OtherLoad:
    """What others used on average, as shares from 0 to 1: of the cores that were measured on, and of all cores.

    `busiest` names the programs that took most, each with the cores that it kept busy.
    """

    of_measured: float
    of_all: float
    busiest: tuple[tuple[str, float], ...]


class _Busy(NamedTuple):
    """Seconds since the start of the machine."""

    now_s: float
    own_s: float
    cores_s: dict[int, float]  # by core
    stolen_s: float
    programs_s: dict[int, float]  # by process


class LoadMeter:
    """Meters others' load from its start on. `cores` are those that the own process runs on, none on a GPU."""

    def __init__(self, cores: Collection[int], root: Path | str = "/") -> None:
        self.root, self.cores = Path(root), set(cores)
        self._names: dict[int, str] = {}
        self._spent_s: dict[int, float] = {}  # by processes seen since the start, also those that ended
        self._first = self._latest = self._read()

    def look(self) -> None:
        """Look who is busy: what a short-lived program used is counted up to the last look."""
        latest = self._read()
        for process, seconds in latest.programs_s.items():
            before = self._latest.programs_s.get(process, 0.0)  # a new one began after the last look
            self._spent_s[process] = self._spent_s.get(process, 0.0) + max(0.0, seconds - before)
        self._latest = latest

    def load(self) -> OtherLoad | None:
        """The load since the start; None where the system does not tell or no time has passed."""
        self.look()
        first, last = self._first, self._latest
        elapsed_s = last.now_s - first.now_s
        busy_s = {core: seconds - first.cores_s.get(core, seconds) for core, seconds in last.cores_s.items()}
        measured = self.cores & set(busy_s)
        if elapsed_s < TICK_S or not busy_s:
            return None
        own_s = last.own_s - first.own_s
        by_name: dict[str, float] = {STOLEN: last.stolen_s - first.stolen_s}
        for process, seconds in self._spent_s.items():
            name = self._names[process]
            by_name[name] = by_name.get(name, 0.0) + seconds
        busiest = sorted(((name, s / elapsed_s) for name, s in by_name.items()), key=lambda one: -one[1])
        return OtherLoad(
            _share(sum(busy_s[core] for core in measured) - own_s, len(measured) * elapsed_s) if measured else 0.0,
            _share(sum(busy_s.values()) - own_s, len(busy_s) * elapsed_s),
            tuple((name, round(cores, 2)) for name, cores in busiest[:MOST_NAMED] if cores >= NAMED_CORES),
        )

    def _read(self) -> _Busy:
        cores_s: dict[int, float] = {}
        stolen_s = 0.0
        for line in read_text(self.root / "proc/stat").splitlines():
            if found := re.match(r"cpu(\d+) ((?:\d+ ?)+)$", line):
                user, nice, system, _idle, _waiting, *rest = map(int, found[2].split())
                interrupts, stolen = rest[:2], rest[2] if len(rest) > 2 else 0
                cores_s[int(found[1])] = TICK_S * (user + nice + system + sum(interrupts) + stolen)
                stolen_s += TICK_S * stolen
        own = os.times()  # of children it knows those that it has waited for
        own_s = own.user + own.system + own.children_user + own.children_system
        return _Busy(time.monotonic(), own_s, cores_s, stolen_s, self._programs_s())

    def _programs_s(self) -> dict[int, float]:
        """The seconds of each other process that is seen."""
        spent = {}
        for stat in (self.root / "proc").glob("[0-9]*/stat"):
            process = int(stat.parent.name)
            name, _, fields = read_text(stat).partition("(")[2].rpartition(")")  # a name may hold blanks and brackets
            numbers = fields.split()
            if process != os.getpid() and len(numbers) > 12:
                self._names[process] = name
                spent[process] = TICK_S * (int(numbers[11]) + int(numbers[12]))  # utime, stime
        return spent


def _share(seconds: float, of: float) -> float:
    return min(1.0, max(0.0, seconds / of))
