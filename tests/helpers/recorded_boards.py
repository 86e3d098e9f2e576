"""Recorded file trees and tegrastats lines of Jetson boards.

A board is one text file in boards/: "=== PATH" begins a file of the tree, "#:" a comment that names where it was read,
"\\0" stands for a NUL. Paths hold ':' and '@', which not every checkout can store as names.
"""

from __future__ import annotations

from pathlib import Path

FOLDER = Path(__file__).parent / "boards"
BOARDS = tuple(sorted(path.stem for path in FOLDER.glob("*.txt")))

# https://github.com/dusty-nv/jetson-inference/issues/1206
JETPACK4 = (
    "RAM 1504/3956MB (lfb 331x4MB) IRAM 0/252kB(lfb 252kB) CPU [19%@1479,27%@1479,23%@1479,19%@1479] EMC_FREQ 9%@1600 "
    "GR3D_FREQ 99%@921 NVDEC 716 VIC_FREQ 0%@140 APE 25 PLL@39.5C CPU@43.5C PMIC@100C GPU@43C AO@48C thermal@43C "
    "POM_5V_IN 4523/3422 POM_5V_GPU 1113/313 POM_5V_CPU 538/701"
)
# A public log; findable by the string "VDD_IN 4915mW/4915mW". Elided as it was handed on, and whole.
JETPACK5_ELIDED = (
    "01-24-2024 09:17:09 RAM 3503/7337MB (lfb 7x1MB) SWAP 430/3668MB (cached 1MB) CPU [11%@729,...,off,off] "
    "EMC_FREQ 0%@2133 GR3D_FREQ 0%@305 GR3D2_FREQ 0%@0 VIC_FREQ 115 APE 174 CV0@42.718C CPU@44.093C ... tj@46.968C ... "
    "VDD_IN 4915mW/4915mW VDD_CPU_GPU_CV 449mW/449mW VDD_SOC 1431mW/1431mW"
)
JETPACK5 = (
    "01-24-2024 09:17:09 RAM 3503/7337MB (lfb 7x1MB) SWAP 430/3668MB (cached 1MB) "
    "CPU [11%@729,13%@729,9%@729,18%@729,off,off] EMC_FREQ 0%@2133 GR3D_FREQ 0%@305 GR3D2_FREQ 0%@0 VIC_FREQ 115 "
    "APE 174 CV0@42.718C CPU@44.093C SOC2@42.625C SOC0@43.281C CV1@42.25C GPU@41.343C tj@46.968C SOC1@46.968C "
    "CV2@42.875C VDD_IN 4915mW/4915mW VDD_CPU_GPU_CV 449mW/449mW VDD_SOC 1431mW/1431mW"
)
# An AGX Orin; findable by the string "VDDQ_VDD2_1V8AO 707mW/707mW NC".
JETPACK5_AGX = (
    "10-16-2023 10:59:22 RAM 1205/30623MB (lfb 6429x4MB) SWAP 0/15311MB (cached 0MB) CPU [0%@729,0%@729,1%@729,0%@729,"
    "0%@729,0%@730,0%@730,0%@729,0%@729,0%@729,0%@729,0%@729] EMC_FREQ 0%@204 GR3D_FREQ 0%@114 GR3D2_FREQ 0%@114 "
    "NVJPG1 729 VIC_FREQ 729 APE 233 CV0@-256C CPU@43.5C Tdiode@32.5C SOC2@40.062C SOC0@40.5C CV1@-256C GPU@38.156C "
    "SOC1@39.125C CV2@-256C VDD_GPU_SOC 4788mW/4788mW VDD_CPU_CV 798mW/798mW VIN_SYS_5V0 3842mW/3842mW NC 0mW/0mW "
    "VDDQ_VDD2_1V8AO 707mW/707mW NC 0mW/0mW"
)
# A public parser's test constant NanoExample; findable by the string "VDD_IN 5263mW/5263mW".
JETPACK6 = (
    "05-05-2025 06:05:39 RAM 2639/7620MB (lfb 9x4MB) SWAP 0/3810MB (cached 0MB) "
    "CPU [1%@729,4%@729,8%@729,4%@729,5%@729,4%@729] GR3D_FREQ 0% cpu@44.156C soc2@43.781C soc0@44.687C gpu@45.968C "
    "tj@45.968C soc1@45.312C VDD_IN 5263mW/5263mW VDD_CPU_GPU_CV 717mW/717mW VDD_SOC 1794mW/1794mW"
)
# An AGX Orin; findable by the string "VDD_CPU_CV -398mW/-398mW".
JETPACK6_AGX = (
    "03-17-2024 18:54:10 RAM 10239/62841MB (lfb 442x4MB) SWAP 1/31421MB (cached 0MB) CPU [0%@1728,0%@1728,0%@1728,"
    "0%@1728,0%@1420,0%@1420,0%@1420,0%@1420,off,off,off,off] GR3D_FREQ 0% cpu@37.5C tboard@27C soc2@34.562C "
    "tdiode@27.5C soc0@34.531C tj@37.5C soc1@33.656C VDD_GPU_SOC 1592mW/1592mW VDD_CPU_CV -398mW/-398mW "
    "VIN_SYS_5V0 2624mW/2624mW VDDQ_VDD2_1V8AO 403mW/403mW"
)
# A public environment report of an Orin Nano Super; findable by the string "VDD_IN 3462mW/3522mW/3582mW".
JETPACK7 = (
    "09-19-2026 13:33:04 RAM 2840/7486MB (lfb 33x4MB) CPU [3%@729,0%@729,1%@729,0%@729,0%@729,0%@729] EMC_FREQ 3%@665 "
    "GR3D_FREQ 0%@[305] NVDEC0 off NVJPG0 off NVJPG1 off VIC off OFA off APE 200 cpu@45.687C/45.812C "
    "soc2@44.687C/44.843C soc0@46.093C/46.25C gpu@46.781C/46.843C tj@46.781C/46.843C soc1@46.25C/46.281C "
    "VDD_IN 3462mW/3502mW/3582mW VDD_CPU_GPU_CV 442mW/469mW/523mW VDD_SOC 1127mW/1127mW/1127mW"
)
LINES = (JETPACK4, JETPACK5_ELIDED, JETPACK5, JETPACK5_AGX, JETPACK6, JETPACK6_AGX, JETPACK7)


def board_files(name: str) -> dict[str, str]:
    """Path below the root and text of each file of a board."""
    files: dict[str, str] = {}
    path = ""
    for line in (FOLDER / f"{name}.txt").read_text().splitlines():
        if line.startswith("=== "):
            path = line.removeprefix("=== ")
            files[path] = ""
        elif not line.startswith("#:"):
            files[path] += line.replace("\\0", "\0") + "\n"
    return files


def expand(name: str, root: Path) -> Path:
    """The board's files below `root`, which is returned."""
    for path, text in board_files(name).items():
        write(root, path, text)
    return root


def write(root: Path, path: str, text: object) -> Path:
    file = root / path
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(str(text))
    return file


def write_rail(root: Path, channel: int, label: str, voltage_mv: int, current_ma: int, *, bus: str = "1-0040") -> None:
    """A hwmon channel as JetPack 5 to 7 show it; the number behind hwmon is the kernel's choice."""
    folder = f"sys/bus/i2c/drivers/ina3221/{bus}/hwmon/hwmon3"
    write(root, f"{folder}/in{channel}_label", f"{label}\n")
    write(root, f"{folder}/in{channel}_input", f"{voltage_mv}\n")
    write(root, f"{folder}/curr{channel}_input", f"{current_ma}\n")


def orin_rails(root: Path) -> Path:
    """The three rails of an Orin Nano or NX: 4915, 450 and 1432.13 mW."""
    write_rail(root, 1, "VDD_IN", 5000, 983)
    write_rail(root, 2, "VDD_CPU_GPU_CV", 5000, 90)
    write_rail(root, 3, "VDD_SOC", 4990, 287)
    return root


def write_tegrastats(root: Path, script: str) -> None:
    """A program in tegrastats' place that does what a line of shell says."""
    write(root, "usr/bin/tegrastats", f"#!/bin/sh\n{script}\n").chmod(0o755)


def break_reading(file: Path) -> None:
    """Put in its place a file that is there and answers every read with an input/output error."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.unlink(missing_ok=True)
    file.symlink_to("/proc/self/mem")  # nothing is mapped at address 0
