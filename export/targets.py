"""Where a bundle runs, as data: what each platform parses, which graph is written for it, and its known issues.

A `Platform` is a row of `merino-edge targets`. A `Target` is a platform at one precision, with its lowering: it answers
all that the graph builder, the quantiser and the runtime ask. How it stores numbers is in `merino_edge.storage`.

| facts | source |
|---|---|
| versions of JetPack, L4T, TensorRT and Python | NVIDIA's release notes and package lists, by way of meta-tegra |
| opsets | onnx-tensorrt's operator tables (the operators are in merino_edge.export.operators) |
| ONNX Runtime | its release notes |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import onnx_ir as ir

from merino_edge import names
from merino_edge.errors import UnsupportedError
from merino_edge.export.operators import find_unsupported, version_text
from merino_edge.graph_io import ONNX_CUDA_TARGET
from merino_edge.storage import INT4_BLOCK, PRECISIONS, Lowering, Storage, StorageRules, Version, rules_of, stored_as

LOWERINGS: tuple[str, ...] = get_args(Lowering)
Cache = Literal["float", "int8"]
CACHES: tuple[str, ...] = get_args(Cache)
BLOCK_SIZES = (INT4_BLOCK, 64, 128)  # how many inputs share a scale
# Of one tensor, where boards refuse large allocations. Reports name 929 and 1,075 MB on an Orin Nano with L4T r36, with
# memory free (llama.cpp pull request 23732, NVIDIA's forum 370049). A quarter of that leaves room.
LARGEST_WEIGHT_BYTES = 2**28


@dataclass(frozen=True)
class Platform:
    """One place where a bundle can run.

    `system`: the releases of JetPack and L4T, or the machine. `opsets`: the oldest and newest that its parser takes.
    `largest_weight_bytes`: a table with more is written in pieces. `known_issues`: bugs and limits, with their source.
    """

    name: str
    boards: str
    system: str
    python: str
    opsets: tuple[int, int]
    largest_weight_bytes: int | None = None
    known_issues: tuple[str, ...] = ()

    @property
    def library(self) -> str:
        """The library that runs the graph, with its release."""
        if self.tensorrt is None:
            return "ONNX Runtime from 1.23"
        return "TensorRT for RTX" if self.name == "rtx" else f"TensorRT {version_text(self.tensorrt)}"

    @property
    def rules(self) -> StorageRules:
        """How it stores numbers, and by which lowerings it writes attention."""
        return rules_of(self.name)

    @property
    def tensorrt(self) -> Version | None:
        """The release whose operators its parser has; None: ONNX Runtime runs the graph."""
        return self.rules.tensorrt

    @property
    def lowerings(self) -> tuple[Lowering, ...]:
        """The lowerings that it can run, the default first."""
        return self.rules.lowerings

    @property
    def precisions(self) -> tuple[str, ...]:
        """The precisions that it can run."""
        return self.rules.precisions

    def lowerings_at(self, precision: str) -> tuple[Lowering, ...]:
        """The lowerings that it can run at `precision`."""
        return self.rules.lowerings_at(precision)

    @property
    def fused_attention(self) -> bool:
        """Whether ONNX's Attention and TensorScatter become one layer each, with the cache updated in place."""
        return "native" in self.lowerings


PLATFORMS: dict[str, Platform] = {
    platform.name: platform
    for platform in (
        Platform(
            "onnxruntime",
            boards="any, and any CPU",
            system="Linux, macOS, Windows",
            python="3.10 and later",
            opsets=(7, 24),
            known_issues=("the native lowering needs 1.25: TensorScatter (ONNX Runtime's release notes)",),
        ),
        Platform(
            ONNX_CUDA_TARGET,
            boards="any with an NVIDIA GPU",
            system="Linux, Windows; onnxruntime-gpu",
            python="3.10 and later",
            opsets=(7, 24),
            known_issues=(
                "GroupQueryAttention has float16 and bfloat16 kernels only (ONNX Runtime's docs/OperatorKernels.md)",
            ),
        ),
        Platform(
            "jetpack-6.2",
            boards="Orin",
            system="JetPack 6.1 to 6.2.3, L4T r36.4 to r36.5",
            python="3.10",
            opsets=(9, 21),
            largest_weight_bytes=LARGEST_WEIGHT_BYTES,
            known_issues=(
                "L4T r36.4.7 breaks large allocations; r36.5.0 does not (llama.cpp pull request 23732)",
                "opset 21 is used for int4 alone: the parser's table ends at 20, but takes INT4, which came with 21",
            ),
        ),
        Platform(
            "jetpack-7.1",
            boards="Thor",
            system="JetPack 7.0 to 7.1, L4T r38.2 to r38.4",
            python="3.12",
            opsets=(9, 21),
        ),
        Platform(
            "jetpack-7.2",
            boards="Orin, Thor",
            system="JetPack 7.2, L4T r39.2",
            python="3.12",
            opsets=(9, 24),
            known_issues=(
                "a cache of 2048 did not build on GB300 (Model-Connect issue 245); --lowering primitive is the cure",
                "the causal flag is aligned to the upper left; the graph passes a mask instead",
            ),
        ),
        Platform(
            "tensorrt-11",
            boards="Orin AGX, Thor; any GPU",
            system="JetPack 7.2.2, or a workstation with CUDA 13",
            python="3.10 and later",
            opsets=(9, 24),
        ),
        Platform(
            "rtx",
            boards="none; GeForce and RTX GPUs",
            system="Linux x86-64, Windows; TensorRT for RTX 1.x",
            python="3.10 and later",
            opsets=(9, 24),
            known_issues=(
                "has kernels for SM75, 80, 86, 89, 120 and 121 (1.7): no Jetson (SM87, SM110), no H100 or H200 (SM90); "
                "a Jetson takes its own TensorRT, those cards the full one",
            ),
        ),
    )
}
TARGETS: tuple[str, ...] = tuple(PLATFORMS)


@dataclass(frozen=True)
class Target:
    """A platform at one precision, by one lowering.

    `block`: the most inputs that share a scale, where not all do. `fast`: whether int4 takes the form that needs less
    time, not the one with less error. `cache`: the type of the KV cache; "float" is the type that matrices compute in.
    `block_precisions`: of the weights of each block's layers; empty: that of everything else.
    """

    platform: Platform
    precision: str
    lowering: Lowering
    block: int = INT4_BLOCK
    fast: bool = False
    cache: Cache = "float"
    block_precisions: tuple[str, ...] = ()

    @staticmethod
    def named(
        name: str,
        precision: str,
        lowering: str = "",
        *,
        block: int = INT4_BLOCK,
        fast: bool = False,
        cache: str = "float",
        block_precisions: Sequence[str] = (),
    ) -> Target:
        """The target `name` at `precision`; an empty `lowering` takes the platform's default.

        Raises UnsupportedError for a name that is not known, and for what the platform cannot run.
        """
        if name not in PLATFORMS:
            raise UnsupportedError(f"unknown target {name!r}", names.choose(name, TARGETS))
        if precision not in PRECISIONS:
            raise UnsupportedError(f"unknown precision {precision!r}", names.choose(precision, PRECISIONS))
        if block not in BLOCK_SIZES:
            sizes = ", ".join(map(str, BLOCK_SIZES))
            raise UnsupportedError(f"no target has blocks of {block}", f"choose one of: {sizes}")
        platform = PLATFORMS[name]
        if precision not in platform.precisions:
            raise UnsupportedError(
                f"{name} ({platform.library}) has no {precision}", f"choose one of: {', '.join(platform.precisions)}"
            )
        resolved = _resolve_lowering(platform, precision, lowering)
        if cache not in CACHES:
            raise UnsupportedError(f"unknown cache {cache!r}", names.choose(cache, CACHES))
        if cache == "int8" and (resolved != "ort" or precision not in ("int8", "int4") or platform.rules.half):
            raise UnsupportedError(
                f"an int8 cache goes with int8 or int4 weights by the ort lowering, not {precision} by {resolved}"
                f" for {name}",
                "leave --cache out",
            )
        _check_mixed(platform, precision, block_precisions)
        target = Target(platform, precision, resolved, block, fast, cache, tuple(block_precisions))  # type: ignore[arg-type]
        if block != INT4_BLOCK and not target.storage.needs_blocks:
            raise UnsupportedError(f"{name} at {precision} has no blocks of inputs", "leave --block out")
        if fast and (precision != "int4" or target.on_tensorrt):
            raise UnsupportedError(f"{name} at {precision} has one form only", "leave --fast out")
        return target

    @property
    def name(self) -> str:
        """The platform's name."""
        return self.platform.name

    @property
    def storage(self) -> Storage:
        """How it stores weights and cache, with blocks of INT4_BLOCK."""
        return stored_as(self.precision, self.name)

    @property
    def all_precisions(self) -> tuple[str, ...]:
        """The precisions of its weights, each once, from most to fewest bits."""
        return tuple(name for name in PRECISIONS if name in (self.precision, *self.block_precisions))

    def of_block(self, index: int) -> Target:
        """The same target at the precision of one block."""
        return replace(self, precision=self.block_precisions[index]) if self.block_precisions else self

    @property
    def on_tensorrt(self) -> bool:
        """Whether TensorRT runs the graph; ONNX Runtime does otherwise."""
        return self.platform.tensorrt is not None

    @property
    def has_fallback(self) -> bool:
        """Whether a bundle holds the primitive graph too, for a board whose TensorRT cannot compile the native one."""
        return self.on_tensorrt and self.lowering == "native" and "primitive" in self.platform.lowerings

    @property
    def compute_dtype(self) -> ir.DataType:
        """The type of matrices' activations and of a float cache."""
        return ir.DataType.FLOAT16 if self.storage.cache_bytes == 2 else ir.DataType.FLOAT

    @property
    def int8_cache(self) -> bool:
        """Whether keys and values are int8 codes."""
        return self.cache == "int8"

    @property
    def static_cache(self) -> bool:
        """Whether the graph fixes the cache's capacity; otherwise the runtime binds the capacity that it needs."""
        return self.on_tensorrt or self.lowering == "primitive"

    @property
    def opset(self) -> int:
        """The oldest opset that has every operator that the lowering writes."""
        if self.lowering == "native" or self.int8_cache:
            return 24  # the first with TensorScatter
        if self.lowering == "ort" or ("int4" in self.all_precisions and self.on_tensorrt):
            return 21  # the first with INT4, and with blocks in DequantizeLinear
        return 19  # the first with a float16 scale in DequantizeLinear


def _check_mixed(platform: Platform, precision: str, block_precisions: Sequence[str]) -> None:
    """Raise UnsupportedError where blocks cannot have these precisions beside one another."""
    for own in block_precisions:
        if own not in platform.precisions:
            raise UnsupportedError(
                f"{platform.name} ({platform.library}) has no blocks of {own}",
                f"choose some of: {', '.join(platform.precisions)}",
            )
        if platform.rules.half and (own == "fp32") != (precision == "fp32"):
            raise UnsupportedError(
                f"{platform.name} computes in float16 except at fp32, so blocks of {own} do not go with {precision}",
                "choose among fp16, int8 and int4, or fp32 for all",
            )


def _resolve_lowering(platform: Platform, precision: str, lowering: str) -> str:
    """The lowering asked for, or the platform's default. Raises UnsupportedError where it cannot run at `precision`."""
    runnable = platform.lowerings_at(precision)
    resolved = lowering or runnable[0]
    if resolved not in LOWERINGS:
        raise UnsupportedError(f"unknown lowering {resolved!r}", names.choose(resolved, LOWERINGS))
    if resolved not in runnable:
        reason = "TensorRT's fused attention has no fp32" if resolved in platform.lowerings else _why_not(resolved)
        raise UnsupportedError(
            f"{platform.name} ({platform.library}) cannot run the {resolved} lowering at {precision}: {reason}",
            f"choose --lowering {' or '.join(runnable)}",
        )
    return resolved


def require_parsed(model: ir.Model, target: Target) -> None:
    """Raise UnsupportedError for a graph with an operator or element type that the target's parser does not take.

    The message names each, and the release that takes it.
    """
    tensorrt = target.platform.tensorrt
    if tensorrt and (unsupported := find_unsupported(model, tensorrt)):
        raise UnsupportedError(
            f"{target.name} ({target.platform.library}) does not parse {', '.join(map(str, unsupported))}",
            "choose another --target (merino-edge targets lists them)",
        )


def _why_not(lowering: str) -> str:
    if lowering == "ort":
        return "it is made of ONNX Runtime's own operators (com.microsoft.GroupQueryAttention), which TensorRT lacks"
    return "RMSNormalization, RotaryEmbedding and TensorScatter came with TensorRT 10.15"
