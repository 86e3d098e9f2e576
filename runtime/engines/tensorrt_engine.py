"""The engine for TensorRT and TensorRT for RTX: one sequence on a GPU, its KV cache updated in place.

A TensorRT graph fixes the capacity of its cache, and the time of a step grows with it. A bundle of several contexts
has one plan for each. The plan of the smallest capacity that holds the sequence is open. When the sequence outgrows
it, a larger plan takes its cache over; only then are two plans in memory. The states of short convolutions are the
engine's, whatever plan is open. In a `primitive` plan a layer with a window keeps a ring of its cache
(merino_edge.runtime.engines.ring_caches). Not run on a GPU yet (merino_edge.runtime.engines.tensorrt_plan).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merino_edge import engine_store, tensorrt_library
from merino_edge.architecture import Architecture
from merino_edge.cache_rings import ring_positions
from merino_edge.errors import ArtefactError, InputError, MerinoError, UnsupportedError
from merino_edge.runtime.cuda.cuda import gpu_capability
from merino_edge.runtime.engine import Candidates
from merino_edge.runtime.engines.convolution_states import ConvolutionStates
from merino_edge.runtime.engines.ring_caches import RingCaches
from merino_edge.runtime.engines.tensorrt_plan import Plan
from merino_edge.store_limit import hold

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle
    from merino_edge.engine_store import BuiltEngine


PROMPT_GRID = 128  # tokens of a piece of a prompt: its tactics may round otherwise at another number


class TensorRtEngine:
    """Runs serialized TensorRT engines: a TopKEngine, CacheEngine and WindowedEngine of merino_edge.runtime.engine."""

    def __init__(
        self, library: str, plans: Mapping[int, bytes | Path], a: Architecture, *, cuda_graphs: bool = True
    ) -> None:
        """`library` is a module named in tensorrt_library.EXTRAS, of the version that built `plans` (by capacity).

        With `cuda_graphs` a step of one token is launched as one CUDA graph. Raises UnsupportedError (no GPU, too
        little memory), MissingExtraError, ArtefactError (a plan of another model).
        """
        self.vocab_size, self.max_positions = a.vocab_size, max(plans)
        self._library, self._plans, self._architecture = library, dict(sorted(plans.items())), a
        self._length, self._cuda_graphs = 0, cuda_graphs
        self._states, self._kept_start = ConvolutionStates(a), 0
        self._held = ExitStack()  # the files of the plans, which the store must not remove
        self._plan: Plan | None = self._open(min(plans))
        self.max_rows, self.prompt_grid = self._plan.max_rows, PROMPT_GRID
        windows = cache_windows(a, self.max_positions)
        wraps = self._plan.returns_new_kv  # TensorRT's own update of a cache does not
        rings = [n for n, w in windows.items() if wraps and ring_positions(w, self.max_positions) < self.max_positions]
        self._rings = RingCaches(windows, rings)
        self._logits: NDArray[np.float32] = np.zeros((self.max_rows, a.vocab_size), np.float32)

    @staticmethod
    def from_bundle(bundle: Bundle, *, cuda_graphs: bool = True) -> TensorRtEngine:
        """Open the engines of this GPU that are in a bundle or in the engine store.

        Raises UnsupportedError where another release of the library built them or they are for another GPU. Raises
        ArtefactError where they are damaged or of another graph, and the errors of the constructor.
        """
        built, again = engine_store.engines_of(bundle), f"build it again: merino-edge build {bundle.path}"
        newest = _newest_usable(built)
        library = str(newest.entry.get("library"))
        if library not in tensorrt_library.EXTRAS:
            raise ArtefactError(f"{bundle.path}: its engine is of the unknown library {library!r}", again)
        trt, _ = tensorrt_library.load(library)
        same = [b for b in built if (b.entry.get("library"), b.entry.get("version")) == (library, trt.__version__)]
        if not same:
            raise UnsupportedError(
                f"{newest.path} was built by TensorRT {newest.entry.get('version')}, not {trt.__version__}", again
            )
        plans: dict[str, dict[int, BuiltEngine]] = {}  # by the GPU's compute capability
        for engine in same:
            context = engine.entry.get("context")
            if context not in bundle.contexts:
                raise ArtefactError(f"{engine.path} has the unknown context {context!r}", again)
            if engine.entry.get("onnx_sha256") not in bundle.onnx_sha256s(context):
                raise ArtefactError(f"{engine.path} was built from another graph", again)
            plans.setdefault(str(engine.entry.get("capability")), {})[context] = engine
        capability = gpu_capability()
        if capability not in plans:
            raise UnsupportedError(f"{bundle.path} has engines for {', '.join(plans)}, this GPU is {capability}", again)
        paths = {}
        with ExitStack() as held:
            for context, engine in sorted(plans[capability].items()):  # the smallest goes first where the store is full
                if engine.is_stored:
                    with suppress(OSError):  # where it is missing, the check says so
                        held.enter_context(hold(engine.path))
                engine.check()
                paths[context] = engine.path
            opened = TensorRtEngine(library, paths, bundle.architecture, cuda_graphs=cuda_graphs)
            opened._held = held.pop_all()
        return opened

    @property
    def least_start(self) -> int:
        """The lowest position beside 0 and a kept one that a step may start at: rings hold the newest positions."""
        return max(self._states.least_start, self._rings.least_start)

    def holds(self, start: int) -> bool:
        """Whether a step may start there."""
        return start == 0 or start >= self.least_start or start == self._kept_start

    def keep_from(self, position: int) -> None:
        """Keep what a step at `position` needs, wherever later steps go."""
        if not self.holds(position):
            return
        self._kept_start = position
        self._states.keep_from(position)
        if position:
            self._rings.keep_from(position, self._reserve(0).read_rows)
        else:
            self._rings.forget()

    def forward(self, tokens: NDArray[np.int64], start: int) -> NDArray[np.float32]:
        """Run tokens [T] at positions start.. and return the last one's logits [V], valid until the next call.

        `start` may be any filled position (rewind), or the first one that is not. Raises InputError, ArtefactError.
        """
        return np.asarray(self.forward_rows(tokens, start, 1)[0])

    def forward_rows(self, tokens: NDArray[np.int64], start: int, rows: int) -> NDArray[np.float32]:
        """Like `forward`, but return the logits of the last `rows` positions, [rows, V].

        All of them must be in one chunk. An engine of an older bundle returns one row.
        """
        end = start + len(tokens)
        plan = self._plan_for(start, end)
        if not 1 <= rows <= min(self.max_rows, len(tokens)) or (rows > 1 and len(tokens) > plan.longest):
            raise InputError(
                f"cannot give {rows} rows of logits of {len(tokens)} tokens: this engine gives at most {self.max_rows}",
                "run the tokens one by one",
            )
        logits = self._logits[:rows]
        self._length = start  # a step that fails leaves nothing behind it
        for first in range(start, end, plan.longest):
            chunk = tokens[first - start : first - start + plan.longest]
            self._rings.ran(first, first + len(chunk), plan.lengths)
            plan.run(np.ascontiguousarray(chunk, np.int64), first, logits)
            self._length = first + len(chunk)
        return logits

    def forward_topk(self, tokens: NDArray[np.int64], start: int, k: int) -> Candidates:
        """Like `forward`, but for one token return only the `k` largest logits and their ties, where the GPU can."""
        if len(tokens) != 1:
            return Candidates(self.forward(tokens, start), None)
        plan = self._plan_for(start, start + 1)
        self._length = start
        self._rings.ran(start, start + 1, plan.lengths)
        candidates = plan.run_topk(tokens, start, k, self._logits[:1])
        self._length = start + 1
        return candidates or Candidates(self._logits[0], None)

    def mark_filled(self, positions: int) -> None:
        """Treat the first `positions` of the cache as filled, whatever they hold."""
        plan = self._reserve(min(positions, self.max_positions))
        self._length = positions
        self.keep_from(0)
        self._states.mark_filled(positions)
        self._rings.mark_filled(positions, plan.lengths)

    @property
    def cache_dtype(self) -> np.dtype[Any]:
        return self._reserve(0).cache_dtype

    def cache_shapes(self, positions: int) -> list[tuple[int, int, int]]:
        a = self._architecture
        attending = [block for block in a.layer_blocks() if not block.convolution]
        of_caches = [(block.kv_heads, positions, a.head_dim) for block in attending for _ in ("key", "value")]
        return [*of_caches, *self._states.shapes(positions)]

    def read_cache(self, positions: int) -> list[NDArray[Any]]:
        plan, arrays = self._reserve(positions), []
        for name, (heads, _, width) in zip(plan.lengths, self.cache_shapes(positions), strict=False):
            array, held = np.zeros((heads, positions, width), plan.cache_dtype), self._rings.held(name, positions)
            array[:, held] = plan.read_rows(name, held)
            arrays.append(array)
        return [*arrays, *self._states.read(positions)]

    def write_cache(self, arrays: Sequence[NDArray[Any]]) -> None:
        positions = arrays[0].shape[1]
        self.mark_filled(positions)
        self._rings.loaded(positions)
        plan = self._reserve(positions)
        for (name, length), array in zip(plan.lengths.items(), arrays, strict=False):
            newest = np.arange(max(0, positions - length), positions)
            plan.write_rows(name, newest, array[:, newest])
        self._states.write(arrays[len(plan.lengths) :], positions)

    def close(self) -> None:
        """Free the engine and the cache. May be called twice."""
        if self._plan is not None:
            self._plan.close()
        self._plan = None
        self._length = 0
        self._held.close()

    def _plan_for(self, start: int, end: int) -> Plan:
        """A plan that can run positions start..end-1 next. Raises InputError where there is none."""
        if not 0 <= start <= self._length or not start < end <= self.max_positions:
            raise InputError(
                f"cannot run {end - start} tokens at position {start} ({self._length} of {self.max_positions} written)",
                "start lower, or build with a larger --context",
            )
        if not self.holds(start):
            raise InputError(f"position {start} is behind what layers keep, from {self.least_start}", "start at 0")
        plan = self._reserve(end)
        if self._rings.bring_back(start, plan.write_rows):
            self._length = start
        if start < self._kept_start:
            self.keep_from(0)
        return plan

    def _reserve(self, positions: int) -> Plan:
        """Open a plan with a capacity of at least `positions`, and keep the filled part of the cache."""
        if self._plan is None:
            raise InputError("this engine is closed", "open the bundle again")
        if positions > self._plan.capacity:
            larger = self._open(next(capacity for capacity in self._plans if capacity >= positions))
            try:
                larger.take_cache(self._plan, self._length)
            except BaseException:
                larger.close()
                raise
            self._plan.close()
            self._plan = larger
        return self._plan

    def _open(self, capacity: int) -> Plan:
        plan: Any = self._plans[capacity]
        try:
            serialized = plan if isinstance(plan, bytes) else plan.read_bytes()
        except OSError as error:  # a build has replaced it since
            raise ArtefactError(f"{plan} cannot be read ({error.strerror})", "open the bundle again") from None
        return Plan(
            self._library, serialized, self._architecture, capacity, self._states, cuda_graphs=self._cuda_graphs
        )


def cache_windows(a: Architecture, capacity: int) -> dict[str, int]:
    """The windows that hide positions of a cache of `capacity`, by the names of the caches."""
    return {
        f"{kind}_{layer}": block.window
        for layer, block in enumerate(a.layer_blocks())
        if not block.convolution and 0 < block.window < capacity
        for kind in ("key", "value")
    }


def _newest_usable(built: Sequence[BuiltEngine]) -> BuiltEngine:
    """The newest engine of a library that is installed, for this GPU; the newest of all where there is none."""
    with suppress(MerinoError):  # without a GPU none is usable, which is said later
        capability = gpu_capability()
        for engine in reversed(built):
            library = str(engine.entry.get("library"))
            if engine.entry.get("capability") == capability and tensorrt_library.is_installed(library):
                return engine
    return built[-1]
