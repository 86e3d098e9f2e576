"""A plan: an engine that TensorRT or TensorRT for RTX serialized, opened on a GPU, with the cache that it fixes.

It runs a `native` or a `primitive` graph compiled by merino_edge.export.tensorrt; the calls are those of 8.6 and later.
A native plan updates the cache in place: `new_key_L` is bound to the address of `key_L`. A primitive one puts out the
new rows, which are copied into it on the same stream. Two optimization profiles: one for decode, one for chunks of a
prompt. Tokens go up and logits come down with every step, and no CUDA graph is captured.

Nothing here was run on a GPU yet. What was tested without: NVIDIA's compiler builds such plans, its parser finds the
very inputs and outputs that are bound here, and its bindings have every name that is called.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from merino_edge import tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.runtime.cuda import Cuda
from merino_edge.runtime.engine import ROWS


class Tensor(NamedTuple):
    """One input or output of a plan; -1 in its shape stands for the number of tokens."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # as numpy spells it


def bound_tensors(a: Architecture, places: int, prefix: str = "new_", dtype: str = "float16") -> list[Tensor]:
    """Every input and output of the graph of `a`; `prefix` of the caches' outputs: new_ (native), row_ (primitive)."""
    caches = [
        Tensor(f"{output}{kind}_{layer}", (1, block.kv_heads, extent, a.head_dim), dtype)
        for layer, block in enumerate(a.layer_blocks())
        for kind in ("key", "value")
        for output, extent in (("", places), (prefix, -1 if prefix == ROWS else places))
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


class Plan:
    """Steps of one sequence of up to `places` positions."""

    def __init__(self, library: str, serialized: bytes, a: Architecture, places: int) -> None:
        """`library`: a module named in tensorrt_library.EXTRAS, of the version that built it.

        Raises UnsupportedError (no GPU, too little memory), MissingExtraError, ArtefactError (another model's).
        """
        self.places = places
        self._trt, self._log = tensorrt_library.load(library)
        self._contexts: list[tuple[int, Any]] = []  # (most tokens, execution context), shortest first
        self._cuda = Cuda()
        try:
            self._open(serialized, a)
        except BaseException:
            self.close()
            raise

    @property
    def longest(self) -> int:
        """Tokens that a step may have."""
        return self._contexts[-1][0]

    def _open(self, serialized: bytes, a: Architecture) -> None:
        trt = self._trt
        engine = trt.Runtime(self._log).deserialize_cuda_engine(serialized)
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
        tensors = bound_tensors(a, self.places, prefix, dtype)
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
        self._row_bytes = a.head_dim * np.dtype(dtype).itemsize  # of one position of one head
        self._heads = {t.name: t.shape[1] for t in tensors if t.name.startswith(("key_", "value_"))}
        self._puts_out_rows = prefix == ROWS
        self._cuda.synchronize()

    def run(self, tokens: NDArray[np.int64], start: int, logits: NDArray[np.float32]) -> None:
        """Tokens [T], up to `longest` of them, at positions start..; the last one's logits into `logits` [1, V]."""
        context = next(context for most, context in self._contexts if most >= len(tokens))
        positions = np.arange(start, start + len(tokens), dtype=np.int64)
        for name, values in (("tokens", tokens), ("positions", positions)):
            context.set_input_shape(name, (1, len(tokens)))
            self._cuda.to_device(values, self._addresses[name])
        if not context.execute_async_v3(self._cuda.stream):
            raise ArtefactError(f"TensorRT cannot run the engine: {self._log.first}", "build it again")
        if self._puts_out_rows:
            width, pitch = len(tokens) * self._row_bytes, self.places * self._row_bytes
            for name, heads in self._heads.items():
                cache = self._addresses[name] + start * self._row_bytes
                self._cuda.copy_rows(self._addresses[f"{ROWS}{name}"], width, cache, pitch, width, heads)
        self._cuda.to_host(self._addresses["logits"], logits)
        self._cuda.synchronize()

    def take_cache(self, other: Plan, positions: int) -> None:
        """Copy so many positions of every cache of `other`, a plan of the same model with fewer places."""
        width = positions * self._row_bytes
        there, here = other.places * self._row_bytes, self.places * self._row_bytes
        for name, heads in self._heads.items():
            self._cuda.copy_rows(other._addresses[name], there, self._addresses[name], here, width, heads)
        self._cuda.synchronize()

    def close(self) -> None:
        """Free the engine and the cache. May be called twice."""
        self._contexts = []
        self._cuda.close()
