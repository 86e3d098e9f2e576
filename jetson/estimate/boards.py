"""Jetson boards and their power modes as data, for estimates of a board that is not at hand.

Clocks, caps and switched-off TPCs are those of NVIDIA's nvpmodel files. A mode called "max" has the module's own limit,
where those files have none. A constant without a good source is named in `unverified`, one without any source is None.
This module knows no models, no times (`merino_edge.jetson.estimate.roofline`) and not the machine it runs on.

    bandwidth = 2 * EMC clock * bus width        peak FP16 = SMs * FLOPs per SM and clock * GPU clock
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from merino_edge import names
from merino_edge.errors import InputError
from merino_edge.graph_io import ONNX_CUDA_TARGET

NVPMODEL = "nvpmodel files: https://github.com/LineageOS/android_device_nvidia_concord, nvpmodel/"
# From a deviceQuery of the same GPU.
ORIN_NX_QUERY = "https://gist.github.com/atinfinity/8cede915acda05d0ff427c09604735dd"
NANO_QUERY = "https://gist.github.com/r7vme/45ad34e9c2e8d8cd1c01d94975ee6bee"
AGX_BRIEF = "http://mzph.cn/web/30785.shtml (summary of NVIDIA's technical brief)"
SUPER = "NVIDIA's announcement of Orin Nano Super (68 to 102 GB/s, 40 to 67 sparse TOPS)"

# Targets of export with TensorRT, by compute capability: Orin's and Thor's. export/targets.py has their boards.
TARGETS_OF = {
    "8.7": ("jetpack-6.2", "jetpack-7.2", "tensorrt-11"),
    "11.0": ("jetpack-7.1", "jetpack-7.2", "tensorrt-11"),
}


@dataclass(frozen=True)
class PowerMode:
    """A power mode of nvpmodel. `cpu_mhz` is None where no source gives it."""

    name: str
    gpu_mhz: float
    sm_count: int  # streaming multiprocessors that are on; the mode's TPC_PG_MASK switches pairs of them off
    emc_mhz: float  # of the memory controller
    cpu_cores: int | None = None
    cpu_mhz: float | None = None
    unverified: tuple[str, ...] = ()


@dataclass(frozen=True)
class Board:
    """A board and its power modes. `l2_bytes` is None where no source gives it; an estimate then has no L2."""

    name: str
    title: str
    module: str  # part number
    compute_capability: str
    memory_bytes: int | None
    bus_bytes: int  # width of the memory bus
    l2_bytes: int | None
    fp16_flops_per_sm_clock: int  # dense; of the tensor cores where there are any
    fp32_flops_per_sm_clock: int
    modes: tuple[PowerMode, ...]
    sources: tuple[str, ...]
    unverified: tuple[str, ...] = ()

    @property
    def targets(self) -> tuple[str, ...]:
        """The targets of export whose bundles its GPU runs."""
        return (*TARGETS_OF.get(self.compute_capability, ()), ONNX_CUDA_TARGET)

    def mode(self, name: str) -> PowerMode:
        """The power mode called `name`, in upper or lower case. Raises InputError where there is none."""
        return _named(self.modes, name, f"{self.name} has no power mode")

    def bandwidth_gb_s(self, mode: PowerMode) -> float:
        """The theoretical bandwidth of the DRAM."""
        return 2 * mode.emc_mhz * self.bus_bytes / 1000

    def fp16_tflops(self, mode: PowerMode) -> float:
        """The theoretical dense FP16 peak."""
        return mode.sm_count * self.fp16_flops_per_sm_clock * mode.gpu_mhz / 1e6

    def unverified_in(self, mode: PowerMode) -> tuple[str, ...]:
        """The constants of an estimate for this mode that have no good source."""
        unknown = (("l2_bytes unknown",) if self.l2_bytes is None else ()) + (
            ("cpu_mhz unknown",) if mode.cpu_mhz is None else ()
        )
        return self.unverified + mode.unverified + unknown


def board(name: str) -> Board:
    """The board called `name`, in upper or lower case. Raises InputError where there is none."""
    return _named(BOARDS, name, "there is no board")


_Item = TypeVar("_Item", Board, PowerMode)


def _named(choices: Sequence[_Item], name: str, complaint: str) -> _Item:
    for choice in choices:
        if choice.name.lower() == name.lower():
            return choice
    raise InputError(f"{complaint} {name!r}", names.choose(name, [choice.name for choice in choices]))


# --- Orin: 2048 dense FP16 FLOPs per SM and clock in tensor cores, 128 FP32 lanes ---------------------


def _orin(
    name: str,
    title: str,
    module: str,
    modes: tuple[PowerMode, ...],
    *sources: str,
    memory_gb: int,
    bus_bytes: int,
    l2_kib: int | None,
) -> Board:
    l2_bytes = None if l2_kib is None else l2_kib * 1024
    return Board(name, title, module, "8.7", memory_gb * 2**30, bus_bytes, l2_bytes, 2048, 256, modes, sources)


def _orin_nx(max_mhz: float, third: str, unverified: tuple[str, ...]) -> tuple[PowerMode, ...]:
    """The modes of an Orin NX. The 8 GB module has 6 cores, and its clocks differ only without Super."""
    cores, clocks = (8, (None, 1190, 1651, 1498)) if third == "25W" else (6, (None, None, None, None))
    return (
        PowerMode("MAXN", max_mhz, 8, 3199, cores, clocks[0], unverified),
        PowerMode("10W", 612, 4, 2133, 4, clocks[1]),
        PowerMode("15W", 612, 4, 3199, 4, clocks[2]),
        PowerMode(third, 408, 8, 3199, cores, clocks[3]),  # a lower GPU clock than in 15W, on twice the SMs
        PowerMode("40W", 1173, 8, 3199, cores),
        PowerMode("MAXN_SUPER", 1173, 8, 3199, cores),
    )


def _agx_orin(max_mhz: float, sms: int, cores: int, top: str, unverified: tuple[str, ...]) -> tuple[PowerMode, ...]:
    return (
        PowerMode("MAXN", max_mhz, sms, 3199, cores, None, unverified),
        PowerMode("MODE_15W", 408, 6, 2133, 4),
        PowerMode("MODE_30W", 612, 8, 3199, 8),
        PowerMode(top, 816, sms, 3199, cores),
    )


_ORIN_NANO_8GB = (
    PowerMode("7W", 408, 4, 2133, 4, 960),
    PowerMode("15W", 612, 8, 2133, 6, 1497.6),
    PowerMode("25W", 918, 8, 3199, 6, 1344),
    PowerMode("MAXN_SUPER", 1020, 8, 3199, 6, 1728),
    PowerMode("15W-nosuper", 624.75, 8, 2133, 6),  # as shipped before Super, with the file p3767_0003
)
_ORIN_NANO_4GB = (
    PowerMode("10W", 612, 4, 2133, 6, 1497.6),
    PowerMode("25W", 1020, 4, 3199, 6, 1728),
    PowerMode("MAXN_SUPER", 1020, 4, 3199, 6),
    PowerMode("10W-nosuper", 624.75, 4, 2133, 6),
    PowerMode("7W_AI", 408, 4, 2133, 4, 806),
    PowerMode("7W_CPU", 306, 4, 2133, 4, 960),
)

BOARDS: tuple[Board, ...] = (
    Board(
        "nano", "Jetson Nano 4GB (2019)", "p3448-0000", "5.3", 4 * 2**30, 8, 256 * 1024, 512, 256,
        (PowerMode("MAXN", 921.6, 1, 1600, 4, 1479), PowerMode("5W", 640, 1, 1600, 2, 918)),
        (NANO_QUERY, "472 GFLOPS: https://github.com/YahboomTechnology/Jetson-NANO-4GB",
         "25.6 GB/s: https://cpu-gpu.alldbin.com/graphics-card-comparison/Jetson-TX2-GPU-and-Jetson-Nano-comparison.html",
         "modes: https://github.com/jfey/SmallThings (jetson-nano.md)"),
    ),
    Board(
        "xavier-nx", "Jetson Xavier NX 8GB", "p3668-0000", "7.2", 8 * 2**30, 16, 512 * 1024, 1024, 128,
        (PowerMode("max", 1109.25, 6, 1866, 6, None, ("power modes",)),),
        ("GPU limit: https://github.com/snakajim/xaviernx-install",
         "FP16: https://huggingface.co/hardware/jetson-xavier-nx"),
        ("bandwidth (59.7 GB/s; early documents say 51.2)", "l2_bytes"),
    ),
    _orin("orin-nano-4gb", "Jetson Orin Nano 4GB", "p3767-0004", _ORIN_NANO_4GB, NVPMODEL,
          memory_gb=4, bus_bytes=8, l2_kib=None),
    _orin("orin-nano-8gb", "Jetson Orin Nano 8GB", "p3767-0003", _ORIN_NANO_8GB, NVPMODEL, ORIN_NX_QUERY,
          SUPER, memory_gb=8, bus_bytes=16, l2_kib=2048),
    _orin("orin-nx-8gb", "Jetson Orin NX 8GB", "p3767-0001", _orin_nx(765, "20W", ("gpu_mhz",)), NVPMODEL,
          ORIN_NX_QUERY, memory_gb=8, bus_bytes=16, l2_kib=2048),
    _orin("orin-nx-16gb", "Jetson Orin NX 16GB", "p3767-0000", _orin_nx(918, "25W", ()), NVPMODEL,
          ORIN_NX_QUERY, memory_gb=16, bus_bytes=16, l2_kib=2048),
    _orin("agx-orin-32gb", "Jetson AGX Orin 32GB", "p3701-0004",
          _agx_orin(930, 14, 8, "MODE_40W", ("gpu_mhz",)), NVPMODEL, AGX_BRIEF,
          memory_gb=32, bus_bytes=32, l2_kib=4096),
    _orin("agx-orin-64gb", "Jetson AGX Orin 64GB", "p3701-0005", _agx_orin(1300, 16, 12, "MODE_50W", ()),
          NVPMODEL, AGX_BRIEF, memory_gb=64, bus_bytes=32, l2_kib=4096),
    Board(
        "agx-thor", "Jetson AGX Thor T5000", "p3834-0008", "11.0", None, 32, 32 * 2**20, 8192, 256,
        (PowerMode("max", 1575, 20, 4266, None, None, ("gpu_mhz", "power modes")),),
        ("https://huggingface.co/hardware/jetson-t5000",), ("fp16_flops_per_sm_clock",),
    ),
)  # fmt: skip
