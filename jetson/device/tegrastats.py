"""tegrastats: one line of it as numbers, in any of the formats that JetPack 4, 5, 6 and 7.2 print; and the program run.

The formats differ in units (mW written or not), in how many numbers a rail shows (current/average[/maximum]: the first
is taken), in brackets around GPU clocks, in the case of thermal zones, and in fields that only root sees. So every
field is looked for on its own: a garbled or shortened line gives what can be read of it, and nothing raises.

Of a list of GPU clocks (one a GPC, 0 where it is switched off) the highest is taken. Zones that read 0 or below
-100 C are switched off, and rails named NC are not connected: both are left out.
"""

from __future__ import annotations

import contextlib
import os
import re
import select
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

from merino_edge.limits import MAX_LINE_BYTES

PROGRAM = "usr/bin/tegrastats"
FIRST_LINE_SECONDS = 3.0
NOT_RAILS = ("NC", "RAM", "SWAP", "IRAM")  # the last three look like rails where a line is cut short

_RAM = re.compile(r"(?<!\S)RAM (\d{1,9})/(\d{1,9})MB")
_SWAP = re.compile(r"(?<!\S)SWAP (\d{1,9})/(\d{1,9})MB")
_FREE_BLOCKS = re.compile(r"\(lfb (\d{1,9})x(\d{1,9})(MB|kB)\)")
_CPU = re.compile(r"(?<!\S)CPU \[([^\]]*)\]")
_CORE = re.compile(r"(\d{1,9})%(?:@(\d{1,9}))?")
_EMC = re.compile(r"(?<!\S)EMC_FREQ (\d{1,9})%(?:@(\d{1,9}))?(?!\S)")
_GPU = re.compile(r"(?<!\S)GR3D_FREQ (\d{1,9})%(?:@(\d{1,9})|@\[(\d{1,9}(?:,\d{1,9})*)\])?(?!\S)")
_ZONE = re.compile(r"(?<!\S)([A-Za-z][\w-]*)@(-?\d{1,9}(?:\.\d{1,9})?)C(?:/-?\d{1,9}(?:\.\d{1,9})?C)?(?!\S)")
_MW = r"-?\d{1,9}(?:mW)?"
_RAIL = re.compile(rf"(?<!\S)([A-Z][A-Z0-9_]+) (-?\d{{1,9}})(?:mW)?/{_MW}(?:/{_MW})?(?!\S)")


@dataclass(frozen=True)
class Core:
    load_percent: int
    clock_mhz: int | None


@dataclass(frozen=True)
class Tegrastats:
    """What a line says; None or absent where it does not."""

    ram_used_mb: int | None = None
    ram_total_mb: int | None = None
    swap_used_mb: int | None = None
    swap_total_mb: int | None = None
    free_blocks: int | None = None  # how many of the largest free blocks there are: few or small ones mean
    free_block_mb: float | None = None  # that memory is in pieces
    cores: tuple[Core | None, ...] = ()  # None: off
    emc_percent: int | None = None
    emc_mhz: int | None = None
    gpu_percent: int | None = None
    gpu_mhz: int | None = None
    temperature_c: dict[str, float] = field(default_factory=dict)
    power_mw: dict[str, float] = field(default_factory=dict)

    @property
    def cpu_mhz(self) -> int | None:
        """The fastest core's clock."""
        return max((core.clock_mhz for core in self.cores if core and core.clock_mhz is not None), default=None)


def parse_line(line: str) -> Tegrastats:
    free, cpu, gpu = _FREE_BLOCKS.search(line), _CPU.search(line), _GPU.search(line)
    return Tegrastats(
        *_pair(_RAM.search(line)),
        *_pair(_SWAP.search(line)),
        int(free[1]) if free else None,
        int(free[2]) / {"MB": 1, "kB": 1024}[free[3]] if free else None,
        _cores(cpu[1]) if cpu else (),
        *_pair(_EMC.search(line)),
        int(gpu[1]) if gpu else None,
        max(map(int, (gpu[2] or gpu[3]).split(","))) if gpu and (gpu[2] or gpu[3]) else None,
        {name: float(value) for name, value in _ZONE.findall(line) if is_temperature(float(value))},
        {name: float(value) for name, value in _RAIL.findall(line) if name not in NOT_RAILS},
    )


def is_temperature(celsius: float) -> bool:
    """Whether a zone is switched on: those that are off read 0 or -256."""
    return celsius != 0 and celsius > -100


def _pair(found: re.Match[str] | None) -> tuple[int | None, int | None]:
    first, second = found.groups() if found else (None, None)
    return (int(first) if first else None, int(second) if second else None)


def _cores(text: str) -> tuple[Core | None, ...]:
    """Those that can be read, in order; what is elided or garbled is passed over."""
    cores: list[Core | None] = []
    for part in text.split(","):
        found = _CORE.fullmatch(part)
        if found:
            cores.append(Core(int(found[1]), int(found[2]) if found[2] else None))
        elif part == "off":
            cores.append(None)
    return tuple(cores)


class Process:
    """tegrastats running: a line every `interval_ms`. Raises OSError where it cannot be started."""

    def __init__(self, program: Path, interval_ms: int) -> None:
        self._process = subprocess.Popen(
            [program, "--interval", str(interval_ms)],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # so that whatever it starts ends with it
        )
        assert self._process.stdout
        self._fd = self._process.stdout.fileno()
        self._pending = b""

    def next_line(self, timeout_seconds: float) -> str | None:
        """The next line; None where none comes in time. Raises EOFError when there will be no more."""
        deadline = time.monotonic() + timeout_seconds
        while b"\n" not in self._pending:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._fd], [], [], left)[0]:
                return None
            chunk = os.read(self._fd, 65536)
            if not chunk or len(self._pending) > MAX_LINE_BYTES:
                raise EOFError
            self._pending += chunk
        line, self._pending = self._pending.split(b"\n", 1)
        return line.decode("utf-8", errors="replace")

    def close(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        if self._process.stdout:
            self._process.stdout.close()

    def __enter__(self) -> Process:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()


def read_once(program: Path) -> Tegrastats:
    """What the program's first line says. Raises OSError, with the reason, where none comes."""
    try:
        with Process(program, 100) as process:
            line = process.next_line(FIRST_LINE_SECONDS)
    except EOFError:
        raise OSError("tegrastats ended without a line") from None
    except OSError as error:
        raise OSError(f"tegrastats cannot be run ({error.strerror})") from error
    if line is None:
        raise OSError(f"tegrastats printed nothing within {FIRST_LINE_SECONDS:g} s")
    return parse_line(line)
