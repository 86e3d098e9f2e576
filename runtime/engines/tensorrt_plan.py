"""A plan: a serialized engine of TensorRT (10.3 or later) or TensorRT for RTX, opened on a GPU with its KV cache.

The graph is a `native` or a `primitive` one. A native plan updates the cache in place: `new_key_L` has the address of
`key_L`. A primitive plan returns the new keys and values, and the KV scatter kernel writes them into the cache; those
of a prompt are copied. Convolutions have their states on the host (merino_edge.runtime.engines.plan_states). One
optimization profile is for decode, one for chunks of a prompt. Where the CPU and the GPU share one memory, tokens,
states and logits are not copied. The second step of one token is recorded as a CUDA graph and then launched as one; if
recording is refused, steps run without it. TensorRT for RTX records by itself. A step that needs only the largest
logits is a second CUDA graph (merino_edge.runtime.engines.topk_kernel).

A step of several tokens may return several rows of logits. The head of a one-token step is compiled for one row, that
of token 0. So its context reads this index from memory that is never written.

Not run on a GPU yet. Tested without one: NVIDIA's compiler builds such plans, and its parser finds the inputs and
outputs that are bound here. Its Python bindings have all names that are called here.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import numpy as np
from numpy.typing import NDArray

from merino_edge import tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.graph_io import LOGIT_ROWS, NEW_KV_PREFIX
from merino_edge.runtime.cuda.cuda import Cuda
from merino_edge.runtime.engine import Candidates
from merino_edge.runtime.engines.convolution_states import ConvolutionStates
from merino_edge.runtime.engines.kv_scatter_kernel import KvScatterKernel
from merino_edge.runtime.engines.plan_states import PlanStates
from merino_edge.runtime.engines.plan_tensors import Tensor, bound_tensors, buffer_bytes, owner
from merino_edge.runtime.engines.rtx_runtime_cache import RtxRuntimeCache, process_cache
from merino_edge.runtime.engines.topk_kernel import TopKKernel
from merino_edge.runtime.memory import check_gpu_memory

P = ParamSpec("P")
R = TypeVar("R")


def on_the_gpu(method: Callable[Concatenate[Plan, P], R]) -> Callable[Concatenate[Plan, P], R]:
    """`method`, with the GPU's context current: each call may come from another thread.

    Where it fails, what it has queued is waited for. It must not run later, with the inputs of another step.
    """

    @wraps(method)
    def active(plan: Plan, /, *arguments: P.args, **options: P.kwargs) -> R:
        with plan._cuda.active():
            try:
                return method(plan, *arguments, **options)
            except BaseException:
                with suppress(UnsupportedError):
                    plan._cuda.synchronize()
                raise

    return active


class Plan:
    """Runs steps of one sequence of up to `capacity` positions."""

    def __init__(
        self,
        library: str,
        serialized: bytes,
        a: Architecture,
        capacity: int,
        states: ConvolutionStates,
        *,
        cuda_graphs: bool = True,
    ) -> None:
        """`library` is a module named in tensorrt_library.EXTRAS, of the version that built the plan.

        `states`: those of the sequence, which steps read and write.

        Raises UnsupportedError (no GPU, too little memory), MissingExtraError, ArtefactError (another model's plan).
        """
        self.capacity, self.max_rows = capacity, 1  # rows of logits
        self._trt, self._log = tensorrt_library.load(library)
        self._contexts: list[tuple[int, Any]] = []  # (most tokens, execution context), fewest first
        self._shapes: list[tuple[int, int]] = []  # (tokens, rows of logits) that each context is set to
        self._records = cuda_graphs  # whether steps of one token are recorded
        self._graphs: dict[bool, Any] = {}  # CUDA graphs by `with_topk`; None: recording was refused
        self._kv_scatter: KvScatterKernel | None = None  # for steps of one token of a primitive plan
        self._topk: TopKKernel | None = None
        self._rtx_cache: RtxRuntimeCache | None = None
        self._cuda = Cuda()
        try:
            with self._cuda.active():
                self._open(serialized, a, states)
        except BaseException:
            self.close()
            raise

    @property
    def longest(self) -> int:
        """The most tokens that one step may have."""
        return self._contexts[-1][0]

    def _open(self, serialized: bytes, a: Architecture, states: ConvolutionStates) -> None:
        trt = self._trt
        if self._cuda.unified:  # a GPU without memory of its own
            check_gpu_memory("opening the engine", len(serialized) + a.kv_bytes(self.capacity, rings=True))
        runtime = tensorrt_library.start(trt.Runtime, self._log)
        runtime.engine_host_code_allowed = False  # the code for the CPU that an engine may carry never runs
        engine = runtime.deserialize_cuda_engine(serialized)
        if engine is None:
            raise ArtefactError(
                f"TensorRT {trt.__version__} cannot load the engine: {self._log.reason()}", "build it again"
            )
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        actual = [
            Tensor(n, tuple(engine.get_tensor_shape(n)), np.dtype(trt.nptype(engine.get_tensor_dtype(n))).name)
            for n in names
        ]
        by_name = {tensor.name: tensor for tensor in actual}
        prefix = NEW_KV_PREFIX if any(name.startswith(NEW_KV_PREFIX) for name in names) else "new_"
        dtype = next((tensor.dtype for tensor in actual if tensor.name.startswith("key_")), "float16")
        tensors = bound_tensors(a, self.capacity, prefix, dtype, one_row=LOGIT_ROWS not in by_name)
        if prefix == NEW_KV_PREFIX and sorted(actual) != sorted(tensors):
            tensors = bound_tensors(a, self.capacity, prefix, dtype, one_row=LOGIT_ROWS not in by_name, rings=True)
        if sorted(actual) != sorted(tensors):
            raise ArtefactError("the engine was built from another model, or for another context", "build it again")
        profiles = range(engine.num_optimization_profiles)
        max_tokens = [engine.get_tensor_profile_shape("tokens", i)[2][1] for i in profiles]
        longest = max(max_tokens)
        sizes = {"tokens": longest, "positions": longest}
        if LOGIT_ROWS in by_name:
            self.max_rows = max(engine.get_tensor_profile_shape(LOGIT_ROWS, i)[2][0] for i in profiles)
            sizes[LOGIT_ROWS] = self.max_rows
        self._inputs = {name: self._cuda.pinned((size,), np.int64) for name, size in sizes.items()}
        self._logits = self._cuda.pinned((self.max_rows, a.vocab_size), np.float32)
        self._states = PlanStates(states, self._cuda, longest)
        self._copies = not self._cuda.unified
        shared = {} if self._copies else {**self._inputs, **self._states.arrays, "logits": self._logits}
        self._addresses = {name: self._cuda.address_of(array) for name, array in shared.items()}
        for name, size_bytes in buffer_bytes(tensors, longest, self.max_rows).items():
            if name not in shared:
                self._addresses[name] = self._cuda.allocate(size_bytes)
        self._records &= len(max_tokens) > 1
        for index in sorted(range(len(max_tokens)), key=max_tokens.__getitem__):
            context = self._new_context(engine, records=self._records and not self._contexts)
            if context is None:
                raise UnsupportedError(f"TensorRT gives no context: {self._log.reason()}", "build with less --context")
            self._contexts.append((max_tokens[index], context))
            self._shapes.append((0, 0))
            self._require("the profile's memory", done=context.set_optimization_profile_async(index, self._cuda.stream))
            addresses = {name: self._addresses[owner(name)] for name in names}
            if LOGIT_ROWS in by_name and len(self._contexts) < len(max_tokens):  # for steps of one token
                addresses[LOGIT_ROWS] = self._cuda.allocate(8)
            for name, address in addresses.items():
                self._require(f"the address of {name}", done=context.set_tensor_address(name, address))
        self.cache_dtype = np.dtype(dtype)
        self._row_bytes = a.head_dim * self.cache_dtype.itemsize  # of one position of one head
        self._heads = {t.name: t.shape[1] for t in tensors if t.name.startswith(("key_", "value_"))}
        self.lengths = {t.name: t.shape[2] for t in tensors if t.name in self._heads}  # rows of each cache, or ring
        self.returns_new_kv = prefix == NEW_KV_PREFIX
        if self.returns_new_kv:
            with suppress(UnsupportedError):  # no compiler: new keys and values are copied
                self._kv_scatter = self._new_kv_scatter()
        with suppress(UnsupportedError):  # no compiler: whole rows are copied
            self._topk = TopKKernel(self._cuda, self._addresses["logits"], a.vocab_size)
        self._cuda.synchronize()
        if self._rtx_cache is not None:
            self._rtx_cache.save()

    @on_the_gpu
    def run(self, tokens: NDArray[np.int64], start: int, logits: NDArray[np.float32]) -> None:
        """Run tokens [T], T at most `longest`, at positions start..; put the last rows into `logits` [N, V].

        N is at most `max_rows` and T.
        """
        self._run(tokens, start, len(logits), with_topk=False)
        logits[...] = self._logits[: len(logits)]

    @on_the_gpu
    def run_topk(self, tokens: NDArray[np.int64], start: int, k: int, logits: NDArray[np.float32]) -> Candidates | None:
        """Like `run` for one token, but return the `k` largest logits and their ties.

        Returns None where the whole row is needed; it is then in `logits` [1, V].
        """
        if self._topk is None or k > self._topk.max_k:
            self.run(tokens, start, logits)
            return None
        self._run(tokens, start, 1, with_topk=True)
        candidates = self._topk.candidates(k)
        if candidates is None:
            if self._copies:
                self._cuda.to_host(self._addresses["logits"], self._logits[:1])
                self._cuda.synchronize()
            logits[...] = self._logits[:1]
        return candidates

    def _run(self, tokens: NDArray[np.int64], start: int, rows: int, *, with_topk: bool) -> None:
        count = len(tokens)
        self._inputs["tokens"][:count] = tokens
        self._inputs["positions"][:count] = np.arange(start, start + count)
        if LOGIT_ROWS in self._inputs:
            self._inputs[LOGIT_ROWS][:rows] = np.arange(count - rows, count)
        self._states.prepare(start)
        graph = self._graphs.get(with_topk) if count == 1 else None
        if graph is not None:
            self._cuda.launch(graph)
        else:
            self._run_unrecorded(count, rows, with_topk=with_topk)
        if self.returns_new_kv and (count > 1 or self._kv_scatter is None):
            self._copy_new_kv(start, count)
        self._cuda.synchronize()
        self._states.keep(start, count)
        if self._rtx_cache is not None:
            self._rtx_cache.count_step()

    def _copy_new_kv(self, start: int, count: int) -> None:
        """Queue copies of the new keys and values of a step into the caches; of a ring, of the newest that it has."""
        row, pitch = self._row_bytes, count * self._row_bytes
        for name, heads in self._heads.items():
            cache, new_kv, length = self._addresses[name], self._addresses[f"{NEW_KV_PREFIX}{name}"], self.lengths[name]
            position, end = max(start, start + count - length), start + count
            while position < end:
                rows = min(end - position, length - position % length)  # up to the end of the ring
                source, target = new_kv + (position - start) * row, cache + position % length * row
                self._cuda.copy_rows(source, target, rows * row, heads, source_pitch=pitch, target_pitch=length * row)
                position += rows

    def _require(self, what: str, *, done: bool) -> None:
        """Raise UnsupportedError where TensorRT says no."""
        if not done:
            raise UnsupportedError(f"TensorRT refuses {what}: {self._log.reason()}", "build with less --context")

    def _run_unrecorded(self, count: int, rows: int, *, with_topk: bool) -> None:
        """Queue a step. A step of one token is recorded if its context has run such a step before."""
        index = 0 if count == 1 else -1  # a recorded context must keep its shape, so it runs no other steps
        context, last_shape = self._contexts[index][1], self._shapes[index]
        if last_shape != (count, rows):
            self._shapes[index] = (0, 0)
            for name in self._inputs:
                shape = (rows,) if name == LOGIT_ROWS else (1, count)
                self._require(f"{name} of the shape {shape}", done=context.set_input_shape(name, shape))
            self._shapes[index] = (count, rows)
        elif count == 1 and self._records and with_topk not in self._graphs:
            graph = self._cuda.recorded(lambda: self._queue(context, count, rows, with_topk=with_topk))
            self._graphs[with_topk] = graph
            if graph is not None:
                self._cuda.launch(graph)
                return
            self._log.forget()  # what TensorRT said to the recording is not the reason of a later failure
        self._queue(context, count, rows, with_topk=with_topk)

    def _queue(self, context: Any, count: int, rows: int, *, with_topk: bool) -> None:
        if self._copies:
            for name, values in self._inputs.items():
                if name != LOGIT_ROWS:
                    self._cuda.to_device(values[:count], self._addresses[name])
                elif context is self._contexts[-1][1]:
                    self._cuda.to_device(values[:rows], self._addresses[name])
            self._states.queue_inputs(self._addresses)
        if not context.execute_async_v3(self._cuda.stream):
            raise ArtefactError(f"TensorRT cannot run the engine: {self._log.reason()}", "build it again")
        if count == 1 and self._kv_scatter is not None:
            self._kv_scatter.queue()
        if self._copies:
            self._states.queue_outputs(self._addresses, count)
        if with_topk and self._topk is not None:
            self._topk.queue()
        elif self._copies:
            self._cuda.to_host(self._addresses["logits"], self._logits[:rows])

    def _new_kv_scatter(self) -> KvScatterKernel:
        addresses = self._addresses
        return KvScatterKernel(
            self._cuda,
            addresses["positions"],
            [addresses[f"{NEW_KV_PREFIX}{name}"] for name in self._heads],
            [addresses[name] for name in self._heads],
            heads=list(self._heads.values()),
            lengths=[self.lengths[name] for name in self._heads],
            row_bytes=self._row_bytes,
        )

    def _new_context(self, engine: Any, *, records: bool) -> Any:
        """A context with the memory of its own profile. The usual strategy takes that of the largest profile."""
        trt = self._trt
        memory = trt.ExecutionContextAllocationStrategy.ON_PROFILE_CHANGE
        if not hasattr(engine, "create_runtime_config"):
            return engine.create_execution_context(memory)
        runtime_config = engine.create_runtime_config()
        runtime_config.set_execution_context_allocation_strategy(memory)
        if hasattr(runtime_config, "cuda_graph_strategy"):  # TensorRT for RTX records by itself
            strategy = trt.CudaGraphStrategy
            runtime_config.cuda_graph_strategy = strategy.WHOLE_GRAPH_CAPTURE if records else strategy.DISABLED
            self._records = False
        if hasattr(runtime_config, "create_runtime_cache"):  # TensorRT for RTX compiles kernels here
            self._rtx_cache = process_cache(str(trt.__version__), self._cuda.capability)
            self._rtx_cache.attach(runtime_config, self._log)
        return engine.create_execution_context(runtime_config)

    @on_the_gpu
    def take_cache(self, other: Plan, positions: int) -> None:
        """Copy the first `positions` of each cache of `other`, a plan of the same model with a smaller capacity."""
        for name, heads in self._heads.items():
            source, target = other._addresses[name], self._addresses[name]
            pitches = [plan.lengths[name] * self._row_bytes for plan in (other, self)]
            # A ring that is full has as many rows in both. One that has not wrapped lies as a whole cache does.
            width = min(positions * self._row_bytes, *pitches)
            self._cuda.copy_rows(source, target, width, heads, source_pitch=pitches[0], target_pitch=pitches[1])
        self._cuda.synchronize()

    @on_the_gpu
    def read_rows(self, name: str, positions: NDArray[np.int64]) -> NDArray[Any]:
        """A copy of what the cache `name` holds of `positions` [N]: [Hkv, N, D]."""
        whole = np.empty(self._cache_shape(name), self.cache_dtype)
        self._cuda.to_host(self._addresses[name], whole)
        self._cuda.synchronize()
        return whole[:, positions % self.lengths[name]]

    @on_the_gpu
    def write_rows(self, name: str, positions: NDArray[np.int64], rows: NDArray[Any]) -> None:
        """Let the cache `name` hold `rows` [Hkv, N, D] at `positions` [N], and zeros elsewhere."""
        whole = np.zeros(self._cache_shape(name), self.cache_dtype)
        whole[:, positions % self.lengths[name]] = rows
        self._cuda.to_device(whole, self._addresses[name])
        self._cuda.synchronize()  # `whole` may be freed now

    def _cache_shape(self, name: str) -> tuple[int, int, int]:
        return self._heads[name], self.lengths[name], self._row_bytes // self.cache_dtype.itemsize

    def close(self) -> None:
        """Free the engine and the cache. May be called twice."""
        try:
            with suppress(UnsupportedError), self._cuda.active():
                if self._contexts and self._rtx_cache is not None:
                    self._rtx_cache.save()
                self._contexts = []  # while the GPU's context is current
        finally:
            self._contexts = []  # where it could not be made so
            self._cuda.close()
