"""The roofline: how long a model's step takes on a board, from the board's data and a few constants.

A step is a sequence of kernels. Each takes the longest of its bytes' and its arithmetic's time, and a launch:

    max(DRAM bytes / (0.91 * bandwidth), all bytes / (32 per SM and clock), FLOPs / (0.97 * peak), ...) + launch

A step also has the CPU's work. Data that the step touched before and that fits in L2 as a whole costs no DRAM bytes:
activations between kernels, and the weights of a layer that the layer before shares.

Clocks, SMs, bandwidth and L2 have sources (`boards`). Both efficiencies were measured on an Orin Nano in its 15W mode.
Everything in a `Runtime` and PATH_BYTES are fitted to published speeds of other runtimes (`published_speeds`). They are
carried over to this tool's own runtime and to other boards, unverified. `merino-edge estimate --check` prints the
errors. This module knows no governor, no throttling and no energy.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import NamedTuple

from merino_edge import names
from merino_edge.architecture import Architecture, Block
from merino_edge.counts import layer_matrix_parameters
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.jetson.estimate.boards import Board, PowerMode
from merino_edge.latency.measurement import Mode
from merino_edge.storage import SCALE_BYTES, Form, rules_of, stored_as

# The share of the theoretical peak that was measured: 62.3 of 68.3 GB/s read, 9.68 of 10.03 TFLOP/s (Orin Nano 8GB at
# 612 MHz, L4T r39.2.1; "Jetson Orin: roof-guided Vulkan quantized linear study", JETSON-WMMA-LESSONS.md).
DRAM_EFFICIENCY = 0.91
PEAK_EFFICIENCY = 0.97
# The most that an SM reads per clock, from DRAM or L2. Fitted: the rate at which llama.cpp reads 8-bit weights.
PATH_BYTES = 32
# Assumed where the power mode's CPU clock is unknown: the Orin Nano's in its 15W mode.
ASSUMED_CPU_MHZ = 1497.6


@dataclass(frozen=True)
class Storage:
    """How a model's numbers are stored, in bytes per element."""

    name: str
    matrix_bytes: float
    head_bytes: float
    cache_bytes: float = 2  # of keys and values
    activation_bytes: float = 2
    half: bool = True  # whether matrices are multiplied in FP16


ASSUMED_TARGET = "jetpack-6.2"  # whose storage is taken where no target is named; TensorRT's are alike


def tool_storage(precision: str, target: str | None = None) -> Storage:
    """This tool's storage at `precision`. int8 and int4 weights are multiplied in FP16; int4 has an int8 head.

    Raises InputError for an unknown precision, UnsupportedError for one that the target cannot run.
    """
    stored = stored_as(precision, target or ASSUMED_TARGET)
    element = stored.cache_bytes
    return Storage(precision, _element(stored.matrix), _element(stored.head), element, element, half=element == 2)


def _element(form: Form) -> float:
    """Bytes of an element. A scale for a whole row is not worth counting."""
    return form.bits / 8 + (SCALE_BYTES / form.block if form.block else 0.0)


# ggml's blocks: Q4_K 4.5, Q5_0 5.5, Q6_K 6.5625 and Q8_0 8.5 bits a weight. A Q4_K_M file stores half of the value and
# down matrices and the head at Q6_K; where rows are no multiple of 256 it falls back to Q5_0, and to Q8_0 for the head.
Q4_K_M = Storage("Q4_K_M", 4.8 / 8, 6.5625 / 8)
Q4_K_M_NARROW = Storage("Q4_K_M", 5.5 / 8, 8.5 / 8)
Q8_0 = Storage("Q8_0", 8.5 / 8, 8.5 / 8)
INT4_AWQ = Storage("INT4 AWQ", 0.5 + 2 / 128, 2)  # one FP16 scale per 128; head taken to stay FP16
MLC_INT4 = Storage("INT4", 0.5 + 2 / 32, 0.5 + 2 / 32)  # one FP16 scale per 32
BF16 = Storage("BF16", 2, 2)
NVFP4 = Storage("NVFP4", 0.5 + 1 / 16, 2)  # one FP8 scale per 16; head taken to stay FP16


@dataclass(frozen=True)
class Runtime:
    """A runtime's costs beyond bytes and peak FLOPs. `basis` says where the constants come from."""

    name: str
    basis: str
    launch_clocks: float  # of the GPU, per kernel
    host_clocks: float  # of the CPU, per step: sampling, streaming, starting the step
    attention_macs: float  # multiply-adds per SM and clock of decode's attention, one query against the cache
    prefill_efficiency: float  # share of the peak that many tokens' matrices and attention reach
    matrix_macs: Mapping[str, float] = field(
        default_factory=dict
    )  # of decode, by storage; without an entry only bytes count
    clock_factors: Mapping[str, float] = field(default_factory=dict)  # of the GPU's clock, by power mode
    unverified: bool = False  # no speed of this runtime is published

    def storage(self, precision: str, width: int, target: str | None = None) -> Storage:
        """The storage of a model of that width at one of the tool's precisions, for a target of export."""
        own = tool_storage(precision, target)
        if self.name in ("llama.cpp", "ollama"):
            return {"int4": Q4_K_M if width % 256 == 0 else Q4_K_M_NARROW, "int8": Q8_0}.get(precision, own)
        return INT4_AWQ if (self.name, precision) == ("edge-llm", "int4") else own


class Kernel(NamedTuple):
    """A kernel's work. `dram_bytes` come from memory, `l2_bytes` from L2."""

    kind: str  # "matrix", "attention" or "other"
    flops: float
    dram_bytes: float
    l2_bytes: float


# --- the work of a step ----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Step:
    """Makes the kernels of a step of `tokens` tokens, of which the last sees `length` positions."""

    a: Architecture
    tokens: int
    length: int
    storage: Storage
    l2_bytes: int

    def kernel(
        self, kind: str, flops: float, stored_bytes: float, activations: float, *, weights_in_l2: bool = False
    ) -> Kernel:
        """A kernel that reads `stored_bytes` and reads or writes `activations` elements."""
        moved = activations * self.storage.activation_bytes
        in_l2 = moved <= self.l2_bytes
        dram = (0 if in_l2 else moved) + (0 if weights_in_l2 else stored_bytes)
        return Kernel(kind, flops, dram, moved + stored_bytes - dram)

    def matrix(self, inputs: int, outputs: int, *, weights_in_l2: bool = False) -> Kernel:
        """A matrix multiplication."""
        stored = inputs * outputs * self.storage.matrix_bytes
        flops, activations = 2 * self.tokens * inputs * outputs, self.tokens * (inputs + outputs)
        return self.kernel("matrix", flops, stored, activations, weights_in_l2=weights_in_l2)

    def other(self, elements: int) -> Kernel:
        """A norm, rotation, activation or lookup, which reads and writes `elements` per token."""
        return self.kernel("other", self.tokens * elements, 0, 2 * self.tokens * elements)

    def layer(self, block: Block, *, weights_in_l2: bool) -> list[Kernel]:
        """The kernels of one layer. `weights_in_l2`: it shares the weights of the layer before it."""
        a, width, query_width = self.a, block.width, block.heads * self.a.head_dim
        kv_width = block.kv_heads * a.head_dim
        cache = 2 * kv_width * self.length * self.storage.cache_bytes
        flops = 4 * self.tokens * self.length * query_width  # of the full square: the mask is explicit
        up = block.ffn_width * (2 if a.gated else 1)
        mixer = [
            self.matrix(width, query_width + 2 * kv_width, weights_in_l2=weights_in_l2),
            self.other(query_width + 2 * kv_width),
            self.kernel("attention", flops, cache, 2 * self.tokens * query_width),
            self.matrix(query_width, width, weights_in_l2=weights_in_l2),
        ]
        if block.convolution:
            mixer = [
                self.matrix(width, 3 * width, weights_in_l2=weights_in_l2),
                self.other((3 + block.convolution) * width),
                self.matrix(width, width, weights_in_l2=weights_in_l2),
            ]
        elif a.qk_norm != "none":
            mixer.insert(1, self.other(query_width + kv_width))
        after = [self.other(width)] * (2 if a.norm_placement == "both" else 0)
        return [
            *after,
            self.other(width),
            *mixer,
            self.other(width),
            self.matrix(width, up, weights_in_l2=weights_in_l2),
            self.other(up),
            self.matrix(block.ffn_width, width, weights_in_l2=weights_in_l2),
        ]

    def block(self, block: Block) -> Iterator[tuple[int, Kernel]]:
        """(how often, kernel) of all layers of a block."""
        weights = layer_matrix_parameters(self.a, block) * self.storage.matrix_bytes
        repeats = block.layers - 1 if block.shared and weights <= self.l2_bytes else 0
        for count, in_l2 in ((block.layers - repeats, False), (repeats, True)):
            if count:
                yield from ((count, kernel) for kernel in self.layer(block, weights_in_l2=in_l2))

    def kernels(self) -> Iterator[tuple[int, Kernel]]:
        """(how often, kernel) of the whole step."""
        a, last = self.a, self.a.blocks[-1].width
        yield 1, self.other(a.embedding_width)
        widths = [a.embedding_width, *(block.width for block in a.blocks)]
        for before, after in pairwise(widths):
            if before != after:
                yield 1, self.matrix(before, after)
        for block in a.blocks:
            yield from self.block(block)
        last_token = _Step(a, 1, self.length, self.storage, self.l2_bytes)  # only the last position reaches the head
        yield 1, last_token.other(last)
        if last != a.embedding_width:
            yield 1, last_token.matrix(last, a.embedding_width)
        head = a.vocab_size * a.embedding_width
        yield 1, last_token.kernel("matrix", 2 * head, head * self.storage.head_bytes, a.vocab_size)


def kernels(a: Architecture, mode: Mode, length: int, storage: Storage, l2_bytes: int) -> list[tuple[int, Kernel]]:
    """(how often, kernel) of a step of `a`: the token at the last of `length` positions, or a prompt of `length`."""
    return list(_Step(a, 1 if mode == "decode" else length, length, storage, l2_bytes).kernels())


# --- its time --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Roofline:
    """A board in one power mode under a runtime: it predicts what a clock would measure.

    `target`: the target of export whose bundle it runs; None: any for TensorRT. Raises UnsupportedError for a target
    that the board cannot run, InputError where the runtime is another project's.
    """

    board: Board
    power_mode: PowerMode
    runtime: Runtime
    target: str | None = None

    def __post_init__(self) -> None:
        if self.target is None:
            return
        rules_of(self.target)
        if self.runtime.name != RUNTIMES[0].name:
            raise InputError(f"runtime {self.runtime.name} runs no bundle", "leave out --target or --runtime")
        if self.target not in self.board.targets:
            raise UnsupportedError(
                f"{self.board.name} cannot run a bundle for {self.target} on its GPU",
                f"choose one of: {', '.join(self.board.targets)}",
            )

    def model_ms(self, a: Architecture, mode: Mode, length: int, precision: str) -> float:
        """A step of a whole model at one of the tool's precisions, stored as the runtime stores it."""
        return self.step_ms(a, mode, length, self.runtime.storage(precision, a.blocks[-1].width, self.target))

    def step_ms(self, a: Architecture, mode: Mode, length: int, storage: Storage) -> float:
        """A step of a whole model with this storage."""
        launch_ms = self.runtime.launch_clocks / (1000 * self.gpu_mhz)
        host_ms = self.runtime.host_clocks / (1000 * (self.power_mode.cpu_mhz or ASSUMED_CPU_MHZ))
        work = kernels(a, mode, length, storage, self.board.l2_bytes or 0)
        return host_ms + sum(count * (self.kernel_ms(kernel, mode, storage) + launch_ms) for count, kernel in work)

    @property
    def unverified(self) -> tuple[str, ...]:
        """The constants behind its times that have no good source."""
        runtime = (f"constants of runtime {self.runtime.name}",) if self.runtime.unverified else ()
        carried = () if self.board.compute_capability == "8.7" else ("efficiencies (measured on Orin)",)
        return self.board.unverified_in(self.power_mode) + runtime + carried

    @property
    def gpu_mhz(self) -> float:
        """The GPU's clock in this power mode, with the runtime's factor."""
        return self.power_mode.gpu_mhz * self.runtime.clock_factors.get(self.power_mode.name, 1.0)

    def kernel_ms(self, kernel: Kernel, mode: Mode, storage: Storage) -> float:
        """The time of one kernel without its launch."""
        board, runtime = self.board, self.runtime
        sm_clocks_per_ms = self.power_mode.sm_count * self.gpu_mhz * 1000
        peak = board.fp16_flops_per_sm_clock if storage.half else board.fp32_flops_per_sm_clock
        dram_ms = kernel.dram_bytes / (DRAM_EFFICIENCY * board.bandwidth_gb_s(self.power_mode) * 1e6)
        path_clocks = (kernel.dram_bytes + kernel.l2_bytes) / PATH_BYTES
        if kernel.kind == "other":
            rate: float = board.fp32_flops_per_sm_clock
        elif mode == "prefill":
            rate = runtime.prefill_efficiency * peak
        elif kernel.kind == "attention":
            rate = min(PEAK_EFFICIENCY * peak, 2 * runtime.attention_macs)
        else:
            rate = min(PEAK_EFFICIENCY * peak, 2 * runtime.matrix_macs.get(storage.name, float("inf")))
        return max(dram_ms, max(path_clocks, kernel.flops / rate) / sm_clocks_per_ms)


# --- runtimes --------------------------------------------------------------------------------------

# Attention in decode is taken from llama.cpp: no other source has a long cache. Edge-LLM's prompts are too short.
_EDGE_LLM = Runtime(
    "edge-llm",
    "launch cost fitted to two decode speeds and prefill to one, of TensorRT Edge-LLM 0.9.0 on an Orin Nano; "
    "what the host does is in the launch cost; attention taken from llama.cpp",
    launch_clocks=10_000,
    host_clocks=0,
    attention_macs=3.6,
    prefill_efficiency=0.28,
)
RUNTIMES: tuple[Runtime, ...] = (
    replace(
        _EDGE_LLM,
        name="merino-edge",
        basis="assumed to be those of TensorRT Edge-LLM, which runs a TensorRT engine's step as one CUDA graph too; "
        "unverified: no speed of this tool's engines on a board is published",
        unverified=True,
    ),
    _EDGE_LLM,
    # Both SmolLM2 were slower in MAXN_SUPER than in 25W; the reason is unknown. Clocks were locked in every mode, and
    # no throttling was seen (at most 73 C). It is no property of the board: under Ollama there, each of these models
    # gained the 10% that the clock gives. So llama.cpp alone has a factor, fitted to SmolLM2-135M. Without the factor
    # Qwen2.5-0.5B, Qwen3-0.6B and Llama-3.2-1B, which gained 8 to 10%, would keep their errors of 25W.
    Runtime(
        "llama.cpp",
        "fitted to five decode speeds of llama.cpp b9292 on an Orin Nano (launch cost chosen: 0 to 4000 fit alike); "
        "the clock factor stands for both SmolLM2 being slower in MAXN_SUPER than in 25W, as no larger model was; "
        "prefill taken from edge-llm",
        launch_clocks=2_000,
        host_clocks=1.5e6,
        attention_macs=3.6,
        prefill_efficiency=0.28,
        matrix_macs={"Q4_K_M": 13.0},
        clock_factors={"MAXN_SUPER": 0.82},
    ),
    Runtime(
        "ollama",
        "fitted to five decode speeds of Ollama 0.24.0 on an Orin Nano (launch cost as llama.cpp's); "
        "prefill taken from edge-llm",
        launch_clocks=2_000,
        host_clocks=4.2e6,
        attention_macs=2.9,
        prefill_efficiency=0.28,
        matrix_macs={"Q4_K_M": 13.3},
    ),
)


def runtime(name: str) -> Runtime:
    """The runtime called `name`. Raises InputError where there is none."""
    for choice in RUNTIMES:
        if choice.name == name:
            return choice
    raise InputError(f"there is no runtime {name!r}", names.choose(name, [r.name for r in RUNTIMES]))
