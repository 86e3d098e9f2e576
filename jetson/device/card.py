"""The device card: what a machine says about itself, in its own words.

Only files are read (procfs, sysfs, L4T's release file, the package database). They stand below an injectable root, so a
recorded tree of another board reads the same. Nothing is guessed: what no file says is "unknown", and a JetPack name
never replaces the versions that were read. Names that are looked up (`module_name`, the power mode's name) stand beside
what they were looked up from. No file tells a Jetson's L2 cache.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from merino_edge.jetson.device import sensors
from merino_edge.jetson.device.modules import MODULES, sm_count
from merino_edge.jetson.device.nvpmodel import power_mode
from merino_edge.jetson.device.system_files import UNKNOWN, first_line, number, read_text

# Instruction sets for multiplying small matrices (x86, then ARM).
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
# Figures of two cards are comparable where these fields agree.
SAME_MACHINE = (
    "name",
    "compatible",
    "module",
    "soc",
    "power_mode",
    "gpu",
    "cpu",
    "cpu_flags",
    "cores",
    "physical_cores",
    "cache_bytes",
    "memory_bytes",
)
TPC_MASKS = ("sys/devices/platform/gpu.0/tpc_pg_mask", "sys/devices/gpu.0/tpc_pg_mask")


def device_card(root: Path | str = "/") -> dict[str, Any]:
    """The card of the machine whose file system stands at `root`.

    {"name", "compatible": [...], "module" (part number), "module_name", "soc", "l4t", "l4t_core", "jetpack",
     "power_mode", "gpu": {"tpc_pg_mask", "sm_count", "l2_bytes", "max_mhz" (as capped now)}, "cuda", "tensorrt",
     "driver", "cpu", "cpu_flags": [...], "cores" (logical), "physical_cores",
     "cache_bytes": {"l1d", "l2", "l3"} (of one instance), "memory_bytes", "swap_bytes", "kernel", "system"}
    """
    root = Path(root)
    cpu = _cpu_fields(root)
    model = read_text(root / "proc/device-tree/model").strip("\0\n ")
    compatible = [part for part in read_text(root / "proc/device-tree/compatible").split("\0") if part.strip()]
    module, soc = _module(compatible), _soc(compatible)
    flags = f"{cpu.get('flags', '')} {cpu.get('Features', '')}".split()
    packages = _packages(root)
    return {
        "name": model or cpu.get("model name") or UNKNOWN,
        "compatible": compatible,
        "module": module,
        "module_name": MODULES[module].name if module in MODULES else UNKNOWN,
        "soc": soc,
        "l4t": first_line(root / "etc/nv_tegra_release"),
        "l4t_core": packages.get("nvidia-l4t-core", UNKNOWN),
        "jetpack": packages.get("nvidia-jetpack", UNKNOWN),
        "power_mode": power_mode(root),
        "gpu": _gpu(root, module, soc),
        "cuda": _cuda(root),
        "tensorrt": next((packages[name] for name in packages if re.fullmatch(r"libnvinfer\d*", name)), UNKNOWN),
        "driver": first_line(root / "proc/driver/nvidia/version"),
        "cpu": cpu.get("model name") or _arm_part(cpu),
        "cpu_flags": [flag for flag in FLAGS if flag in flags],
        "cores": len(re.findall(r"^processor\s*:", read_text(root / "proc/cpuinfo"), re.M)) or UNKNOWN,
        "physical_cores": _physical_cores(root),
        "cache_bytes": _caches(root),
        "memory_bytes": _memory_bytes(root, "MemTotal"),
        "swap_bytes": _memory_bytes(root, "SwapTotal"),
        "kernel": first_line(root / "proc/sys/kernel/osrelease"),
        "system": _system(root),
    }


def inner_cache_bytes(card: dict[str, Any]) -> int:
    """The cache before the last, which a core has to itself; 0 where the card has no third level."""
    levels = card["cache_bytes"]
    return int(levels.get("l2", 0)) if "l3" in levels else 0


def last_level_cache_bytes(card: dict[str, Any]) -> int:
    """The largest cache; 0 where the card has none."""
    return max(card["cache_bytes"].values(), default=0)


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The differences that make two cards two machines, a line each; [] where their tables are comparable.

    Clocks, swap and versions may differ. A field that an older tool did not record is ignored.
    """

    def comparable(card: dict[str, Any], field: str) -> Any:
        value = card[field]
        if field == "power_mode":  # without the fan's mode
            return re.sub(r"\s*fmode:\S+", "", str(value))
        if field == "gpu" and isinstance(value, dict):  # the maximal clock follows from the power mode
            return value.get("sm_count", UNKNOWN)
        if field == "memory_bytes" and isinstance(value, int):
            return f"{value / 2**30:.0f} GiB"  # kernels reserve a little more or less
        return value

    both = [field for field in SAME_MACHINE if field in one and field in other]
    pairs = ((field, comparable(one, field), comparable(other, field)) for field in both)
    return [f"{field}: {first}, {second}" for field, first, second in pairs if first != second]


def clock_mhz(root: Path | str = "/") -> float | str:
    """The fastest core's clock now, or "unknown"."""
    return sensors.cpu_clock_mhz(Path(root)) or UNKNOWN


def _module(compatible: Iterable[str]) -> str:
    """The part number of the module. On a carrier it stands behind the carrier's own and a plus."""
    text = "\n".join(compatible)
    part = re.search(r"\+(p\d{4}-\d{4})", text) or re.search(r"\b(p\d{4}-\d{4})", text)
    return part[1] if part else UNKNOWN


def _soc(compatible: Iterable[str]) -> str:
    soc = re.search(r"\btegra\d+\b", "\n".join(compatible))
    return soc[0] if soc else UNKNOWN


def _gpu(root: Path, module: str, soc: str) -> dict[str, Any]:
    masks = (number(root / path) for path in TPC_MASKS)
    mask = next((int(value) for value in masks if value is not None), None)
    count = sm_count(module, soc, mask) if mask is not None else None
    max_mhz = sensors.gpu_clock_mhz(root, "max_freq")
    return {
        "tpc_pg_mask": UNKNOWN if mask is None else mask,
        "sm_count": UNKNOWN if count is None else count,
        "l2_bytes": UNKNOWN,
        "max_mhz": UNKNOWN if max_mhz is None else max_mhz,
    }


def _cpu_fields(root: Path) -> dict[str, str]:
    """The first processor's fields of /proc/cpuinfo."""
    first = read_text(root / "proc/cpuinfo").split("\n\n")[0]
    pairs = (line.split(":", 1) for line in first.splitlines() if ":" in line)
    return {name.strip(): value.strip() for name, value in pairs}


def _arm_part(cpu: dict[str, str]) -> str:
    """The implementer and part number of an ARM core, which has no name."""
    if "CPU part" not in cpu:
        return UNKNOWN
    return f"implementer {cpu.get('CPU implementer', UNKNOWN)} part {cpu['CPU part']}"


def _physical_cores(root: Path) -> int | str:
    """The number of physical cores: logical ones on the same core have the same siblings."""
    names = root.glob("sys/devices/system/cpu/cpu[0-9]*/topology/thread_siblings_list")
    return len({first_line(name) for name in names} - {UNKNOWN}) or UNKNOWN


def _caches(root: Path) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for index in root.glob("sys/devices/system/cpu/cpu[0-9]*/cache/index[0-9]*"):
        level, kind = first_line(index / "level"), first_line(index / "type")
        size = re.fullmatch(r"(\d{1,9})([KM]?)", first_line(index / "size"))
        if size and kind in ("Data", "Unified"):
            name = f"l{level}d" if kind == "Data" else f"l{level}"
            byte_count = int(size[1]) * {"": 1, "K": 2**10, "M": 2**20}[size[2]]
            sizes[name] = max(byte_count, sizes.get(name, 0))
    return dict(sorted(sizes.items()))


def _memory_bytes(root: Path, field: str) -> int | str:
    found = re.search(rf"^{field}:\s*(\d{{1,12}}) kB", read_text(root / "proc/meminfo"), re.M)
    return int(found[1]) * 1024 if found else UNKNOWN


def _cuda(root: Path) -> str:
    """From version.json, or version.txt as JetPack 4 has it."""
    try:
        return str(json.loads(read_text(root / "usr/local/cuda/version.json"))["cuda"]["version"])
    except (ValueError, KeyError, TypeError, RecursionError):
        found = re.search(r"CUDA Version (\S+)", first_line(root / "usr/local/cuda/version.txt"))
        return found[1] if found else UNKNOWN


def _packages(root: Path) -> dict[str, str]:
    """The versions of the installed Debian packages that a card names."""
    versions = {}
    for entry in read_text(root / "var/lib/dpkg/status").split("\n\n"):
        name = re.match(r"\n*Package: (libnvinfer\d*|nvidia-l4t-core|nvidia-jetpack)\n", entry)
        if name:
            fields = dict(line.split(": ", 1) for line in entry.splitlines() if ": " in line)
            if fields.get("Status", "").endswith(" installed"):
                versions[name[1]] = fields.get("Version", UNKNOWN)
    return versions


def _system(root: Path) -> str:
    name = re.search(r'^PRETTY_NAME="?([^"\n]*)', read_text(root / "etc/os-release"), re.M)
    return name[1] if name else UNKNOWN
