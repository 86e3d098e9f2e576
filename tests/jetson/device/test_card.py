"""Device cards of recorded trees; the figures are those that the files of such boards show."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helpers.recorded_boards import BOARDS, board_files, break_reading, expand, write
from merino_edge import limits
from merino_edge.jetson.device.card import UNKNOWN, clock_mhz, device_card, differences, last_level_cache_bytes
from merino_edge.jetson.device.modules import sm_count

NANO_SUPER = "jetpack7-orin-nano-super"
ARM_CPU = {
    "proc/cpuinfo": "".join(
        f"processor\t: {n}\nFeatures\t: fp asimd asimdhp asimddp\nCPU implementer\t: 0x41\nCPU part\t: 0xd42\n\n"
        for n in range(6)
    ),
    "sys/devices/system/cpu/cpu0/cache/index0/level": "1\n",
    "sys/devices/system/cpu/cpu0/cache/index0/type": "Data\n",
    "sys/devices/system/cpu/cpu0/cache/index0/size": "64K\n",
    "sys/devices/system/cpu/cpu0/cache/index3/level": "3\n",
    "sys/devices/system/cpu/cpu0/cache/index3/type": "Unified\n",
    "sys/devices/system/cpu/cpu0/cache/index3/size": "2M\n",
    **{f"sys/devices/system/cpu/cpu{n}/topology/thread_siblings_list": f"{n}\n" for n in range(6)},
}
FILES = sorted({*board_files(NANO_SUPER), *ARM_CPU})


@pytest.fixture
def orin(tmp_path: Path) -> Path:
    for path, text in ARM_CPU.items():
        write(tmp_path, path, text)
    return expand(NANO_SUPER, tmp_path)


def test_a_board_is_read_as_it_says(orin: Path) -> None:
    card = device_card(orin)
    assert card["name"] == "NVIDIA Jetson Orin Nano Engineering Reference Developer Kit Super"
    assert card["compatible"] == ["nvidia,p3768-0000+p3767-0005-super", "nvidia,tegra234"]
    assert (card["module"], card["module_name"]) == ("p3767-0005", "Orin Nano 8GB (developer kit)")
    assert card["soc"] == "tegra234" and card["power_mode"] == "pmode:0001 fmode:quiet (25W)"
    assert card["gpu"] == {"tpc_pg_mask": 240, "sm_count": 8, "l2_bytes": UNKNOWN, "max_mhz": 918.0}
    assert card["l4t"].startswith("# R39 (release), REVISION: 2.1, GCID: 46758480, BOARD: generic,")
    assert (card["l4t_core"], card["jetpack"]) == ("39.2.1-20260806224157", "7.2.1-b49")
    assert (card["cuda"], card["tensorrt"], card["driver"]) == ("13.2.2", "10.16.2.10-1+cuda13.2", UNKNOWN)
    assert card["cpu"] == "implementer 0x41 part 0xd42" and card["cpu_flags"] == ["asimd", "asimdhp", "asimddp"]
    assert (card["cores"], card["physical_cores"]) == (6, 6)
    assert (card["memory_bytes"], card["swap_bytes"]) == (7486 * 2**20, 0)
    assert card["cache_bytes"] == {"l1d": 65536, "l3": 2 * 2**20} and last_level_cache_bytes(card) == 2 * 2**20
    assert (card["system"], card["kernel"]) == ("Ubuntu 24.04.4 LTS", "6.8.12-1021-tegra") and clock_mhz(orin) == 960.0


@pytest.mark.parametrize(
    ("board", "module", "soc", "mode", "mask", "sms", "max_mhz"),
    [
        ("jetpack4-nano", UNKNOWN, "tegra210", UNKNOWN, UNKNOWN, UNKNOWN, 921.6),
        ("jetpack5-orin-nano", "p3767-0003", "tegra234", UNKNOWN, 240, 8, 624.75),
        ("jetpack6-orin-nano-super", "p3767-0005", "tegra234", "pmode:0002 fmode:quiet (MAXN_SUPER)", 240, 8, 1020.0),
        ("jetpack6-orin-nx-16gb", "p3767-0000", "tegra234", "pmode:0003 fmode:quiet (25W)", 240, 8, 408.0),
        ("jetpack6-agx-orin-64gb", "p3701-0005", "tegra234", "pmode:0000 fmode:quiet (MAXN)", 0, 16, UNKNOWN),
        ("jetpack7-thor", "p3834-0008", "tegra264", UNKNOWN, UNKNOWN, UNKNOWN, 1575.0),
    ],
)
def test_boards_of_every_jetpack(
    board: str, module: str, soc: str, mode: str, mask: object, sms: object, max_mhz: object, tmp_path: Path
) -> None:
    card = device_card(expand(board, tmp_path))
    assert (card["module"], card["soc"], card["power_mode"]) == (module, soc, mode)
    assert card["gpu"] == {"tpc_pg_mask": mask, "sm_count": sms, "l2_bytes": UNKNOWN, "max_mhz": max_mhz}


@pytest.mark.parametrize(
    ("compatible", "module"),
    [
        ("nvidia,p3449-0000-b00+p3448-0000-b00\0nvidia,jetson-nano\0nvidia,tegra210\0", "p3448-0000"),
        ("nvidia,p3737-0000+p3701-0005\0nvidia,p3701-0005\0nvidia,tegra234\0", "p3701-0005"),
        ("nvidia,galen\0nvidia,jetson-xavier\0nvidia,p2822-0000+p2888-0001\0nvidia,tegra194\0", "p2888-0001"),
        ("vendor,carrier\0nvidia,p9999-0001\0nvidia,tegra999\0", "p9999-0001"),
        ("raspberrypi,4-model-b\0brcm,bcm2711\0", UNKNOWN),
    ],
)
def test_the_module_is_the_part_behind_the_carrier_s(compatible: str, module: str, tmp_path: Path) -> None:
    write(tmp_path, "proc/device-tree/compatible", compatible)
    card = device_card(tmp_path)
    assert card["module"] == module
    assert (card["module_name"] == UNKNOWN) == (module not in ("p3448-0000", "p3701-0005"))


@pytest.mark.parametrize(
    ("module", "mask", "count"),
    [
        ("p3767-0005", 240, 8),
        ("p3767-0004", 252, 4),
        ("p3701-0005", 248, 6),
        ("p3701-0004", 128, 14),
        ("p3701-0005", 0, 16),
        ("p3767-0005", 0, None),  # fused off: the mask says nothing
        ("p9999-0001", 240, None),
        ("p3767-0005", 256, None),
        ("p3767-0005", -1, None),
    ],
)
def test_sms_follow_from_mask_and_module_or_not_at_all(module: str, mask: int, count: int | None) -> None:
    assert sm_count(module, "tegra234", mask) == count
    assert sm_count(module, "tegra264", mask) is None


def test_a_mode_that_the_list_lacks_keeps_its_number_only(orin: Path) -> None:
    write(orin, "var/lib/nvpmodel/status", "pmode:0007 fmode:quiet\n")
    assert device_card(orin)["power_mode"] == "pmode:0007 fmode:quiet"
    (orin / "etc/nvpmodel.conf").unlink()
    write(orin, "var/lib/nvpmodel/status", "pmode:0001 fmode:quiet\n")
    assert device_card(orin)["power_mode"] == "pmode:0001 fmode:quiet"


def test_cuda_of_jetpack_4_is_in_a_text_file(tmp_path: Path) -> None:
    write(tmp_path, "usr/local/cuda/version.txt", "CUDA Version 10.2.300\n")
    assert device_card(tmp_path)["cuda"] == "10.2.300"
    write(tmp_path, "usr/local/cuda/version.txt", "10.2\n")
    assert device_card(tmp_path)["cuda"] == UNKNOWN


def test_only_installed_packages_count(tmp_path: Path) -> None:
    status = (
        "Package: libnvinfer-dev\nStatus: install ok installed\nVersion: 1\n\n"
        "Package: libnvinfer8\nStatus: deinstall ok config-files\nVersion: 8.6.2\n\n"
        "Package: libnvinfer10\nStatus: install ok installed\nVersion: 10.16.2.10-1+cuda13.2\n"
    )
    write(tmp_path, "var/lib/dpkg/status", status)
    assert device_card(tmp_path)["tensorrt"] == "10.16.2.10-1+cuda13.2"


def test_cores_that_share_one_are_counted_once(tmp_path: Path) -> None:
    for core, siblings in enumerate(("0,2", "1,3", "0,2", "1,3")):
        write(tmp_path, f"sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list", siblings)
    assert device_card(tmp_path)["physical_cores"] == 2


def test_what_no_file_says_stays_unknown(tmp_path: Path) -> None:
    card = device_card(tmp_path)
    empty = {"compatible": [], "cpu_flags": [], "cache_bytes": {}}
    gpu = dict.fromkeys(("tpc_pg_mask", "sm_count", "l2_bytes", "max_mhz"), UNKNOWN)
    others = dict.fromkeys(set(card) - set(empty) - {"gpu"}, UNKNOWN)
    assert card == {**others, **empty, "gpu": gpu}
    assert last_level_cache_bytes(card) == 0 and clock_mhz(tmp_path) == UNKNOWN


@pytest.mark.parametrize("name", FILES)
def test_a_garbled_file_never_breaks_the_card(orin: Path, name: str) -> None:
    whole = device_card(orin)
    for data in (b"", b"\xff\x00{[:\n\n", b"9" * 5000, b"[" * 100_000):
        (orin / name).write_bytes(data)
        assert set(device_card(orin)) == set(whole)


@pytest.mark.parametrize("name", FILES)
def test_a_file_that_cannot_be_read_is_unknown(orin: Path, name: str) -> None:
    whole = device_card(orin)
    (orin / name).unlink()
    without = device_card(orin)
    break_reading(orin / name)  # EIO
    assert device_card(orin) == without
    (orin / name).unlink()
    (orin / name).symlink_to(orin / "gone")  # listed, and gone when it is read
    assert device_card(orin) == without
    (orin / name).unlink()
    os.mkfifo(orin / name)  # would wait for ever
    assert device_card(orin) == without and set(without) == set(whole)


def test_reads_are_bounded(orin: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("merino_edge.jetson.device.system_files.MAX_SYSTEM_FILE_BYTES", 1000)
    write(orin, "proc/device-tree/model", "x" * 1001)
    assert device_card(orin)["name"] == UNKNOWN
    write(orin, "proc/device-tree/model", "x" * 1000)
    assert device_card(orin)["name"] == "x" * 1000 and limits.MAX_SYSTEM_FILE_BYTES > 10 * 2**20  # a package database


def test_this_machine_has_cores_and_memory() -> None:
    card = device_card()
    assert card["cores"] == os.cpu_count() and card["memory_bytes"] > 2**28 and card["name"] != UNKNOWN
    assert card["kernel"] == os.uname().release


@pytest.mark.parametrize("board", BOARDS)
def test_a_board_is_the_same_machine_as_itself_only(board: str, tmp_path: Path) -> None:
    cards = {name: device_card(expand(name, tmp_path / name)) for name in BOARDS}
    assert [name for name in BOARDS if not differences(cards[board], cards[name])] == [board]


def test_versions_fan_and_clocks_do_not_make_another_machine(orin: Path) -> None:
    card = device_card(orin)
    write(orin, "etc/nv_tegra_release", "# R39 (release), REVISION: 2.2\n")
    write(orin, "var/lib/nvpmodel/status", "pmode:0001 fmode:cool\n")
    write(orin, "sys/class/devfreq/17000000.gpu/max_freq", "1020000000\n")
    write(orin, "proc/meminfo", "MemTotal: 7665000 kB\nSwapTotal: 8388604 kB\n")
    assert differences(card, device_card(orin)) == []
    write(orin, "var/lib/nvpmodel/status", "pmode:0002 fmode:cool\n")
    assert differences(card, device_card(orin)) == ["power_mode: pmode:0001 (25W), pmode:0002 (MAXN_SUPER)"]
    older = {key: value for key, value in device_card(orin).items() if key not in ("power_mode", "gpu")}
    assert differences(card, older) == []
