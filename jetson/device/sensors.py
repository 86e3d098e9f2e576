"""Sensors: the power, temperatures, clocks, power mode and throttle counters of this machine now.

Everything comes from sysfs and procfs below an injectable root. Power comes from tegrastats where sysfs shows no rails.
What cannot be read is absent. This module does not know what happened between two readings.

| what | from |
|---|---|
| rails | INA3221 (`merino_edge.jetson.device.rails`), else tegrastats |
| temperatures | thermal zones that are on |
| GPU, EMC clock | devfreq, bpmp (root only); tegrastats where it is the source of power |
| CPU clock | cpufreq, else /proc/cpuinfo: the fastest core's |
| throttle events | Jetson's over-current counters, or the sum of x86's core_throttle_count |

On Orin `oc1` counts under-voltage, `oc2` average and `oc3` instantaneous over-current.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from merino_edge.jetson.device import tegrastats
from merino_edge.jetson.device.nvpmodel import power_mode
from merino_edge.jetson.device.rails import find_rails, total_mw
from merino_edge.jetson.device.rapl import Rapl
from merino_edge.jetson.device.system_files import first_line, number, read_text

# JetPack 6 and 7, JetPack 5, Xavier, Nano (2019), Thor: jetson_stats, jtop/core/gpu.py, and NVIDIA's nvpmodel files.
GPUS = ("17000000.gpu", "17000000.ga10b", "17000000.gv11b", "57000000.gpu", "gpu-gpc-0")
EMC_RATES = ("sys/kernel/debug/bpmp/debug/clk/emc/rate", "sys/class/devfreq/bwmgr/cur_freq")
OVER_CURRENT = "sys/devices/platform/soctherm-oc-event/hwmon/hwmon*/oc[0-9]*_event_cnt"
CORE_THROTTLE = "sys/devices/system/cpu/cpu[0-9]*/thermal_throttle/core_throttle_count"
MOVED_PERCENT = 5.0

Source = Literal["ina3221 sysfs", "tegrastats", "rapl"]


@dataclass(frozen=True)
class Reading:
    """What the sensors say at one moment."""

    power_mw: dict[str, float]  # by rail
    temperature_c: dict[str, float]  # by zone
    clock_mhz: dict[str, float]  # cpu, gpu, emc
    throttle_events: dict[str, int]  # since the machine started
    power_mode: str

    @property
    def total_mw(self) -> float | None:
        """The whole module's power; None where the rails do not tell."""
        return total_mw(self.power_mw)


class Sensors:
    """The sensors of the machine whose file system stands at `root`."""

    def __init__(self, root: Path | str = "/") -> None:
        self.root = Path(root)
        self.rails = find_rails(self.root)
        self.rapl = Rapl(self.root)
        self.tegrastats = self.root / tegrastats.PROGRAM
        self.source: Source | None  # of energy
        self.source, self.power_source = self._choose()

    def read(self) -> Reading:
        """A reading of all sensors now."""
        line = tegrastats.Tegrastats()
        if self.source == "tegrastats":
            with contextlib.suppress(OSError):  # it ran a moment ago; now its values are absent
                line = tegrastats.read_once(self.tegrastats)
        clocks = {
            "cpu": cpu_clock_mhz(self.root) or line.cpu_mhz,
            "gpu": gpu_clock_mhz(self.root) or line.gpu_mhz,
            "emc": _emc_clock_mhz(self.root) or line.emc_mhz,
        }
        return Reading(
            self.rails_mw() | line.power_mw,
            _temperatures(self.root) or line.temperature_c,
            {name: clock for name, clock in clocks.items() if clock is not None},
            throttle_events(self.root),
            power_mode(self.root),
        )

    def rails_mw(self) -> dict[str, float]:
        """The power of each rail that sysfs shows and that can be read."""
        return {rail.name: power for rail in self.rails if (power := rail.power_mw()) is not None}

    def _choose(self) -> tuple[Source | None, str]:
        """The source of energy and its name; or None and the reasons."""
        reasons = []
        power_mw = self.rails_mw()
        if total_mw(power_mw) is not None:
            return "ina3221 sysfs", "ina3221 sysfs"
        closed = next((why for rail in self.rails if (why := rail.why_unreadable())), None)
        if closed:
            reasons.append(closed)
        elif self.rails:
            names = ", ".join(rail.name for rail in self.rails)
            reasons.append(f"no sum can be read, or none is documented, for the rails {names}")
        if os.path.exists(self.tegrastats):
            try:
                line = tegrastats.read_once(self.tegrastats)
            except OSError as error:
                reasons.append(str(error))
            else:
                if line.power_mw and total_mw(line.power_mw) is not None:
                    return "tegrastats", "tegrastats"
                shown = ", ".join(line.power_mw) or "none"
                reasons.append(f"tegrastats shows no rails of a known sum (rails shown: {shown}; root may see more)")
        if self.rapl.counters_uj() is not None:
            return "rapl", "rapl"
        reasons.append(self.rapl.why_unreadable() or "no RAPL counter in /sys/class/powercap")
        return None, "none: " + "; ".join(reasons if self.rails else ["no INA3221 rail in /sys", *reasons])


def moved(before: Reading, after: Reading) -> list[str]:
    """The changes between two readings that make figures between them doubtful, a line each."""
    lines = []
    for name in before.clock_mhz.keys() & after.clock_mhz.keys():
        was, is_now = before.clock_mhz[name], after.clock_mhz[name]
        if abs(is_now - was) > MOVED_PERCENT / 100 * was:
            lines.append(f"{name} clock moved from {was:.0f} to {is_now:.0f} MHz")
    for name in before.throttle_events.keys() & after.throttle_events.keys():
        more = after.throttle_events[name] - before.throttle_events[name]
        if more > 0:
            lines.append(f"{name} throttled {more} times")
    if before.power_mode != after.power_mode:
        lines.append(f"power mode changed from {before.power_mode} to {after.power_mode}")
    return sorted(lines)


def cpu_clock_mhz(root: Path) -> float | None:
    """The fastest core's clock: it is the one that works."""
    scaling = [number(path) for path in root.glob("sys/devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq")]  # kHz
    clocks = [khz / 1000 for khz in scaling if khz]
    if not clocks:
        shown = re.findall(r"^cpu MHz\s*:\s*(\d{1,9}(?:\.\d{1,9})?)\s*$", read_text(root / "proc/cpuinfo"), re.M)
        clocks = [float(text) for text in shown]
    return max(clocks, default=None)


def gpu_clock_mhz(root: Path, which: str = "cur_freq") -> float | None:
    """The GPU's clock; `which` is cur_freq, min_freq or max_freq (as it is capped now)."""
    rates = (number(root / "sys/class/devfreq" / gpu / which) for gpu in GPUS)
    return next((hz / 1e6 for hz in rates if hz), None)


def _emc_clock_mhz(root: Path) -> float | None:
    return next((hz / 1e6 for path in EMC_RATES if (hz := number(root / path))), None)


def _temperatures(root: Path) -> dict[str, float]:
    """Temperatures by type of zone; the hottest where zones share a type."""
    zones: dict[str, float] = {}
    for zone in sorted(root.glob("sys/class/thermal/thermal_zone*")):
        name, milli = first_line(zone / "type"), number(zone / "temp")
        if milli is not None and tegrastats.is_temperature(milli / 1000):
            zones[name] = max(milli / 1000, zones.get(name, milli / 1000))
    return zones


def throttle_events(root: Path) -> dict[str, int]:
    """How often each counter counted since the machine started."""
    events: dict[str, int] = {}
    for path in sorted(root.glob(OVER_CURRENT)):
        count = number(path)
        if count is not None:
            events[path.name.removesuffix("_event_cnt")] = int(count)
    cores = [count for path in root.glob(CORE_THROTTLE) if (count := number(path)) is not None]
    return events | ({"cpu core": int(sum(cores))} if cores else {})
