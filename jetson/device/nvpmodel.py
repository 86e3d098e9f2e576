"""The power modes of nvpmodel: the current one, and what each of them caps.

The modes come from /etc/nvpmodel.conf, the current one's number from /var/lib/nvpmodel/status. A number means another
mode on another board, so its name is always looked up. The status is what was asked for. Boards were seen to run at
other clocks, so read the clocks too.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from merino_edge.jetson.device.system_files import first_line, read_text


@dataclass(frozen=True)
class Mode:
    """A power mode."""

    id: int
    name: str
    gpu_max_mhz: float | None  # None: no cap, or the file does not say
    tpc_pg_mask: int | None  # bits of the TPCs (pairs of SMs) that are switched off

    @property
    def tpcs_off(self) -> int:
        """How many TPCs are switched off."""
        return (self.tpc_pg_mask or 0).bit_count()

    @property
    def gpu_cap(self) -> str:
        """The GPU's cap as text."""
        return "no cap" if self.gpu_max_mhz is None else f"{self.gpu_max_mhz:g} MHz"


def power_mode(root: Path) -> str:
    """The status and the mode's name, as "pmode:0001 fmode:cool (25W)"."""
    status = first_line(root / "var/lib/nvpmodel/status")
    mode = current_mode(root)
    return f"{status} ({mode.name})" if mode else status


def current_mode(root: Path) -> Mode | None:
    """The current mode; None where it or the list of modes cannot be read, or the list lacks it."""
    number = re.search(r"pmode:\s*(\d{1,9})\b", first_line(root / "var/lib/nvpmodel/status"))
    return power_modes(root).get(int(number[1])) if number else None


def power_modes(root: Path) -> dict[int, Mode]:
    """The modes of /etc/nvpmodel.conf by number, in its order; empty where it cannot be read."""
    modes: dict[int, Mode] = {}
    # the text before the first header defines file names with the same words
    for section in read_text(root / "etc/nvpmodel.conf").split("<")[1:]:
        head = re.match(r"\s*POWER_MODEL\s+ID=(\d{1,9})\s+NAME=([^\s>]+)\s*>", section)
        if head:
            clock = _value(section, "GPU MAX_FREQ")  # Hz; -1 or 0: no cap
            cap_mhz = clock / 1e6 if clock is not None and clock > 0 else None
            mask = _value(section, "TPC_POWER_GATING TPC_PG_MASK")
            modes[int(head[1])] = Mode(int(head[1]), head[2], cap_mhz, mask)
    return modes


def _value(section: str, name: str) -> int | None:
    value = re.search(rf"^\s*{name}\s+(-?\d{{1,12}})\s*$", section, re.M)
    return int(value[1]) if value else None
