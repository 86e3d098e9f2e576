"""tegrastats: parse one line of it in the formats of JetPack 4, 5, 6 and 7.2, and run the program.

The formats differ in units (mW written or not), in brackets around GPU clocks and in the case of thermal zones. Some
fields only root sees. A rail shows current/average[/maximum] power; the current one is taken. Each field is
searched on its own. So a garbled or shortened line gives what can be read of it, and nothing raises.

Of a list of GPU clocks (one for each GPC, 0 where it is off) the highest is taken. Zones that read 0 or below -100 C
are off, and rails named NC are not connected; both are left out.
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
NOT_RAILS = ("NC", "RAM", "SWAP", "IRAM")  # the last three look like rails in a cut line

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
    """A CPU core that is on."""

    load_percent: int
    clock_mhz: int | None


@dataclass(frozen=True)
class Tegrastats:
    """The values of a line; None or absent where it lacks them."""

    ram_used_mb: int | None = None
    ram_total_mb: int | None = None
    swap_used_mb: int | None = None
    swap_total_mb: int | None = None
    free_blocks: int | None = None  # the number of the largest free blocks; few or small ones mean fragmentation
    free_block_mb: float | None = None
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
    """The values of a line in any of the formats."""
    free, cpu, gpu = _FREE_BLOCKS.search(line), _CPU.search(line), _GPU.search(line)
    ram_used_mb, ram_total_mb = _pair(_RAM.search(line))
    swap_used_mb, swap_total_mb = _pair(_SWAP.search(line))
    emc_percent, emc_mhz = _pair(_EMC.search(line))
    return Tegrastats(
        ram_used_mb=ram_used_mb,
        ram_total_mb=ram_total_mb,
        swap_used_mb=swap_used_mb,
        swap_total_mb=swap_total_mb,
        free_blocks=int(free[1]) if free else None,
        free_block_mb=int(free[2]) / {"MB": 1, "kB": 1024}[free[3]] if free else None,
        cores=_cores(cpu[1]) if cpu else (),
        emc_percent=emc_percent,
        emc_mhz=emc_mhz,
        gpu_percent=int(gpu[1]) if gpu else None,
        gpu_mhz=max(map(int, (gpu[2] or gpu[3]).split(","))) if gpu and (gpu[2] or gpu[3]) else None,
        temperature_c={name: float(value) for name, value in _ZONE.findall(line) if is_temperature(float(value))},
        power_mw={name: float(value) for name, value in _RAIL.findall(line) if name not in NOT_RAILS},
    )


def is_temperature(celsius: float) -> bool:
    """Whether a zone is on: one that is off reads 0 or -256."""
    return celsius != 0 and celsius > -100


def _pair(match: re.Match[str] | None) -> tuple[int | None, int | None]:
    first, second = match.groups() if match else (None, None)
    return (int(first) if first else None, int(second) if second else None)


def _cores(text: str) -> tuple[Core | None, ...]:
    """The cores in order, without those that are elided or garbled."""
    cores: list[Core | None] = []
    for part in text.split(","):
        core = _CORE.fullmatch(part)
        if core:
            cores.append(Core(int(core[1]), int(core[2]) if core[2] else None))
        elif part == "off":
            cores.append(None)
    return tuple(cores)


class Process:
    """A running tegrastats, which prints a line every `interval_ms`. Raises OSError where it cannot be started."""

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
        """The next line; None where none comes in time. Raises EOFError where the output has ended."""
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
        """End the program and whatever it started."""
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
    """The values of the program's first line. Raises OSError with the reason where no line comes."""
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
