"""Device cards of recorded trees; the figures are those that the files of such boards show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from merino_edge.jetson.device import UNKNOWN, clock_mhz, device_card, last_level_cache_bytes

ORIN = {
    "proc/device-tree/model": "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super\0",
    "proc/device-tree/compatible": "nvidia,p3768-0000+p3767-0005-super\0nvidia,tegra234\0",
    "etc/nv_tegra_release": "# R39 (release), REVISION: 2.1, GCID: 46758480, EABI: aarch64\n# KERNEL_VARIANT: oot\n",
    "var/lib/nvpmodel/status": "pmode:0002 fmode:quiet\n",
    "usr/local/cuda/version.json": '{"cuda": {"name": "CUDA SDK", "version": "13.2.2"}}',
    "var/lib/dpkg/status": "Package: libnvinfer-dev\nStatus: install ok installed\nVersion: 1\n\n"
    "Package: libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.6.2\n\n"
    "Package: libnvinfer10\nStatus: install ok installed\nVersion: 10.16.2.10-1+cuda13.2\n",
    "proc/cpuinfo": "".join(
        f"processor\t: {n}\nFeatures\t: fp asimd asimdhp asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n\n"
        for n in range(6)
    ),
    "proc/meminfo": "MemTotal:        7802360 kB\nMemFree: 1 kB\n",
    "proc/sys/kernel/osrelease": "6.8.12-1021-tegra\n",
    "etc/os-release": 'NAME="Ubuntu"\nPRETTY_NAME="Ubuntu 24.04.4 LTS"\n',
    "sys/devices/system/cpu/cpu0/cache/index0/level": "1\n",
    "sys/devices/system/cpu/cpu0/cache/index0/type": "Data\n",
    "sys/devices/system/cpu/cpu0/cache/index0/size": "64K\n",
    "sys/devices/system/cpu/cpu0/cache/index3/level": "3\n",
    "sys/devices/system/cpu/cpu0/cache/index3/type": "Unified\n",
    "sys/devices/system/cpu/cpu0/cache/index3/size": "2M\n",
    "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "960000\n",
}


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    for name, text in ORIN.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_board_is_read_as_it_says(orin: Path) -> None:
    card = device_card(orin)
    assert card["name"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert card["compatible"] == ["nvidia,p3768-0000+p3767-0005-super", "nvidia,tegra234"]
    assert card["l4t"].startswith("# R39 (release), REVISION: 2.1,") and card["power_mode"] == "pmode:0002 fmode:quiet"
    assert (card["cuda"], card["tensorrt"]) == ("13.2.2", "10.16.2.10-1+cuda13.2")
    assert card["cpu"] == "implementer 0x41 part 0xd42" and card["cpu_flags"] == ["asimd", "asimdhp", "asimddp"]
    assert (card["cores"], card["memory_bytes"]) == (6, 7802360 * 1024)
    assert card["cache_bytes"] == {"l1d": 65536, "l3": 2 * 2**20} and last_level_cache_bytes(card) == 2 * 2**20
    assert card["system"] == "Ubuntu 24.04.4 LTS" and clock_mhz(orin) == 960.0


def test_what_no_file_says_stays_unknown(tmp_path: Path) -> None:
    card = device_card(tmp_path)
    empty = {"compatible": [], "cpu_flags": [], "cache_bytes": {}}
    assert {key: value for key, value in card.items() if key not in empty} == dict.fromkeys(
        set(card) - set(empty), UNKNOWN
    )
    assert {key: card[key] for key in empty} == empty
    assert last_level_cache_bytes(card) == 0 and clock_mhz(tmp_path) == UNKNOWN


@pytest.mark.parametrize("name", sorted(ORIN))
def test_a_garbled_file_never_breaks_the_card(orin: Path, name: str) -> None:
    (orin / name).write_bytes(b"\xff\x00{[:\n\n")
    assert set(device_card(orin)) == set(device_card(orin / "nothing"))


def test_this_machine_has_cores_and_memory() -> None:
    card = device_card()
    assert card["cores"] == os.cpu_count() and card["memory_bytes"] > 2**28 and card["name"] != UNKNOWN
