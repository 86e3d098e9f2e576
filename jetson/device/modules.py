"""Jetson modules by part number: a name, and how many TPCs (pairs of SMs) a module has.

Names are from jetson_stats, jtop/core/jetson_variables.py (https://github.com/rbonghi/jetson_stats). TPCs of Orin are
the TPC_PG_MASK of NVIDIA's nvpmodel files (https://github.com/LineageOS/android_device_nvidia_concord, nvpmodel/).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Module:
    """A module's name and TPCs."""

    name: str
    tpcs: int | None = None  # None: no source states it


MODULES = {
    "p3767-0005": Module("Orin Nano 8GB (developer kit)", 4),
    "p3767-0003": Module("Orin Nano 8GB", 4),
    "p3767-0004": Module("Orin Nano 4GB", 2),
    "p3767-0001": Module("Orin NX 8GB", 4),
    "p3767-0000": Module("Orin NX 16GB", 4),
    "p3701-0005": Module("AGX Orin 64GB", 8),
    "p3701-0004": Module("AGX Orin 32GB", 7),
    "p3668-0000": Module("Xavier NX"),
    "p3668-0001": Module("Xavier NX"),
    "p3448-0000": Module("Nano"),
    "p3448-0002": Module("Nano"),
    "p3448-0003": Module("Nano"),
    "p3834-0008": Module("Thor"),
}
# Bits of a chip's TPC mask, also for TPCs that a module does not have.
CHIP_TPCS = {"tegra234": 8}
SMS_PER_TPC = 2


def sm_count(module: str, soc: str, tpc_pg_mask: int) -> int | None:
    """The number of SMs that are on; None where the mask does not tell.

    A chip with TPCs fused off in the factory may report a mask of 0. So None is returned where the mask gives more TPCs
    than the module has.
    """
    entry, chip = MODULES.get(module), CHIP_TPCS.get(soc)
    if entry is None or entry.tpcs is None or chip is None or not 0 <= tpc_pg_mask < 2**chip:
        return None
    on = chip - tpc_pg_mask.bit_count()
    return SMS_PER_TPC * on if on <= entry.tpcs else None
