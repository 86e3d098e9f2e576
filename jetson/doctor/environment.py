"""The environment that the checks judge: the device card, swap, desktop, container, device nodes, Python's packages.

Everything comes from the file system below `root`. Only Python's version and packages, and the user, are always those
of this process.
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
from merino_edge.jetson.device.sensors import throttle_events
from merino_edge.jetson.device.system_files import UNKNOWN, read_text

NODES = ("dev/nvhost*", "dev/nvmap", "dev/nvgpu/**/*", "dev/dri/renderD*")
GROUPS = ("video", "render")
OF_BOARD = ("proc/device-tree", "etc/nv_tegra_release", "etc/nvpmodel.conf", "var/lib/nvpmodel")


@dataclass(frozen=True)
class Environment:
    """What the checks look at."""

    card: dict[str, Any]
    modes: dict[int, Mode] = field(default_factory=dict)  # nvpmodel's power modes
    mode: Mode | None = None  # the current one
    disk_swap_bytes: int | None = None  # None: no file says
    zram: bool = False  # swap that is kept in memory
    desktop: bool = False  # a graphical session runs
    container: bool = False
    has_nodes: bool = True  # the GPU has device nodes
    throttle_events: dict[str, int] = field(default_factory=dict)  # by counter, since the machine started
    hidden: tuple[str, ...] = ()  # files of the board that a container does not see
    closed_nodes: tuple[str, ...] = ()  # the GPU's device nodes that this user may not open, with their group
    python: str = UNKNOWN  # 3.10
    onnxruntime: str | None = None  # version
    tensorrt_importable: bool = False
    system_tensorrt: tuple[str, ...] = ()  # folders of the system's Pythons that hold TensorRT's bindings

    @classmethod
    def of(cls, root: Path | str = "/", uid: int | None = None, groups: Collection[int] | None = None) -> Environment:
        """The environment below `root`; `uid` and `groups` are this process's unless given."""
        root = Path(root)
        card = device_card(root)
        swaps = list(_swaps(root))
        return cls(
            card=card,
            modes=power_modes(root),
            mode=current_mode(root),
            disk_swap_bytes=_disk_swap_bytes(root, swaps, card),
            zram=any(name.startswith("/dev/zram") for name, _ in swaps),
            desktop=any(True for pattern in ("tmp/.X11-unix/X*", "run/user/*/wayland-*") for _ in root.glob(pattern)),
            container=any(os.path.exists(root / name) for name in (".dockerenv", "run/.containerenv")),
            has_nodes=any(True for pattern in NODES for _ in root.glob(pattern)),
            throttle_events=throttle_events(root),
            hidden=tuple(f"/{name}" for name in OF_BOARD if _is_missing(root / name)),
            closed_nodes=tuple(_closed_nodes(root, os.geteuid() if uid is None else uid, groups or _groups())),
            python=f"{sys.version_info.major}.{sys.version_info.minor}",
            onnxruntime=_version("onnxruntime"),
            tensorrt_importable=find_spec("tensorrt") is not None,
            system_tensorrt=tuple(str(path) for path in sorted(root.glob("usr/lib/python3*/dist-packages/tensorrt"))),
        )

    @property
    def is_jetson(self) -> bool:
        """Whether this is a Jetson. In a container without a device tree the host's kernel tells."""
        return str(self.card["soc"]).startswith("tegra") or str(self.card["kernel"]).endswith("-tegra")

    @property
    def is_small(self) -> bool:
        """Whether this is a Jetson with 8 GB or less, which CPU and GPU share."""
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
    return 0 if card["swap_bytes"] == 0 else None  # a swap without a name can be anywhere


def _is_missing(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))


def _groups() -> set[int]:
    return {os.getegid(), *os.getgroups()}


def _closed_nodes(root: Path, uid: int, groups: Collection[int]) -> Iterator[str]:
    """The nodes that are open to one of GROUPS, but not to the user."""
    for path in sorted(path for pattern in NODES for path in root.glob(pattern)):
        try:
            node = path.stat()
            group = grp.getgrgid(node.st_gid).gr_name
        except (OSError, KeyError):
            continue
        open_to_user = uid in (0, node.st_uid) or node.st_mode & 0o006 == 0o006 or node.st_gid in groups
        if group in GROUPS and not open_to_user:
            yield f"/{path.relative_to(root)} (group {group})"


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
