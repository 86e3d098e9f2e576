"""How a bundle stores a model's numbers: the forms of weights and cache, for each target and precision.

The exporter asks this module how to store, and a search how many bytes that is (`merino_edge.counts`). So a count
cannot differ from what is written. docs/stored-bytes.md has the same as tables. Knows no graph and no library.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, NamedTuple

from merino_edge import names
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.graph_io import ONNX_CUDA_TARGET

PRECISIONS = ("fp32", "fp16", "int8", "int4")
Lowering = Literal["native", "primitive", "ort"]
Version = tuple[int, int]  # of TensorRT
INT4_BLOCK = 32  # weights per scale in the int4 form
SCALE_BYTES = 2  # scales are float16
NORM_BYTES = 4  # norms are float32 everywhere
TAP_BYTES = STATE_BYTES = 4  # and so are a short convolution's taps and state
HEAD_MULTIPLE, ROTARY_MULTIPLE = 8, 16  # channels of a head, and of what is rotated, that `ort`'s attention takes
WINDOW_SLACK = 128  # positions behind a layer's window whose cache stays, so that steps can go back
POSITION_INDEX_BYTES = 8  # graphs without `ort`'s attention number the cache's positions, int64


class Form(NamedTuple):
    """How a matrix is stored. `block`: how many inputs share a scale. 0: a whole row does. None: it has no scales.

    `odd`: how it is stored instead where INT4_BLOCK does not divide its inputs; None: in the same form.
    """

    bits: int
    block: int | None = None
    odd: Form | None = None

    def for_inputs(self, inputs: int) -> Form:
        """The form of a matrix with so many inputs."""
        return self.odd if self.odd is not None and inputs % INT4_BLOCK else self

    def bytes(self, rows: int, inputs: int) -> float:
        """Bytes of a matrix [rows, inputs] with its scales."""
        if (own := self.for_inputs(inputs)) is not self:
            return own.bytes(rows, inputs)
        scales = 0.0
        if self.block is not None:
            scales = rows * inputs / self.block if self.block else rows
        return rows * inputs * self.bits / 8 + scales * SCALE_BYTES


@dataclass(frozen=True)
class StorageRules:
    """What decides how a target stores numbers.

    `lowerings`: how it can write attention and cache, the default first. `tensorrt`: the release whose parser it has;
    None: ONNX Runtime runs the graph. `half`: activations and cache are float16, except at fp32. `half_biases`: so are
    the biases.
    """

    lowerings: tuple[Lowering, ...]
    tensorrt: Version | None
    precisions: tuple[str, ...] = PRECISIONS
    half: bool = True
    half_biases: bool = True
    keeps_windows: bool = False  # a layer with a window keeps only that of its cache; else it masks the rest

    def lowerings_at(self, precision: str) -> tuple[Lowering, ...]:
        """The lowerings that it can run at `precision`: TensorRT's fused attention has no fp32."""
        return tuple(low for low in self.lowerings if not (self.tensorrt and low == "native" and precision == "fp32"))

    def lowering_for(
        self, precision: str, head_dim: int, rotary_dim: int, *, rings_worth: bool = False
    ) -> Lowering | None:
        """The first lowering at `precision` whose kernels take such heads; None where there is none.

        `rings_worth`: windows leave so little of the cache (merino_edge.cache_rings) that TensorRT gets the first one
        that keeps rings.
        """
        fitting = [low for low in self.lowerings_at(precision) if not why_unfit(low, head_dim, rotary_dim)]
        if rings_worth and self.tensorrt and "primitive" in fitting:
            return "primitive"
        return fitting[0] if fitting else None


def why_unfit(lowering: str, head_dim: int, rotary_dim: int) -> str:
    """Why the kernels of `lowering` cannot compute such heads; "" where they can.

    The rules are those that GroupQueryAttention of ONNX Runtime 1.23 to 1.32 names where it refuses a step.
    """
    if lowering != "ort":
        return ""
    if rotary_dim % ROTARY_MULTIPLE:
        return f"ONNX Runtime's attention rotates multiples of {ROTARY_MULTIPLE} channels, not {rotary_dim}"
    multiple = ROTARY_MULTIPLE if rotary_dim else HEAD_MULTIPLE
    return (
        f"ONNX Runtime's attention takes heads of multiples of {multiple}, not {head_dim}"
        if head_dim % multiple
        else ""
    )


# By name of the target. export/targets.py tells what each is.
TARGET_RULES: dict[str, StorageRules] = {
    "onnxruntime": StorageRules(
        ("ort", "native", "primitive"), None, half=False, half_biases=False, keeps_windows=True
    ),
    ONNX_CUDA_TARGET: StorageRules(("ort",), None, ("fp16", "int8", "int4")),
    "jetpack-6.2": StorageRules(("primitive",), (10, 3)),
    "jetpack-7.1": StorageRules(("primitive",), (10, 13)),
    "jetpack-7.2": StorageRules(("native", "primitive"), (10, 16)),
    "tensorrt-11": StorageRules(("native", "primitive"), (11, 0)),
    "rtx": StorageRules(("native", "primitive"), (10, 16)),
}
# Where no target is named: weights as for `onnxruntime`, and a GPU's cache. Tables of rotary angles do not count.
UNNAMED = StorageRules((), None, half_biases=False)


@dataclass(frozen=True)
class Storage:
    """How one target stores a model at one precision; `target` None: no target is named."""

    target: str | None
    precision: str
    matrix: Form
    embedding: Form
    head: Form
    positions: Form
    bias_bytes: int
    cache_bytes: int  # of an element of the KV cache, and of one of the rotary angles
    splits_table: bool  # whether a tied table is stored twice, as an embedding and a head
    has_fallback: bool  # whether a bundle holds the primitive graph beside a native one

    @property
    def needs_blocks(self) -> bool:
        """Whether neighbouring inputs of a matrix share a scale, INT4_BLOCK of them or more."""
        return bool(self.matrix.block)

    def lowerings(self, head_dim: int, rotary_dim: int, *, rings_worth: bool = False) -> tuple[Lowering, ...]:
        """The lowerings of a bundle's graphs: the usual one, and the primitive one behind a native one for TensorRT."""
        usual = rules_of(self.target).lowering_for(self.precision, head_dim, rotary_dim, rings_worth=rings_worth)
        return (() if usual is None else (usual,)) + (("primitive",) if usual == "native" and self.has_fallback else ())

    def angle_bytes(self, head_dim: int, rotary_dim: int, lowerings: Sequence[Lowering]) -> int:
        """Bytes of cosines and sines that graphs of `lowerings` hold for each position, for a kind of rotary."""
        primitive = 2 * head_dim if rotary_dim else 0
        return sum(primitive if low == "primitive" else rotary_dim for low in lowerings) * self.cache_bytes


@cache
def stored_as(precision: str, target: str | None = None) -> Storage:
    """How `target` stores a model at `precision`.

    Raises InputError for a precision that there is not. Raises UnsupportedError for a target that there is not, and for
    a precision that it cannot run.
    """
    if precision not in PRECISIONS:
        raise InputError(f"there is no precision {precision!r}", names.choose(precision, PRECISIONS))
    rules = rules_of(target)
    if precision not in rules.precisions:
        raise UnsupportedError(f"{target} has no {precision}", f"choose one of: {', '.join(rules.precisions)}")
    floats = Form(32 if precision == "fp32" else 16)
    quantized = precision in ("int8", "int4")
    matrix = embedding = head = floats
    if quantized:
        bits = 8 if precision == "int8" else 4
        # TensorRT knows blocks for int4 only, and looks up floating point only.
        rows = Form(8, 0)  # ONNX Runtime's kernels take blocks of 16 and more, TensorRT a scale for a whole row
        odd = None if target is None else rows if rules.tensorrt else floats
        matrix = rows if bits == 8 and rules.tensorrt else Form(bits, INT4_BLOCK, odd)
        head = rows if rules.tensorrt else Form(8, 0, odd)  # at int4 too: it costs more accuracy than any ten layers
        embedding = floats if rules.tensorrt else head
    half = precision != "fp32"
    return Storage(
        target,
        precision,
        matrix=matrix,
        embedding=embedding,
        head=head,
        positions=floats,
        bias_bytes=2 if half and rules.half_biases else 4,
        cache_bytes=2 if half and rules.half else 4,
        splits_table=quantized and rules.tensorrt is not None,
        has_fallback=rules.tensorrt is not None and rules.lowerings_at(precision)[0] == "native",
    )


def rules_of(target: str | None) -> StorageRules:
    """The rules of a target by its name. Raises UnsupportedError where there is none."""
    if target is None:
        return UNNAMED
    if target not in TARGET_RULES:
        raise UnsupportedError(f"unknown target {target!r}", names.choose(target, TARGET_RULES))
    return TARGET_RULES[target]


def target_of_table(header: Mapping[str, Any]) -> str | None:
    """The target whose graphs a latency table timed, by its header; None where none or several would do.

    An estimated table names it. A measured one says what ran the graphs, and TensorRT's release.
    """
    if "target" in header:
        return str(header["target"])
    backend, libraries = header.get("backend"), header.get("libraries")
    named = {"onnxruntime-cpu": "onnxruntime", "onnxruntime-cuda": ONNX_CUDA_TARGET, "tensorrt-rtx": "rtx"}
    if backend != "tensorrt" or not isinstance(libraries, dict):
        return named.get(str(backend))
    for name, rules in TARGET_RULES.items():
        if (
            rules.tensorrt
            and name != "rtx"
            and str(libraries.get("tensorrt")).startswith("{}.{}.".format(*rules.tensorrt))
        ):
            return name
    return None
