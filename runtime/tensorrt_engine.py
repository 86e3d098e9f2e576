"""The engine for TensorRT and TensorRT for RTX: one sequence on a GPU, its key/value cache updated in place.

It runs a serialized engine (merino_edge.export.tensorrt) of a `native` or a `primitive` graph; the calls are those of
8.6 and later. The cache has the whole context's capacity. A native engine updates it in place: `new_key_L` is bound to
the address of `key_L`. A primitive one puts out the new rows, which are copied into it on the same stream. Two
optimization profiles: one for decode, one for chunks of a prompt. Tokens go up and logits come down with every step,
and no CUDA graph is captured.

Nothing here was run on a GPU yet. What was tested without: NVIDIA's compiler builds such engines, its parser finds the
very inputs and outputs that are bound here, and its bindings have every name that is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from merino_edge import tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, InputError, UnsupportedError
from merino_edge.runtime.cuda import Cuda
from merino_edge.runtime.engine import ROWS

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle


class Tensor(NamedTuple):
    """One input or output of an engine; -1 in its shape stands for the number of tokens."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as numpy spells it


def bound_tensors(a: Architecture, context: int, prefix: str = "new_", dtype: str = "float16") -> list[Tensor]:
    """Every input and output of the graph of `a`; `prefix` of the caches' outputs: new_ (native), row_ (primitive)."""
    caches = [
        Tensor(f"{output}{kind}_{layer}", (1, block.kv_heads, places, a.head_dim), dtype)
        for layer, block in enumerate(a.layer_blocks())
        for kind in ("key", "value")
        for output, places in (("", context), (prefix, -1 if prefix == ROWS else context))
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


class TensorRtEngine:
    """Runs a serialized engine. Implements merino_edge.runtime.engine.Engine."""

    def __init__(self, library: str, plan: bytes, a: Architecture, context: int) -> None:
        """`library`: a module named in tensorrt_library.EXTRAS, of the version that built `plan`.

        Raises UnsupportedError (no GPU, too little memory), MissingExtraError, ArtefactError (another model's plan).
        """
        self.vocab_size, self.max_positions = a.vocab_size, context
        self._trt, self._log = tensorrt_library.load(library)
        self._logits: NDArray[np.float32] = np.zeros((1, a.vocab_size), np.float32)
        self._length = 0
        self._heads: dict[str, int] = {}  # of a primitive engine's rows
        self._row_bytes = 0  # of one position of one head
        self._contexts: list[tuple[int, Any]] = []  # (most tokens, execution context), shortest first
        self._cuda = Cuda()
        try:
            self._open(plan, a)
        except BaseException:
            self.close()
            raise

    @staticmethod
    def from_bundle(bundle: Bundle) -> TensorRtEngine:
        """The engine that was built last. Raises UnsupportedError where another release built it, and as __init__."""
        entry, again = bundle.engines[-1], f"build it again: merino-edge build {bundle.path}"
        library = str(entry.get("library"))
        if library not in tensorrt_library.EXTRAS:
            raise ArtefactError(f"{bundle.path}: its engine is of the unknown library {library!r}", again)
        trt, _ = tensorrt_library.load(library)
        if trt.__version__ != entry.get("version"):
            raise UnsupportedError(
                f"{bundle.path / entry['file']} was built by TensorRT {entry.get('version')}, not {trt.__version__}",
                again,
            )
        if entry.get("onnx_sha256") != bundle.manifest["files"]["model.onnx"]["sha256"]:
            raise ArtefactError(f"{bundle.path / entry['file']} was built from another graph", again)
        plan = (bundle.path / entry["file"]).read_bytes()
        return TensorRtEngine(library, plan, bundle.architecture, bundle.context)

    def _open(self, plan: bytes, a: Architecture) -> None:
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
        by_name = {tensor.name: tensor for tensor in found}
        prefix = ROWS if f"{ROWS}key_0" in by_name else "new_"
        dtype = by_name["key_0"].dtype if "key_0" in by_name else "float16"
        tensors = bound_tensors(a, self.max_positions, prefix, dtype)
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
        if prefix == ROWS:
            self._row_bytes = a.head_dim * np.dtype(dtype).itemsize
            self._heads = {t.name: t.shape[1] for t in tensors if t.name.startswith(ROWS)}
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
        for name, heads in self._heads.items():
            cache = self._addresses[name.removeprefix(ROWS)] + start * self._row_bytes
            width, pitch = len(tokens) * self._row_bytes, self.max_positions * self._row_bytes
            self._cuda.copy_rows(self._addresses[name], width, cache, pitch, width, heads)
        self._cuda.to_host(self._addresses["logits"], self._logits)
        self._cuda.synchronize()
