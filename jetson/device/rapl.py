"""RAPL: the energy counters of x86 processors (Intel and AMD) as Linux's powercap shows them.

A counter holds microjoules since some moment and starts again after `max_energy_range_uj`; a pause between two readings
in which it wraps more than once (some ten minutes at full load) cannot be told. Packages are summed; psys, which
holds them too, and the domains inside a package are not. Since Linux 5.10 only root may read them.
Source: https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

from pathlib import Path

from merino_edge.jetson.device.system_files import first_line, number, why_unreadable


class Rapl:
    def __init__(self, root: Path) -> None:
        zones = sorted(root.glob("sys/class/powercap/intel-rapl:*"))
        self.packages = [zone for zone in zones if first_line(zone / "name").startswith("package")]

    def counters_uj(self) -> list[float] | None:
        """Every package's counter; None where there is no package or one cannot be read."""
        values = [number(zone / "energy_uj") for zone in self.packages]
        return [value for value in values if value is not None] if values and None not in values else None

    def used_mj(self, before_uj: list[float] | None, after_uj: list[float] | None) -> float | None:
        """The energy between two readings."""
        if before_uj is None or after_uj is None:
            return None
        total_uj = 0.0
        for zone, before, after in zip(self.packages, before_uj, after_uj, strict=True):
            if after < before:
                span = number(zone / "max_energy_range_uj")
                if span is None:
                    return None
                after += span
            total_uj += after - before
        return total_uj / 1000

    def why_unreadable(self) -> str | None:
        """The first counter that is there but closed, and what opens it."""
        for zone in self.packages:
            why = why_unreadable(zone / "energy_uj")
            if why:
                return f"{zone / 'energy_uj'}: {why}; run: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
        return None
