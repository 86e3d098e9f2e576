"""Where a bundle will run, as data: what each place parses, which graph is written for it, and what is known to break.

A `Platform` is a row of `merino-edge targets`. A `Target` is a platform at one precision, with the lowering chosen: all
that the graph builder, the quantiser and the runtime ask. Facts are from NVIDIA's release notes and package lists by
way of meta-tegra (JetPack, L4T, TensorRT and Python versions), onnx-tensorrt's operator tables (opsets; the operators
are in merino_edge.export.operators) and ONNX Runtime's release notes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import onnx_ir as ir

from merino_edge.counts import INT4_BLOCK, PRECISIONS
from merino_edge.errors import UnsupportedError
from merino_edge.export.operators import Version, find_unsupported, version_text

Lowering = Literal["native", "primitive", "ort"]
LOWERINGS: tuple[str, ...] = get_args(Lowering)
Cache = Literal["float", "int8"]
CACHES: tuple[str, ...] = get_args(Cache)
BLOCK_SIZES = (INT4_BLOCK, 64, 128)  # inputs that share a scale


@dataclass(frozen=True)
class Platform:
    """One place a bundle can run. `tensorrt`: whose operators its parser has; None: ONNX Runtime runs the graph."""

    name: str
    boards: str
    system: str  # JetPack's and L4T's releases, or the machine
    python: str
    tensorrt: Version | None
    opsets: tuple[int, int]  # oldest and newest that its parser takes
    lowerings: tuple[Lowering, ...]  # that it can run, the chosen one first
    precisions: tuple[str, ...] = PRECISIONS
    strongly_typed: bool = True  # networks whose types are the graph's
    known: tuple[str, ...] = ()  # bugs and limits, with where they were told

    @property
    def library(self) -> str:
        if self.tensorrt is None:
            return "ONNX Runtime from 1.23"
        return "TensorRT for RTX" if self.name == "rtx" else f"TensorRT {version_text(self.tensorrt)}"

    def lowerings_at(self, precision: str) -> tuple[Lowering, ...]:
        """The lowerings that it can run at `precision`: TensorRT's fused attention has no fp32."""
        return tuple(low for low in self.lowerings if not (self.tensorrt and low == "native" and precision == "fp32"))

    @property
    def fused_attention(self) -> bool:
        """Whether ONNX's Attention and TensorScatter become one layer each, the cache updated in place."""
        return "native" in self.lowerings


PLATFORMS: dict[str, Platform] = {
    platform.name: platform
    for platform in (
        Platform(
            "onnxruntime",
            boards="any, and any CPU",
            system="Linux, macOS, Windows",
            python="3.10 and later",
            tensorrt=None,
            opsets=(7, 24),
            lowerings=("ort", "native", "primitive"),
            known=("the native lowering needs 1.25: TensorScatter (ONNX Runtime's release notes)",),
        ),
        Platform(
            "jetpack-6.0",
            boards="Orin",
            system="JetPack 6.0, L4T r36.2 to r36.3",
            python="3.10",
            tensorrt=(8, 6),
            opsets=(7, 17),
            lowerings=("primitive",),
            precisions=("fp32", "fp16", "int8"),
            strongly_typed=False,
            known=(
                "attention is not fused on Orin (NVIDIA/TensorRT issue 3575)",
                "some graphs have no implementation for a ForeignNode (issues 3640, 4673)",
                "no INT4 type: it came with 10.0",
            ),
        ),
        Platform(
            "jetpack-6.2",
            boards="Orin",
            system="JetPack 6.1 to 6.2.3, L4T r36.4 to r36.5",
            python="3.10",
            tensorrt=(10, 3),
            opsets=(9, 21),
            lowerings=("primitive",),
            known=(
                "L4T r36.4.7 breaks large allocations; r36.5.0 does not (llama.cpp pull request 23732)",
                "opset 21 is used for int4 alone: the parser's table ends at 20, but takes INT4, which came with 21",
            ),
        ),
        Platform(
            "jetpack-7.1",
            boards="Thor",
            system="JetPack 7.0 to 7.1, L4T r38.2 to r38.4",
            python="3.12",
            tensorrt=(10, 13),
            opsets=(9, 21),
            lowerings=("primitive",),
        ),
        Platform(
            "jetpack-7.2",
            boards="Orin, Thor",
            system="JetPack 7.2, L4T r39.2",
            python="3.12",
            tensorrt=(10, 16),
            opsets=(9, 24),
            lowerings=("native", "primitive"),
            known=(
                "a cache of 2048 did not build on GB300 (Model-Connect issue 245); a smaller --context is the cure",
                "the causal flag is aligned to the upper left; the graph passes a mask instead",
            ),
        ),
        Platform(
            "tensorrt-11",
            boards="Orin AGX, Thor; any GPU",
            system="JetPack 7.2.2, or a workstation with CUDA 13",
            python="3.10 and later",
            tensorrt=(11, 0),
            opsets=(9, 24),
            lowerings=("native", "primitive"),
        ),
        Platform(
            "rtx",
            boards="none; GeForce and RTX GPUs",
            system="Linux x86-64, Windows; TensorRT for RTX 1.x",
            python="3.10 and later",
            tensorrt=(10, 16),
            opsets=(9, 24),
            lowerings=("native", "primitive"),
            known=("lists SM75, 86, 89 and 120: no Jetson (its support matrix)",),
        ),
    )
}
TARGETS: tuple[str, ...] = tuple(PLATFORMS)


@dataclass(frozen=True)
class Target:
    """A platform at one precision, by one lowering. `block`: most inputs that share a scale, where not all do. `fast`:
    of two forms of int4 the one that takes less time, not the one with less error. `cache`: what keys and values are
    kept as, float being what matrices compute in."""

    platform: Platform
    precision: str
    lowering: Lowering
    block: int = INT4_BLOCK
    fast: bool = False
    cache: Cache = "float"

    @staticmethod
    def named(
        name: str, precision: str, lowering: str = "", block: int = INT4_BLOCK, fast: bool = False, cache: str = "float"
    ) -> Target:
        """The target `name` at `precision`; `lowering` other than the platform's own choice where it runs that too.

        Raises UnsupportedError for an unknown name, or what the platform cannot run.
        """
        if name not in PLATFORMS:
            raise UnsupportedError(f"unknown target {name!r}", f"choose one of: {', '.join(TARGETS)}")
        if precision not in PRECISIONS:
            raise UnsupportedError(f"unknown precision {precision!r}", f"choose one of: {', '.join(PRECISIONS)}")
        if block not in BLOCK_SIZES:
            raise UnsupportedError(f"no target has blocks of {block}", f"choose one of: {', '.join(map(str, BLOCK_SIZES))}")
        platform = PLATFORMS[name]
        if precision not in platform.precisions:
            raise UnsupportedError(
                f"{name} ({platform.library}) has no {precision}", f"choose one of: {', '.join(platform.precisions)}"
            )
        able = platform.lowerings_at(precision)
        chosen = lowering or able[0]
        if chosen not in LOWERINGS:
            raise UnsupportedError(f"unknown lowering {chosen!r}", f"choose one of: {', '.join(LOWERINGS)}")
        if chosen not in able:
            reason = (
                "TensorRT's fused attention has no fp32" if chosen in platform.lowerings else _why_not(platform, chosen)
            )
            raise UnsupportedError(
                f"{name} ({platform.library}) cannot run the {chosen} lowering at {precision}: {reason}",
                f"choose --lowering {' or '.join(able)}",
            )
        if cache not in CACHES:
            raise UnsupportedError(f"unknown cache {cache!r}", f"choose one of: {', '.join(CACHES)}")
        if cache == "int8" and (chosen != "ort" or precision not in ("int8", "int4")):
            raise UnsupportedError(
                f"a cache of int8 goes with int8 or int4 weights by the ort lowering, not {precision} by {chosen}",
                "leave --cache out",
            )
        target = Target(platform, precision, chosen, block, fast, cache)  # type: ignore[arg-type]
        if block != INT4_BLOCK and not (precision == "int4" or (precision == "int8" and target.blocks_int8)):
            raise UnsupportedError(f"{name} at {precision} has no blocks of inputs", "leave --block out")
        if fast and (precision != "int4" or target.on_tensorrt):
            raise UnsupportedError(f"{name} at {precision} has one form only", "leave --fast out")
        return target

    @property
    def name(self) -> str:
        return self.platform.name

    @property
    def on_tensorrt(self) -> bool:
        return self.platform.tensorrt is not None

    @property
    def compute_dtype(self) -> ir.DataType:
        """Of matrices' activations and, as a rule, of the cache."""
        half = self.on_tensorrt and self.precision != "fp32"
        return ir.DataType.FLOAT16 if half else ir.DataType.FLOAT

    @property
    def int8_cache(self) -> bool:
        return self.cache == "int8"

    @property
    def static_cache(self) -> bool:
        """Whether the cache's capacity is fixed in the graph, or symbolic so that a runtime binds what it needs."""
        return self.on_tensorrt or self.lowering == "primitive"

    @property
    def opset(self) -> int:
        """The oldest that has what the lowering writes."""
        if self.lowering == "native" or self.int8_cache:
            return 24  # the first with TensorScatter
        if self.lowering == "ort" or (self.precision == "int4" and self.on_tensorrt):
            return 21  # the first with INT4, and with blocks in DequantizeLinear
        return min(19, self.platform.opsets[1])  # 19: a float16 scale in DequantizeLinear

    @property
    def blocks_int8(self) -> bool:
        """Whether int8 may have a scale per block of inputs; TensorRT knows blocks for int4 only."""
        return not self.on_tensorrt


def require_parsed(model: ir.Model, target: Target) -> None:
    """Refuse a graph with an operator or element type that the target's parser does not take, naming each.

    Raises UnsupportedError.
    """
    if target.platform.tensorrt and (missing := find_unsupported(model, target.platform.tensorrt)):
        raise UnsupportedError(
            f"{target.name} ({target.platform.library}) does not parse {', '.join(map(str, missing))}",
            "choose another --target (merino-edge targets lists them)",
        )


def _why_not(platform: Platform, lowering: str) -> str:
    if lowering == "ort":
        return "it is made of ONNX Runtime's own operators (com.microsoft.GroupQueryAttention), which TensorRT lacks"
    return "RMSNormalization, RotaryEmbedding and TensorScatter came with TensorRT 10.15"
