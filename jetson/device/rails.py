"""Power rails: the INA3221 monitors of Jetson boards as sysfs shows them, by label, and the whole module's power.

JetPack 5 to 7 show them through hwmon, in millivolts and milliamperes and with varying numbers; JetPack 4 through iio.
Labels, paths and the rails of each board are from jetson_stats, jtop/core/power.py
(https://github.com/rbonghi/jetson_stats). A monitor gives the power now, which may be slightly negative when idle.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from merino_edge.jetson.device.system_files import UNKNOWN, first_line, number, why_unreadable

# The rails whose sum is the whole module, by board; the first set that is there counts. AGX Orin has no VDD_IN, so its
# four rails are summed. Whether VIN_SYS_5V0 already holds VDDQ_VDD2_1V8AO (the DRAM) is unverified.
TOTALS = (
    ("VDD_IN",),  # Orin Nano, Orin NX, Xavier NX
    ("POM_5V_IN",),  # Nano (2019)
    ("VDD_GPU_SOC", "VDD_CPU_CV", "VIN_SYS_5V0", "VDDQ_VDD2_1V8AO"),  # AGX Orin
)
HWMON = "sys/bus/i2c/drivers/ina3221/*/hwmon/hwmon*/in[0-9]*_label"
IIO = "sys/bus/i2c/drivers/ina3221x/*/iio:device*/rail_name_[0-9]*"
NOT_CONNECTED = ("NC", UNKNOWN)


@dataclass(frozen=True)
class Rail:
    """A labelled channel. The product of the values of `factors` is its power: [mW], or [mV] and [mA]."""

    name: str
    factors: tuple[Path, ...]

    def power_mw(self) -> float | None:
        """The power now; None where it cannot be read."""
        values = [number(path) for path in self.factors]
        if len(values) == 1:
            return values[0]
        voltage_mv, current_ma = values
        return voltage_mv * current_ma / 1000 if voltage_mv is not None and current_ma is not None else None

    def why_unreadable(self) -> str | None:
        """The first file that cannot be read, and why."""
        return next((f"{path}: {why}" for path in self.factors if (why := why_unreadable(path))), None)


def find_rails(root: Path) -> list[Rail]:
    """The rails below `root`, without unconnected channels and without shunt sums, which have no current."""
    rails: dict[str, tuple[Path, ...]] = {}
    for label in sorted(root.glob(HWMON)):
        channel = re.fullmatch(r"in(\d+)_label", label.name)
        if channel:
            current = label.with_name(f"curr{channel[1]}_input")
            if os.path.lexists(current):
                rails[first_line(label)] = (label.with_name(f"in{channel[1]}_input"), current)
    for label in sorted(root.glob(IIO)):
        power = label.with_name(f"in_power{label.name.removeprefix('rail_name_')}_input")
        rails.setdefault(first_line(label), (power,))
    return [Rail(name, factors) for name, factors in rails.items() if name not in NOT_CONNECTED]


def total_mw(power_mw: Mapping[str, float]) -> float | None:
    """The whole module's power; None where the rails are not those of a board in TOTALS."""
    names = next((names for names in TOTALS if all(name in power_mw for name in names)), None)
    return sum(power_mw[name] for name in names) if names else None
