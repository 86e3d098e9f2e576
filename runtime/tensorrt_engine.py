"""The engine for TensorRT and TensorRT for RTX: one sequence on a GPU, its key/value cache updated in place.

It runs a serialized engine made from a graph exported for `rtx`, which TensorRT parses from 10.15 on; the calls are
those of 10.3 and later. The cache has the whole context's capacity, and `new_key_L` is bound to the address of `key_L`.
Two optimization profiles: one for decode, one for chunks of a prompt. Tokens go up and logits come down with every
step, and no CUDA graph is captured.

Nothing here was run on a GPU yet. What was tested without: NVIDIA's compiler builds such engines, its parser finds the
very inputs and outputs that are bound here, and its bindings have every name that is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from importlib import import_module
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, InputError, UnsupportedError, require
from merino_edge.runtime.cuda import Cuda

PREFILL_CHUNK = 512  # tokens run at once
EXTRAS = {"tensorrt": "tensorrt", "tensorrt_rtx_bindings": "rtx"}  # of the library's module


class Tensor(NamedTuple):
    """One input or output of an engine; -1 in its shape stands for the number of tokens."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as numpy spells it


def bound_tensors(a: Architecture, context: int) -> list[Tensor]:
    """Every input and output of the `rtx` graph of `a`."""
    caches = [
        Tensor(f"{new}{kind}_{layer}", (1, block.kv_heads, context, a.head_dim), "float16")
        for layer, block in enumerate(a.layer_blocks())
        for kind in ("key", "value")
        for new in ("", "new_")
    ]
    ends = [Tensor("tokens", (1, -1), "int64"), Tensor("positions", (1, -1), "int64")]
    return [*ends, *caches, Tensor("logits", (1, a.vocab_size), "float32")]


def owner(name: str) -> str:
    """The tensor whose memory `name` uses: an updated cache lies where the cache lies."""
    return name.removeprefix("new_")


def buffer_bytes(tensors: Iterable[Tensor], longest: int) -> dict[str, int]:
    """The size of every buffer, by its owner, for steps of up to `longest` tokens."""
    return {
        owner(t.name): math.prod(longest if extent == -1 else extent for extent in t.shape) * np.dtype(t.dtype).itemsize
        for t in tensors
    }


def build_engine(library: str, graph: bytes, context: int, capability: str = "") -> bytes:
    """Compile a serialized model for the GPU at hand; TensorRT for RTX also for another `capability`, such as SM86.

    Raises MissingExtraError, and UnsupportedError with the parser's or the compiler's first message.
    """
    trt, log = _load(library)
    builder = trt.Builder(log)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph):
        raise UnsupportedError(
            f"TensorRT {trt.__version__} cannot parse the graph: {parser.get_error(0).desc()}",
            "TensorRT 10.15 (JetPack 7.2) or newer parses it",
        )
    config = builder.create_builder_config()
    if capability:
        config.num_compute_capabilities = 1
        config.set_compute_capability(getattr(trt.ComputeCapability, capability), 0)
    longest = min(context, PREFILL_CHUNK)
    for optimum, most in ((1, min(2, longest)), (longest, longest)):  # 1..1 finds no fused kernel for attention
        profile = builder.create_optimization_profile()
        for name in ("tokens", "positions"):
            profile.set_shape(name, (1, 1), (1, optimum), (1, most))
        config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise UnsupportedError(
            f"TensorRT {trt.__version__} cannot compile the graph: {log.first}", "choose another --precision"
        )
    return bytes(plan)


class TensorRtEngine:
    """Runs a serialized engine. Implements merino_edge.runtime.engine.Engine."""

    def __init__(self, library: str, plan: bytes, a: Architecture, context: int) -> None:
        """`library`: a module named in EXTRAS, of the version that built `plan`.

        Raises UnsupportedError (no GPU, too little memory), MissingExtraError, ArtefactError (another model's plan).
        """
        self.vocab_size, self.max_positions = a.vocab_size, context
        self._trt, self._log = _load(library)
        self._logits: NDArray[np.float32] = np.zeros((1, a.vocab_size), np.float32)
        self._length = 0
        self._contexts: list[tuple[int, Any]] = []  # (most tokens, execution context), shortest first
        self._cuda = Cuda()
        try:
            self._open(plan, bound_tensors(a, context))
        except BaseException:
            self.close()
            raise

    def _open(self, plan: bytes, tensors: list[Tensor]) -> None:
        trt = self._trt
        engine = trt.Runtime(self._log).deserialize_cuda_engine(plan)
        if engine is None:
            raise ArtefactError(
                f"TensorRT {trt.__version__} cannot load the engine: {self._log.first}", "build it again"
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        found = [
            Tensor(n, tuple(engine.get_tensor_shape(n)), np.dtype(trt.nptype(engine.get_tensor_dtype(n))).name)
            for n in names
        ]
        if sorted(found) != sorted(tensors):
            raise ArtefactError("the engine was built from another model, or for another context", "build it again")
        most = [engine.get_tensor_profile_shape("tokens", i)[2][1] for i in range(engine.num_optimization_profiles)]
        buffers = buffer_bytes(tensors, max(most)).items()
        self._addresses = {name: self._cuda.allocate(size_bytes) for name, size_bytes in buffers}
        for index in sorted(range(len(most)), key=most.__getitem__):
            context = engine.create_execution_context()
            if context is None:
                raise UnsupportedError(f"TensorRT gives no context: {self._log.first}", "build with less --context")
            self._contexts.append((most[index], context))
            context.set_optimization_profile_async(index, self._cuda.stream)
            for name in names:
                context.set_tensor_address(name, self._addresses[owner(name)])
        self._cuda.synchronize()

    def forward(self, tokens: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Run tokens [T] at positions start.., return the last one's logits [V], valid until the next call.

        `start` may go back (rewind) but not past what was written. Raises InputError, ArtefactError.
        """
        end = start + len(tokens)
        if len(tokens) == 0 or not 0 <= start <= self._length or end > self.max_positions:
            raise InputError(
                f"cannot run {len(tokens)} tokens at position {start} ({self._length} of {self.max_positions} written)",
                "start lower, or build with a larger --context",
            )
        if not self._contexts:
            raise InputError("this engine is closed", "open the bundle again")
        chunk = self._contexts[-1][0]
        for first in range(start, end, chunk):
            self._run(np.ascontiguousarray(tokens[first - start : first - start + chunk], np.int64), first)
            self._length = min(first + chunk, end)
        return np.asarray(self._logits[0])

    def assume(self, positions: int) -> None:
        """Take so many positions for written, whatever they hold: to time a step at any length without the prompt."""
        self._length = positions

    def close(self) -> None:
        """Free the engine and the cache. May be called twice."""
        self._contexts = []
        self._length = 0
        self._cuda.close()

    def _run(self, tokens: NDArray[np.int64], start: int) -> None:
        context = next(context for most, context in self._contexts if most >= len(tokens))
        positions = np.arange(start, start + len(tokens), dtype=np.int64)
        for name, values in (("tokens", tokens), ("positions", positions)):
            context.set_input_shape(name, (1, len(tokens)))
            self._cuda.to_device(values, self._addresses[name])
        if not context.execute_async_v3(self._cuda.stream):
            raise ArtefactError(f"TensorRT cannot run the engine: {self._log.first}", "build it again")
        self._cuda.to_host(self._addresses["logits"], self._logits)
        self._cuda.synchronize()


def _load(library: str) -> tuple[Any, Any]:
    """The library's module, and a logger that keeps errors (`first`) instead of printing them."""
    require(library, EXTRAS[library])
    trt = import_module(library)

    class Log(trt.ILogger):  # type: ignore[misc,name-defined]
        first = "no reason given"

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.Severity.ERROR and self.first == Log.first:
                self.first = message.splitlines()[0]

    return trt, Log()
