"""The device card: what a machine says about itself, as it says it.

Read from files only (procfs, sysfs, L4T's release file, the package database), below an injectable root, so that
a recorded tree of another board reads the same. Nothing is guessed or translated: what no file says is "unknown",
and a JetPack name never stands in for the versions that were read.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

UNKNOWN = "unknown"
# Instruction sets that decide how fast a CPU multiplies small matrices (x86, then ARM).
FLAGS = (
    "avx2",
    "fma",
    "f16c",
    "avx512f",
    "avx512bw",
    "avx_vnni",
    "avx512_vnni",
    "avx512_bf16",
    "amx_int8",
    "amx_bf16",
    "asimd",
    "asimdhp",
    "asimddp",
    "i8mm",
    "bf16",
    "sve",
    "sve2",
)


def device_card(root: Path | str = "/") -> dict[str, Any]:
    """The card of the machine whose file system stands at `root`.

    {"name", "compatible": [...], "l4t", "power_mode", "cuda", "tensorrt", "cpu", "cpu_flags": [...], "cores",
     "cache_bytes": {"l1d", "l2", "l3"} (the largest of one instance), "memory_bytes", "kernel", "system"}
    """
    root = Path(root)
    cpu = _cpu_fields(root)
    model = _text(root / "proc/device-tree/model").strip("\0\n ")
    flags = f"{cpu.get('flags', '')} {cpu.get('Features', '')}".split()
    return {
        "name": model or cpu.get("model name") or UNKNOWN,
        "compatible": [part for part in _text(root / "proc/device-tree/compatible").split("\0") if part.strip()],
        "l4t": _first_line(root / "etc/nv_tegra_release"),
        "power_mode": _first_line(root / "var/lib/nvpmodel/status"),
        "cuda": _cuda(root),
        "tensorrt": _package(root, r"libnvinfer\d*"),
        "cpu": cpu.get("model name") or _arm_part(cpu),
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(re.findall(r"^processor\s*:", _text(root / "proc/cpuinfo"), re.M)) or UNKNOWN,
        "cache_bytes": _caches(root),
        "memory_bytes": _memory_bytes(root),
        "kernel": _first_line(root / "proc/sys/kernel/osrelease"),
        "system": _system(root),
    }


def last_level_cache_bytes(card: dict[str, Any]) -> int:
    """The largest cache the card knows, 0 when it knows none."""
    return max(card["cache_bytes"].values(), default=0)


def clock_mhz(root: Path | str = "/") -> float | str:
    """The first core's clock as it runs now."""
    root = Path(root)
    scaling = _first_line(root / "sys/devices/system/cpu/cpu0/cpufreq/scaling_cur_freq")  # kHz
    shown = str(int(scaling) / 1000) if scaling.isdigit() else _cpu_fields(root).get("cpu MHz", UNKNOWN)
    return UNKNOWN if shown == UNKNOWN else float(shown)


def _text(path: Path) -> str:
    """The file's text, empty where it is missing or unreadable."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _first_line(path: Path) -> str:
    return next(iter(_text(path).strip("\0\n ").splitlines()), UNKNOWN)


def _cpu_fields(root: Path) -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    first = _text(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _arm_part(cpu: dict[str, str]) -> str:
    """ARM cores give numbers, not names; the numbers are passed on."""
    if "CPU part" not in cpu:
        return UNKNOWN
    return f"implementer {cpu.get('CPU implementer', UNKNOWN)} part {cpu['CPU part']}"


def _caches(root: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for index in root.glob("sys/devices/system/cpu/cpu[0-9]*/cache/index[0-9]*"):
        level, kind = _first_line(index / "level"), _first_line(index / "type")
        size = re.fullmatch(r"(\d+)([KM]?)", _first_line(index / "size"))
        if size and kind in ("Data", "Unified"):
            name = f"l{level}d" if kind == "Data" else f"l{level}"
            byte_count = int(size[1]) * {"": 1, "K": 2**10, "M": 2**20}[size[2]]
            sizes[name] = max(byte_count, sizes.get(name, 0))
    return dict(sorted(sizes.items()))


def _memory_bytes(root: Path) -> int | str:
    found = re.search(r"^MemTotal:\s*(\d+) kB", _text(root / "proc/meminfo"), re.M)
    return int(found[1]) * 1024 if found else UNKNOWN


def _cuda(root: Path) -> str:
    try:
        return str(json.loads(_text(root / "usr/local/cuda/version.json"))["cuda"]["version"])
    except (ValueError, KeyError, TypeError):
        return UNKNOWN


def _package(root: Path, name: str) -> str:
    """The version of an installed Debian package whose name matches."""
    for entry in _text(root / "var/lib/dpkg/status").split("\n\n"):
        fields = dict(line.split(": ", 1) for line in entry.splitlines() if ": " in line)
        installed = fields.get("Status", "").endswith(" installed")
        if installed and re.fullmatch(name, fields.get("Package", "")):
            return fields.get("Version", UNKNOWN)
    return UNKNOWN


def _system(root: Path) -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]*)', _text(root / "etc/os-release"), re.M)
    return found[1] if found else UNKNOWN
