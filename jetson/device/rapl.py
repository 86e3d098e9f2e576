"""RAPL: the energy counters of x86 processors (Intel and AMD), as Linux's powercap shows them.

A counter holds microjoules and wraps at `max_energy_range_uj`. More than one wrap between two readings (some ten
minutes at full load) is not seen. Packages are summed. The domain psys, which includes them, and the domains inside a
package are not. Since Linux 5.10 only root may read the counters.
Source: https://docs.kernel.org/power/powercap/powercap.html
"""

from __future__ import annotations

from pathlib import Path

from merino_edge.jetson.device.system_files import first_line, number, why_unreadable


class Rapl:
    """The packages' counters below `root`."""

    def __init__(self, root: Path) -> None:
        zones = sorted(root.glob("sys/class/powercap/intel-rapl:*"))
        self.packages = [zone for zone in zones if first_line(zone / "name").startswith("package")]

    def counters_uj(self) -> list[float] | None:
        """The counter of each package; None where there is no package or one cannot be read."""
        values = [number(zone / "energy_uj") for zone in self.packages]
        return [value for value in values if value is not None] if values and None not in values else None

    def used_mj(self, before_uj: list[float] | None, after_uj: list[float] | None) -> float | None:
        """The energy between two readings; None where one of them is None."""
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
        """The first counter that this user may not read, and the command that opens it."""
        for zone in self.packages:
            why = why_unreadable(zone / "energy_uj")
            if why:
                return f"{zone / 'energy_uj'}: {why}; run: sudo chmod a+r /sys/class/powercap/intel-rapl:*/energy_uj"
        return None
