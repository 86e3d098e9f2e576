"""The engine for ONNX Runtime: one sequence on the CPU or a CUDA GPU, its KV cache updated in place.

`new_key_L` is bound to the memory of `key_L`, so a step copies no cache. For a `primitive` graph the new keys and
values are copied into it (CPU only). Attention of an `ort` graph reads only the filled positions. Its cache has the
capacity of the whole context, and the system provides memory only for the part that was written. The other graphs
read the whole cache. They get the smallest bucket that holds the sequence: 256 positions, doubling up to the context.
When a sequence outgrows its bucket, the filled part is copied to the next one. Knows no tokenizer.

On the CPU, a layer with a window keeps memory for that window only, and for `SLACK` positions behind it. So does a
short convolution (merino_edge.runtime.engines.convolution_states).

On a GPU, nodes without a CUDA kernel run on the CPU, with copies both ways; `cpu_nodes` names them. Its attention has
kernels for float16 only, so it takes the graphs of the target `onnxruntime-cuda`. Not run on a GPU yet.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, InputError, UnsupportedError
from merino_edge.graph_io import LOGIT_ROWS, NEW_KV_PREFIX, NUM_LOGITS, ONNX_CUDA_TARGET
from merino_edge.runtime.engines import node_placement
from merino_edge.runtime.engines.batched_graph import LONGEST
from merino_edge.runtime.engines.cache_memory import CacheMemory
from merino_edge.runtime.engines.convolution_states import SLACK, ConvolutionStates
from merino_edge.runtime.engines.host_rings import HostRings
from merino_edge.runtime.engines.node_placement import CUDA_PROVIDER
from merino_edge.runtime.engines.onnx_session import FIRST_WITH_INT8_CACHE, installed_version, open_session, run_bound
from merino_edge.runtime.engines.released_windows import ReleasedWindows
from merino_edge.runtime.engines.step_buffers import StepBuffers
from merino_edge.runtime.memory import release_freed_memory

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle

Memory = Callable[[tuple[int, int, int, int], Any], CacheMemory]  # of a cache [1, Hkv, C, D] of a type

CACHE_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
FIRST_BUCKET = 256  # positions
PREFILL_CHUNK = 128  # tokens in one run; 256 need 6 MB more and as much time, 512 are 6 to 9 % slower (1 MB L2 a core)
MAX_ROWS = SLACK  # rows of logits in one step, where the graph returns several; memory is allocated on demand


def _check_caches(caches: Sequence[Any], a: Architecture) -> None:
    """Raise ArtefactError unless a graph's inputs for keys and values are those of the architecture."""
    expected = [(b.kv_heads, a.head_dim) for b in a.layer_blocks() if not b.convolution for _ in ("key", "value")]
    found = [(value.shape[1], value.shape[3]) if len(value.shape) == 4 else None for value in caches]
    if sorted(map(str, found)) != sorted(map(str, expected)) or any(value.type not in CACHE_TYPES for value in caches):
        raise ArtefactError("the graph's caches are not those of its architecture", "export the bundle again")


def bucket(positions: int, context: int) -> int:
    """Capacity of the bound cache, which each step reads, while `positions` of `context` are filled."""
    capacity = FIRST_BUCKET
    while capacity < positions:
        capacity *= 2
    return min(capacity, context)


class OnnxEngine:
    """Runs a graph of any lowering (merino_edge.export.graph). Implements merino_edge.runtime.engine.Engine."""

    def __init__(
        self,
        graph: Path | bytes,
        a: Architecture,
        context: int,
        threads: int | None = None,
        *,
        device: str = "cpu",
        spinning: bool = True,
        session: Any = None,
        memory: Memory = CacheMemory,
    ) -> None:
        """`graph` is the path of model.onnx or a serialized model. `device` is cpu or cuda.

        `context` is the largest capacity of the cache. `threads` None takes all cores. With `spinning` idle threads
        wait actively for some milliseconds. `session` is one of this graph that is open already, as another sequence
        has it, and `memory` gives each cache its memory. Raises ArtefactError (a graph that cannot be loaded) and
        UnsupportedError (ONNX Runtime is too old, or cannot use a GPU).
        """
        import onnxruntime as ort

        self.threads = threads or len(os.sched_getaffinity(0))
        fewest_heads = min(block.heads for block in a.blocks)
        self._session = session or open_session(graph, self.threads, fewest_heads, device=device, spinning=spinning)
        self._new_memory = memory
        self.device = device
        self.vocab_size = a.vocab_size
        self.max_positions = context
        self._ort = ort
        self._binding = self._session.io_binding()
        inputs = {value.name: value for value in self._session.get_inputs()}
        others = {NUM_LOGITS, LOGIT_ROWS} & set(inputs)
        self.states, self._kept_start = ConvolutionStates(a), 0
        if missing := [name for name in self.states.inputs if name not in inputs]:
            raise ArtefactError(f"the graph has no {missing[0]}, as its architecture says", "export the bundle again")
        apart = {"tokens", "positions", LONGEST, *others, *self.states.inputs}
        caches = [value for name, value in inputs.items() if name not in apart]
        _check_caches(caches, a)
        self.cache_names = [value.name for value in caches]
        self._shapes = [(1, value.shape[1], value.shape[3]) for value in caches]
        windows = [b.window for b in a.layer_blocks() if not b.convolution for _ in ("key", "value")]
        rows = {value.name: value.shape[2] for value in caches}
        self._rings = HostRings(rows, dict(zip(self.cache_names, windows, strict=True)), context)
        limited = {
            i: w for i, w in enumerate(windows) if 0 < w < context and self.cache_names[i] not in self._rings.lengths
        }
        limited = limited if device == "cpu" else {}
        self._windows = ReleasedWindows(limited)
        self._dtype = CACHE_TYPES[caches[0].type]
        # ONNX Runtime's attention over a float cache adds up in one order. Other graphs add a step's own keys apart.
        adds_in_order = NUM_LOGITS in inputs and self._dtype != np.int8 and device == "cpu"
        self.prompt_grid = 2 if adds_in_order else PREFILL_CHUNK
        # An older one would load it, but fail at the first step.
        if self._dtype == np.int8 and installed_version() < FIRST_WITH_INT8_CACHE:
            raise UnsupportedError(
                f"an int8 KV cache needs ONNX Runtime {'.'.join(map(str, FIRST_WITH_INT8_CACHE))},"
                f" {ort.__version__} is installed",
                "run: pip install -U onnxruntime, or export with --cache float",
            )
        # Either the graph fixes the capacity, or it is an `ort` graph on the CPU, whose speed does not depend on it.
        self._whole_context = isinstance(caches[0].shape[2], int) or (NUM_LOGITS in inputs and device == "cpu")
        self._new_kv_names = [
            value.name for value in self._session.get_outputs() if value.name.startswith(NEW_KV_PREFIX)
        ]
        if self._new_kv_names and device != "cpu":
            raise UnsupportedError("the primitive lowering runs on the CPU only", f"export for {ONNX_CUDA_TARGET}")
        if device != "cpu" and NUM_LOGITS in inputs and self._dtype != np.float16:
            raise UnsupportedError(
                f"ONNX Runtime's attention has float16 kernels only on a GPU, this graph has {self.cache_dtype.name}",
                f"export with --target {ONNX_CUDA_TARGET}, or use the CPU",
            )
        if device != "cpu" and CUDA_PROVIDER not in self._session.get_providers():  # ONNX Runtime only warns
            raise UnsupportedError(
                f"ONNX Runtime {ort.__version__} cannot load its CUDA provider",
                "install the driver, CUDA and cuDNN that it is built for, or use the CPU",
            )
        new_kv = zip(self._new_kv_names, [shape[1:] for shape in self._shapes], strict=bool(self._new_kv_names))
        self._step = StepBuffers(
            self._binding,
            inputs,
            vocab_size=a.vocab_size,
            states=self.states,
            new_kv=dict(new_kv),
            dtype=self._dtype,
            copies=device != "cpu",
        )
        self.max_rows = MAX_ROWS if self._step.gives_rows else 1
        self._caches: list[Any] = []  # OrtValue, on the device
        self._arrays: list[NDArray[Any]] = []  # the same memory as arrays, on the CPU
        self._memory: list[CacheMemory] = []  # and with pages that can be released
        self._capacity = 0
        self._length = self._written = 0  # filled positions, and positions of the bound cache that were ever written
        self._reserve(1)
        release_freed_memory()  # freed while the model was loaded

    @staticmethod
    def from_bundle(
        bundle: Bundle, threads: int | None = None, *, device: str = "cpu", spinning: bool = True
    ) -> OnnxEngine:
        """Open a bundle's graph. Raises what the constructor raises."""
        return OnnxEngine(bundle.graph, bundle.architecture, bundle.context, threads, device=device, spinning=spinning)

    @property
    def capacity(self) -> int:
        """Positions for which the bound cache has room now."""
        return self._capacity

    @property
    def least_start(self) -> int:
        """The lowest position beside 0 and a kept one that a step may start at: windows have given back the rest."""
        return max(self._windows.least_start, self.states.least_start, self._rings.least_start)

    def holds(self, start: int) -> bool:
        """Whether a step may start there."""
        kept = start == self._kept_start and start >= self._windows.least_start
        return start == 0 or start >= self.least_start or kept

    @property
    def holds_all(self) -> bool:
        """Whether no layer leaves positions behind."""
        return not self.states.inputs and not self._windows.any and not self._rings.lengths

    def keep_from(self, position: int) -> None:
        """Keep what a step at `position` needs, while not too many positions follow: those of an answer."""
        if not self.holds(position):
            return
        self._windows.kept_start = self._kept_start = position
        self.states.keep_from(position)
        self._rings.keep_from(position, self._rings.read_rows)

    @property
    def cpu_nodes(self) -> Counter[str]:
        """With `device` cuda: the operators that still run on the CPU, with the number of their nodes.

        Raises UnsupportedError where ONNX Runtime is too old to tell.
        """
        return Counter() if self.device == "cpu" else node_placement.cpu_nodes(self._session)

    @property
    def placement_warning(self) -> str:
        """A line about the nodes that run on the CPU though `device` is cuda; "" where there are none."""
        return "" if self.device == "cpu" else node_placement.warning(self._session)

    def forward(self, tokens: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Run tokens [T] at positions start.. and return the last one's logits [V], valid until the next call.

        `start` may be any filled position (rewind), or the first one that is not. Raises InputError.
        """
        return np.asarray(self.forward_rows(tokens, start, 1)[0])

    def forward_rows(self, tokens: NDArray[np.int64], start: int, rows: int) -> NDArray[np.float32]:
        """Like `forward`, but return the logits of the last `rows` positions, [rows, V]."""
        end = start + len(tokens)
        if not 1 <= rows <= min(self.max_rows, len(tokens)) or (rows > 1 and len(tokens) > PREFILL_CHUNK):
            raise InputError(f"cannot give {rows} rows of logits of {len(tokens)} tokens", "ask for one")
        self.begin_step(start, end)
        self._step.want(rows)
        for first in range(start, end, PREFILL_CHUNK):
            last = min(first + PREFILL_CHUNK, end)
            self._rings.ran(first, last, self._rings.lengths)
            self._run(np.asarray(tokens[first - start : last - start], np.int64), first)
            self.end_step(last)
        return self._step.logits

    def begin_step(self, start: int, end: int) -> None:
        """Make room for a step at positions start..end-1. Raises InputError where it cannot run next."""
        if start == end or not 0 <= start <= self._length:
            raise InputError(f"cannot run {end - start} tokens at position {start} of {self._length}", "start lower")
        if not self.holds(start):
            raise InputError(f"position {start} is behind what layers keep, from {self.least_start}", "start at 0")
        if end > self.max_positions:
            raise InputError(
                f"position {end} is beyond the bundle's context of {self.max_positions}",
                "export with a larger --context",
            )
        if not self._caches:
            raise InputError("this engine is closed", "open the bundle again")
        if end > self.capacity:
            self._reserve(end)
        if start == 0:
            self._windows.start_again()
        self._rings.bring_back(start, self._rings.write_rows)
        if start < self._kept_start:
            self.keep_from(0)
        self._length = start  # a step that fails leaves nothing behind it

    def end_step(self, end: int) -> None:
        """A step up to position `end` has run."""
        self._length = end
        self._written = max(self._written, end)
        self._windows.release(self._memory, end)

    def mark_filled(self, positions: int) -> None:
        """Treat the first `positions` of the cache as filled, whatever they hold."""
        if positions > self.capacity:
            self._reserve(positions)
        if positions > self._written:  # all unwritten pages are one physical page, which is read from the L1 cache
            for cache in self._arrays:
                cache[:, :, self._written : positions] = 0
            self._written = positions
        self._length = positions
        self._windows.start_again()
        self.keep_from(0)
        self.states.mark_filled(positions)
        self._rings.mark_filled(positions, self._rings.lengths)

    @property
    def cache_dtype(self) -> np.dtype[Any]:
        return np.dtype(self._dtype)

    def cache_shapes(self, positions: int) -> list[tuple[int, int, int]]:
        of_caches = [(heads, positions, head_dim) for _, heads, head_dim in self._shapes]
        return [*of_caches, *self.states.shapes(positions)]

    def cache_forms(self, positions: int) -> list[tuple[tuple[int, int, int], np.dtype[Any]]]:
        """Shape and type of each array of `read_cache`."""
        states = len(self.states.inputs)
        shapes = self.cache_shapes(positions)
        types = [self.cache_dtype] * (len(shapes) - states) + [np.dtype(np.float32)] * states
        return list(zip(shapes, types, strict=True))

    def read_cache(self, positions: int) -> list[NDArray[Any]]:
        on_host = self._arrays if self.device == "cpu" else (value.numpy() for value in self._caches)
        arrays = [cache[0, :, :positions].copy() for cache in on_host]
        for name in self._rings.lengths:
            arrays[self.cache_names.index(name)] = self._rings.read_whole(name, positions)
        return [*arrays, *self.states.read(positions)]

    def write_cache(self, arrays: Sequence[NDArray[Any]]) -> None:
        positions = arrays[0].shape[1]
        self.mark_filled(positions)
        self._windows.loaded(positions)
        self._rings.loaded(positions)
        self.states.write(arrays[len(self._arrays) :], positions)
        for name, value, cache, array in zip(self.cache_names, self._caches, self._arrays, arrays, strict=False):
            if name in self._rings.lengths:
                self._rings.write_newest(name, array, positions)
                continue
            cache[0, :, :positions] = array
            if self.device != "cpu":
                value.update_inplace(cache)

    def close(self) -> None:
        """Free the session and the cache. May be called twice."""
        self._caches, self._arrays, self._memory, self._rings.arrays = [], [], [], {}
        self._step.close()
        self._length = 0
        self._binding = self._session = None

    def _run(self, tokens: NDArray[np.int64], start: int) -> None:
        self._step.prepare(tokens, start)
        run_bound(self._session, self._binding, wait=self.device == "cuda")

        end = start + len(tokens)
        new_kv = self._step.new_kv  # none: caches were updated in place
        for name, cache, new in zip(self.cache_names, self._arrays, new_kv, strict=False):
            if name in self._rings.lengths:
                self._rings.write_newest(name, new[0], end)
            else:
                cache[:, :, start:end] = new
        self.states.keep(self._step.gated, start)

    def _reserve(self, positions: int) -> None:
        """Bind a cache of the smallest bucket that holds `positions`, and keep the filled part."""
        capacity = self.max_positions if self._whole_context else bucket(positions, self.max_positions)
        made: list[CacheMemory] = []  # where memory is short, the old ones stay
        for index, (batch, heads, head_dim) in enumerate(self._shapes):
            try:
                rows = self._rings.lengths.get(self.cache_names[index], capacity)
                memory = self._new_memory((batch, heads, rows, head_dim), self._dtype)  # [1, Hkv, C, D]
            except MemoryError:
                what = f"there is no memory for a cache of {capacity} positions"
                raise UnsupportedError(what, "export again with a smaller --context") from None
            kept = self._windows.of(index)
            if self._caches:
                memory.array[:, :, kept : self._length] = self._caches[index].numpy()[:, :, kept : self._length]
            made.append(memory)
        self._bind_caches(made)
        self._written, self._capacity = self._length, capacity

    def _bind_caches(self, memory: Sequence[CacheMemory]) -> None:
        """Make `memory` the caches, one for each name."""
        # On the CPU a value shares the memory of its array.
        values = [self._ort.OrtValue.ortvalue_from_numpy(part.array, self.device, 0) for part in memory]
        self._memory, self._caches, self._arrays = list(memory), values, [part.array for part in memory]
        of_names = dict(zip(self.cache_names, self._arrays, strict=True))
        self._rings.arrays = {name: of_names[name] for name in self._rings.lengths}
        for name, value in zip(self.cache_names, values, strict=True):
            self._binding.bind_ortvalue_input(name, value)
            if not self._new_kv_names:
                self._binding.bind_ortvalue_output(f"new_{name}", value)

    def exchange_memory(self, other: OnnxEngine) -> None:
        """Exchange the memory of all caches, but not what is in them. Both must be open and have the same capacity."""
        both = (self, other)
        for index in range(len(self.cache_names)):
            kept = [slice(engine._windows.of(index), engine._length) for engine in both]
            mine, theirs = (e._arrays[index][:, :, held].copy() for e, held in zip(both, kept, strict=True))
            other._arrays[index][:, :, kept[0]], self._arrays[index][:, :, kept[1]] = mine, theirs
        memories = [engine._memory for engine in both]
        for engine, memory in zip(both, memories[::-1], strict=True):
            engine._bind_caches(memory)

    def take_prefix(self, other: OnnxEngine, positions: int) -> bool:
        """Fill the first `positions` from another sequence that holds them. False where its layers may have left some.

        Both must have the same capacity.
        """
        if not self.holds_all or not self._whole_context or not 0 < positions <= other._length:
            return False
        self.mark_filled(0)
        for mine, theirs in zip(self._arrays, other._arrays, strict=True):
            mine[:, :, :positions] = theirs[:, :, :positions]
        self._length, self._written = positions, max(self._written, positions)
        return True
