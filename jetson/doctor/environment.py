"""What the known traps look at beyond the card: swap, desktop, container, closed device nodes, Python's packages.

Read from the file system below `root`; what concerns the running Python (its version, ONNX Runtime, TensorRT) and the
user is always of this process.
"""

from __future__ import annotations

import grp
import os
import sys
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.device.nvpmodel import Mode, current_mode, power_modes
from merino_edge.jetson.device.system_files import UNKNOWN, read_text

NODES = ("dev/nvhost*", "dev/nvmap", "dev/nvgpu/**/*", "dev/dri/renderD*")
GROUPS = ("video", "render")


@dataclass(frozen=True)
class Environment:
    card: dict[str, Any]
    modes: dict[int, Mode] = field(default_factory=dict)
    mode: Mode | None = None
    disk_swap_bytes: int | None = None  # None: no file says
    zram: bool = False  # swap that is kept in memory
    desktop: bool = False  # a graphical make_batches runs
    container: bool = False
    closed_nodes: tuple[str, ...] = ()  # of the GPU, that this user may not open, with their group
    python: str = UNKNOWN  # 3.10
    onnxruntime: str | None = None  # version
    tensorrt_importable: bool = False
    system_tensorrt: tuple[str, ...] = ()  # folders of the system's Pythons that hold TensorRT's bindings

    @classmethod
    def of(cls, root: Path | str = "/", uid: int | None = None, groups: Collection[int] | None = None) -> Environment:
        root = Path(root)
        card = device_card(root)
        swaps = list(_swaps(root))
        return cls(
            card,
            power_modes(root),
            current_mode(root),
            _disk_swap_bytes(root, swaps, card),
            any(name.startswith("/dev/zram") for name, _ in swaps),
            any(True for pattern in ("tmp/.X11-unix/X*", "run/user/*/wayland-*") for _ in root.glob(pattern)),
            any(os.path.exists(root / name) for name in (".dockerenv", "run/.containerenv")),
            tuple(_closed_nodes(root, os.geteuid() if uid is None else uid, groups or _groups())),
            f"{sys.version_info.major}.{sys.version_info.minor}",
            _version("onnxruntime"),
            find_spec("tensorrt") is not None,
            tuple(str(path) for path in sorted(root.glob("usr/lib/python3*/dist-packages/tensorrt"))),
        )

    @property
    def is_jetson(self) -> bool:
        """Also in a container that sees no device tree: the kernel is the host's."""
        return str(self.card["soc"]).startswith("tegra") or str(self.card["kernel"]).endswith("-tegra")

    @property
    def is_small(self) -> bool:
        """A Jetson of 8 GB or less, where the GPU takes its memory from the same."""
        memory_bytes = self.card["memory_bytes"]
        return self.is_jetson and isinstance(memory_bytes, int) and memory_bytes <= 8 * 2**30


def _swaps(root: Path) -> Iterator[tuple[str, int]]:
    """(name, bytes) of every swap that is on."""
    for line in read_text(root / "proc/swaps").splitlines()[1:]:
        fields = line.split()
        if len(fields) == 5 and fields[2].isdecimal():
            yield fields[0], 1024 * int(fields[2])


def _disk_swap_bytes(root: Path, swaps: list[tuple[str, int]], card: dict[str, Any]) -> int | None:
    if read_text(root / "proc/swaps").startswith("Filename"):
        return sum(size for name, size in swaps if not name.startswith("/dev/zram"))
    return 0 if card["swap_bytes"] == 0 else None  # of a swap with no name there is no telling where it is


def _groups() -> set[int]:
    return {os.getegid(), *os.getgroups()}


def _closed_nodes(root: Path, uid: int, groups: Collection[int]) -> Iterator[str]:
    """Nodes open to one of GROUPS, to which the user does not belong."""
    for path in sorted(path for pattern in NODES for path in root.glob(pattern)):
        try:
            node = path.stat()
            group = grp.getgrgid(node.st_gid).gr_name
        except (OSError, KeyError):
            continue
        mine = uid in (0, node.st_uid) or node.st_mode & 0o006 == 0o006 or node.st_gid in groups
        if group in GROUPS and not mine:
            yield f"/{path.relative_to(root)} (group {group})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
