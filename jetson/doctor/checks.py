"""Checks of the doctor: known issues of a machine on which everything is installed, and their cures.

A check is data and a predicate on what was read. It describes its finding, or returns nothing. It judges what a file
shows and never guesses: where the file cannot be read, it is silent. This module knows no verbs and no packages to
install (`merino_edge.jetson.doctor.doctor`).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypedDict

from merino_edge.jetson.device.nvpmodel import Mode
from merino_edge.jetson.device.system_files import UNKNOWN
from merino_edge.jetson.doctor.environment import Environment
from merino_edge.runtime.engines.onnx_session import OLDEST_ONNX_RUNTIME

OLDEST_TENSORRT = (10, 3)
CAPPED_MHZ = 624.75  # of an Orin Nano's GPU without Super
TOLERANCE = 0.02  # relative, of a GPU limit
# What the counters of Orin count, as NVIDIA's developer guide names it.
OVER_CURRENT = {"oc1": "under-voltage", "oc2": "average over-current", "oc3": "instantaneous over-current"}


@dataclass(frozen=True)
class Check:
    """A known issue. `find` describes it where the environment has it, and returns None elsewhere."""

    name: str
    find: Callable[[Environment], str | None]
    advice: str
    source: str


class Finding(TypedDict):
    """What a check found, its cure and the source."""

    name: str
    found: str
    advice: str
    source: str


def run_checks(environment: Environment) -> list[Finding]:
    """The findings of all checks."""
    return [_finding(check, found) for check in CHECKS if (found := check.find(environment))]


def check_engine(built_on: Any, here: Mapping[str, Any]) -> list[Finding]:
    """The finding where an engine was built on another machine; both are device cards, `built_on` perhaps none."""
    fields: dict[str, Callable[[Mapping[str, Any]], Any]] = {
        "TensorRT": lambda card: card.get("tensorrt"),
        "L4T": _l4t,
        "module": lambda card: card.get("module"),
        "SMs": lambda card: _mapping(card.get("gpu")).get("sm_count"),
        "power mode": lambda card: re.sub(r"\s*fmode:\S+", "", str(card.get("power_mode"))),
    }
    pairs = [(name, read(_mapping(built_on)), read(here)) for name, read in fields.items()]
    changes = [f"{name} {was}, here {now}" for name, was, now in pairs if was != now]
    return [_finding(ENGINE, f"engine built on {'; '.join(changes)}")] if changes else []


def _finding(check: Check, found: str) -> Finding:
    return {"name": check.name, "found": found, "advice": check.advice, "source": check.source}


def _mapping(value: Any) -> Mapping[str, Any]:
    """`value` of a file that others may have written, or an empty mapping where it is none."""
    return value if isinstance(value, Mapping) else {}


def _version(text: Any) -> tuple[int, ...]:
    """The leading numbers of a version; () where there are none."""
    numbers = re.match(r"\d{1,9}(?:\.\d{1,9})*", str(text))
    return tuple(map(int, numbers[0].split("."))) if numbers else ()


def _l4t(card: Mapping[str, Any]) -> str:
    """L4T's version, as 36.4.7, from the release file, else from the package."""
    release = re.match(r"# R(\d+) \(release\), REVISION: (\d+(?:\.\d+)*)", str(card.get("l4t")))
    if release:
        return f"{release[1]}.{release[2]}"
    return str(card.get("l4t_core", UNKNOWN)).split("-")[0]


# --- predicates ------------------------------------------------------------------------------------


def _allocation(environment: Environment) -> str | None:
    return "L4T 36.4.7" if _l4t(environment.card) == "36.4.7" else None


def _clock_cap(environment: Environment) -> str | None:
    if _l4t(environment.card) != "39.2.0" or environment.card["module"] not in ("p3767-0003", "p3767-0005"):
        return None
    signs = []
    if environment.modes and not any("SUPER" in mode.name for mode in environment.modes.values()):
        signs.append(f"power modes {', '.join(mode.name for mode in environment.modes.values())} only")
    max_mhz = environment.card["gpu"]["max_mhz"]
    if (
        isinstance(max_mhz, float)
        and max_mhz <= CAPPED_MHZ
        and (environment.mode is None or _cap(environment.mode) > CAPPED_MHZ)
    ):
        signs.append(f"GPU limit {max_mhz:g} MHz")
    return f"L4T 39.2.0: {'; '.join(signs)}" if signs else None


def _mode_not_applied(environment: Environment) -> str | None:
    max_mhz = environment.card["gpu"]["max_mhz"]
    if environment.mode is None or environment.mode.gpu_max_mhz is None or not isinstance(max_mhz, float):
        return None
    if abs(max_mhz - environment.mode.gpu_max_mhz) <= TOLERANCE * environment.mode.gpu_max_mhz:
        return None
    return (
        f"{environment.mode.name} means a GPU limit of {environment.mode.gpu_cap}, the GPU's limit is {max_mhz:g} MHz"
    )


def _mode_holds_back(environment: Environment) -> str | None:
    mode, others = environment.mode, [mode for mode in environment.modes.values() if mode != environment.mode]
    if mode is None or not others:
        return None
    losses = []
    fullest = min(others, key=lambda other: (other.tpcs_off, -_cap(other)))
    if mode.tpcs_off > fullest.tpcs_off:
        off = mode.tpcs_off - fullest.tpcs_off
        losses.append(f"switches off {2 * off} SMs that {fullest.name} (nvpmodel -m {fullest.id}) has on")
    if any(_cap(other) > _cap(mode) for other in others):
        fastest = max(others, key=_cap)
        text = f"caps the GPU at {mode.gpu_cap} ({fastest.name}, nvpmodel -m {fastest.id}: {fastest.gpu_cap}"
        lower = [other for other in others if _watts(other) < _watts(mode) and _cap(other) > _cap(mode)]
        losses.append(text + "".join(f"; even {other.name}: {other.gpu_cap}" for other in lower) + ")")
    return f"power mode {mode.name} {' and '.join(losses)}" if losses else None


def _cap(mode: Mode) -> float:
    return math.inf if mode.gpu_max_mhz is None else mode.gpu_max_mhz


def _watts(mode: Mode) -> float:
    watts = re.search(r"(\d+)W", mode.name)
    return int(watts[1]) if watts else math.inf


def _old_tensorrt(environment: Environment) -> str | None:
    version = _version(environment.card["tensorrt"])
    return (
        f"TensorRT {environment.card['tensorrt']}"
        if environment.is_jetson and version and version < OLDEST_TENSORRT
        else None
    )


def _old_onnxruntime(environment: Environment) -> str | None:
    version = _version(environment.onnxruntime)
    if not version or version >= OLDEST_ONNX_RUNTIME:
        return None
    return f"ONNX Runtime {environment.onnxruntime}"


def _no_swap(environment: Environment) -> str | None:
    if not environment.is_small or environment.disk_swap_bytes != 0:
        return None
    return f"{environment.card['memory_bytes'] / 2**30:.1f} GiB of memory, no swap on a disk"


def _zram(environment: Environment) -> str | None:
    return "swap in memory (/dev/zram)" if environment.is_small and environment.zram else None


def _desktop(environment: Environment) -> str | None:
    return "a graphical session runs" if environment.is_small and environment.desktop else None


def _blind_container(environment: Environment) -> str | None:
    if not environment.container or not environment.is_jetson or not environment.hidden:
        return None
    return f"this container does not see {' and '.join(environment.hidden)}"


def _no_nodes(environment: Environment) -> str | None:
    if not environment.container or not environment.is_jetson or environment.has_nodes:
        return None
    return "this container has no device of the GPU"


def _throttled(environment: Environment) -> str | None:
    counted = {name: count for name, count in environment.throttle_events.items() if count > 0}
    if not environment.is_jetson or not counted:
        return None
    return "since the start, " + ", ".join(f"{OVER_CURRENT.get(name, name)} {n} times" for name, n in counted.items())


def _closed_nodes(environment: Environment) -> str | None:
    if not environment.is_jetson or not environment.closed_nodes:
        return None
    shown, more = environment.closed_nodes[:2], len(environment.closed_nodes) - 2
    return f"this user may not open {', '.join(shown)}" + (f" and {more} more" if more > 0 else "")


def _hidden_tensorrt(environment: Environment) -> str | None:
    if environment.tensorrt_importable or not environment.system_tensorrt:
        return None
    folders = ", ".join(environment.system_tensorrt)
    return f"TensorRT's bindings are in {folders}, this Python {environment.python} does not see them"


# --- the checks -----------------------------------------------------------------------------------

ENGINE = Check(
    "engine from elsewhere",
    lambda environment: None,  # needs an engine: check_engine
    "build the engine again here: it is tied to TensorRT, GPU and SM count, and timed at its power mode's clocks",
    "https://github.com/NVIDIA/TensorRT/issues/2900",
)
CHECKS = (
    Check(
        "large allocations fail",
        _allocation,
        "update to L4T 36.5 (JetPack 6.2.2): sudo apt update && sudo apt full-upgrade; until then reboot first",
        "https://github.com/ggml-org/llama.cpp/pull/23732",
    ),
    Check(
        "GPU capped by JetPack 7.2.0",
        _clock_cap,
        "update to JetPack 7.2.1: sudo apt update && sudo apt full-upgrade; then sudo nvpmodel -m 2",
        "NVIDIA developer forum, threads 372627, 377003, 377553",
    ),
    Check(
        "power mode not applied",
        _mode_not_applied,
        "set it again: sudo nvpmodel -m NUMBER, and reboot if it asks; figures hold for the clocks, not for the name",
        "NVIDIA developer forum, threads 372627, 377003",
    ),
    Check(
        "power mode holds the GPU back",
        _mode_holds_back,
        "if it is not meant: sudo nvpmodel -m NUMBER; tables and engines hold for one power mode",
        "https://github.com/LineageOS/android_device_nvidia_concord (nvpmodel/)",
    ),
    Check(
        "TensorRT too old",
        _old_tensorrt,
        "engines need TensorRT 10.3 (JetPack 6.1, Orin and later); here run bundles with ONNX Runtime",
        "https://github.com/NVIDIA/TensorRT (python/src of each release branch)",
    ),
    Check(
        "ONNX Runtime too old",
        _old_onnxruntime,
        "bundles need 1.23, which is there for Python 3.10 too: pip install -U 'onnxruntime>=1.23'",
        "https://github.com/microsoft/onnxruntime/blob/main/docs/OperatorKernels.md",
    ),
    Check(
        "no swap for builds",
        _no_swap,
        "sudo fallocate -l 8G /swapfile && sudo chmod 600 /swapfile && sudo mkswap /swapfile && sudo swapon /swapfile",
        "https://github.com/NVIDIA/TensorRT/issues/2712",
    ),
    Check(
        "swap takes memory",
        _zram,
        "put swap on a disk, then: sudo systemctl disable nvzramconfig && sudo reboot",
        "https://github.com/dusty-nv/jetson-containers/issues/598",
    ),
    Check(
        "desktop takes memory",
        _desktop,
        "before a build: sudo init 3; for good: sudo systemctl set-default multi-user.target && sudo reboot",
        "https://github.com/dusty-nv/jetson-containers/issues/598",
    ),
    Check(
        "container hides the board",
        _blind_container,
        "docker run --security-opt systempaths=unconfined -v /etc/nv_tegra_release:/etc/nv_tegra_release:ro "
        "-v /etc/nvpmodel.conf:/etc/nvpmodel.conf:ro -v /var/lib/nvpmodel:/var/lib/nvpmodel:ro ...",
        "https://github.com/dusty-nv/jetson-containers (docs/setup.md)",
    ),
    Check(
        "container without the GPU",
        _no_nodes,
        "docker run --runtime nvidia ...; where Docker does not know it: sudo apt install nvidia-container-toolkit && "
        "sudo nvidia-ctk runtime configure --runtime=docker && sudo systemctl restart docker",
        "https://github.com/dusty-nv/jetson-containers (docs/setup.md)",
    ),
    Check(
        "the board throttles",
        _throttled,
        "use the supply that belongs to the board, or a lower power mode: sudo nvpmodel -m NUMBER; then measure again",
        "NVIDIA Jetson Linux developer guide, Orin: over-current throttling",
    ),
    Check(
        "GPU closed to this user",
        _closed_nodes,
        "sudo usermod -aG video,render $USER and log in again; in a container: "
        "--group-add video --group-add $(getent group render | cut -d: -f3)",
        "https://github.com/dusty-nv/jetson-containers (docs/setup.md)",
    ),
    Check(
        "TensorRT out of sight",
        _hidden_tensorrt,
        "make the environment with the system's Python: python3 -m venv --system-site-packages VENV",
        "https://github.com/dusty-nv/jetson-containers (packages/cuda/cudastack/install/install_tensorrt.sh)",
    ),
)
