"""Several sequences of one model on ONNX Runtime: one set of weights, and a cache for each. They decode together.

A joint step runs one token of each sequence as a row of one batch, so that the weights are read once. The graph is
changed for that when it is loaded (merino_edge.runtime.engines.batched_graph). The rows of a batch must be neighbours
in memory. Where they are not, sequences change places, which copies their filled positions once.

An answer must not depend on who else is served. Whether a row of a batch has the bits of a step by itself depends on
the form of the weights and on the processor. So it is tried when the model is opened, at several lengths. Where a bit
differs, every step runs by itself. Measured (docs/lab-notes.md): int8 and int4 in blocks of 32 have the same bits.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, InputError
from merino_edge.graph_io import NUM_LOGITS
from merino_edge.runtime.engine import Engine, Logits, Row
from merino_edge.runtime.engines.batched_graph import LONGEST, batched
from merino_edge.runtime.engines.cache_memory import CacheMemory
from merino_edge.runtime.engines.onnx_engine import Memory, OnnxEngine
from merino_edge.runtime.engines.onnx_session import open_session, run_bound

if TYPE_CHECKING:
    from merino_edge.bundle import Bundle

TRIED_LENGTHS = (1, 6, 33, 100, 257, 700)  # positions before a step whose bits are compared


class OnnxSequences:
    """`count` sequences of a graph on the CPU. Implements merino_edge.runtime.engine.SequenceGroup."""

    def __init__(
        self,
        graph: Path | bytes,
        a: Architecture,
        context: int,
        threads: int | None = None,
        *,
        count: int,
        spinning: bool = True,
    ) -> None:
        """The arguments and errors are those of OnnxEngine."""
        threads = threads or len(os.sched_getaffinity(0))
        model = batched(graph if isinstance(graph, bytes) else graph.read_bytes())
        weights = None if isinstance(graph, bytes) or model is None else graph.parent
        heads = min(block.heads for block in a.blocks)
        settings: dict[str, Any] = {"device": "cpu", "spinning": spinning, "weights": weights}
        self._session = open_session(graph if model is None else model, threads, heads, **settings)
        self._vocab_size, self._count, self._takes_rows = a.vocab_size, count, model is not None
        self._caches = 2 * sum(not block.convolution for block in a.layer_blocks())
        self._arguments = (graph, a, context, threads)
        self._open_members()
        # Graphs of older bundles return one row.
        self.joins_steps = self._takes_rows and self._engines[0].max_rows > 1 and self._rows_alike()
        if self._takes_rows:
            self._open_members()  # with new memory: pages that were given back and come again made steps 2 % slower

    def _open_members(self) -> None:
        """Open all engines over the session, with empty caches."""
        self._memory: list[CacheMemory] = []  # [B, Hkv, C, D] of each cache, where the graph takes a batch
        self._steps: dict[tuple[int, int], _JointStep] = {}  # by the first place and the number of rows
        graph, a, context, threads = self._arguments
        self._engines = [
            OnnxEngine(graph, a, context, threads, session=self._session, memory=self._memory_of(index))
            for index in range(self._count)
        ]
        self.members: Sequence[Engine] = self._engines
        self._placed = list(self._engines)  # by their places in memory

    def _memory_of(self, index: int) -> Memory:
        """What gives the caches of one sequence their memory: a part of the common one, where rows are joined."""
        caches = iter(range(self._caches))

        def memory(shape: tuple[int, int, int, int], dtype: Any) -> CacheMemory:
            cache = next(caches)
            if cache == len(self._memory):
                self._memory.append(CacheMemory((self._count, *shape[1:]), dtype))
            return self._memory[cache].of_sequence(index)

        return memory if self._takes_rows else CacheMemory

    @staticmethod
    def from_bundle(bundle: Bundle, threads: int | None, *, count: int, spinning: bool = True) -> OnnxSequences:
        """Open a bundle's graph. Raises what the constructor raises."""
        return OnnxSequences(bundle.graph, bundle.architecture, bundle.context, threads, count=count, spinning=spinning)

    def step(self, rows: Sequence[Row]) -> list[Logits]:
        """Run one token of each of several members and return the logits [V] after each. Raises InputError."""
        if len(rows) == 1 or not self.joins_steps:
            return [row.engine.forward(np.array([row.token], np.int64), row.start) for row in rows]
        return self._joint(rows)

    def copy_prefix(self, source: Engine, target: Engine, positions: int) -> bool:
        assert isinstance(source, OnnxEngine) and isinstance(target, OnnxEngine)
        return target.take_prefix(source, positions)

    def close(self) -> None:
        """Free the session and all caches. May be called twice."""
        for engine in self._engines:
            engine.close()
        self._steps.clear()
        self._memory, self._session = [], None

    def _joint(self, rows: Sequence[Row]) -> list[Logits]:
        by_engine = {id(row.engine): row for row in rows}
        if not self._memory:
            raise InputError("this engine is closed", "open the bundle again")
        if len(by_engine) != len(rows):
            raise InputError("a sequence has two rows in one step", "give one token of each")
        for row in rows:
            assert isinstance(row.engine, OnnxEngine)
            row.engine.begin_step(row.start, row.start + 1)
        first = self._gather(by_engine.keys(), len(rows))
        placed = self._placed[first : first + len(rows)]
        step = self._steps.get((first, len(rows)))
        if step is None:
            caches = [memory.array[first : first + len(rows)] for memory in self._memory]
            step = self._steps[first, len(rows)] = _JointStep(self._session, caches, placed, self._vocab_size)
        logits = step.run(placed, [by_engine[id(engine)] for engine in placed])
        at = {id(engine): index for index, engine in enumerate(placed)}
        return [logits[at[id(row.engine)]] for row in rows]

    def _gather(self, wanted: Any, count: int) -> int:
        """Bring the wanted engines to neighbouring places, and return the first one."""
        inside = [id(engine) in wanted for engine in self._placed]
        first = max(range(self._count - count + 1), key=lambda place: sum(inside[place : place + count]))
        window = range(first, first + count)
        holes = [place for place in window if not inside[place]]
        outside = [place for place, is_wanted in enumerate(inside) if is_wanted and place not in window]
        for hole, place in zip(holes, outside, strict=True):
            self._placed[hole].exchange_memory(self._placed[place])
            self._placed[hole], self._placed[place] = self._placed[place], self._placed[hole]
        return first

    def _rows_alike(self) -> bool:
        """Whether the rows of joint steps have the bits of steps by themselves, at random caches of several lengths."""
        rng, members = np.random.default_rng(0), self._engines
        room = members[0].max_positions - 1
        alike = room > 0
        for turn in range(2):
            if not alike:
                break
            lengths = [min(TRIED_LENGTHS[(turn + 2 * i) % len(TRIED_LENGTHS)], room) for i in range(len(members))]
            for engine, length in zip(members, lengths, strict=True):
                engine.write_cache([_random(rng, shape, dtype) for shape, dtype in engine.cache_forms(length)])
            tokens = rng.integers(0, self._vocab_size, len(members))
            rows = [Row(*row) for row in zip(members, tokens.tolist(), lengths, strict=True)]
            alone = [row.engine.forward(np.array([row.token]), row.start).copy() for row in rows]
            for count in range(2, len(rows) + 1):
                try:
                    joint = self._joint(rows[:count])
                except ArtefactError:  # a graph that does not take a batch
                    joint = []
                alike = alike and len(joint) == count
                alike = alike and all(np.array_equal(a, b) for a, b in zip(alone, joint, strict=False))
        return alike


class _JointStep:
    """Bound inputs and outputs for a step of neighbouring sequences, one token of each."""

    def __init__(
        self, session: Any, caches: Sequence[NDArray[Any]], engines: Sequence[OnnxEngine], vocab_size: int
    ) -> None:
        """`caches` [N, Hkv, C, D] are the sequences' parts of the common memory."""
        import onnxruntime as ort

        count = len(engines)
        self._session, self._binding = session, session.io_binding()
        self._tokens, self._positions = (np.zeros((count, 1), np.int64) for _ in range(2))
        self._longest = np.zeros(1, np.int32)
        self._logits = np.zeros((count, vocab_size), np.float32)  # [N, V]
        states = engines[0].states
        self._states = {name: np.zeros((count, *x.shape[1:]), np.float32) for name, x in states.inputs.items()}
        self._gated = {name: np.zeros((count, 1, width), np.float32) for name, width in states.outputs.items()}
        inputs = {"tokens": self._tokens, "positions": self._positions, NUM_LOGITS: np.array([1]), **self._states}
        outputs = {"logits": self._logits, **self._gated}
        for name, array in {**inputs, LONGEST: self._longest}.items():
            self._binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in outputs.items():
            self._binding.bind_ortvalue_output(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in zip(engines[0].cache_names, caches, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(array)
            self._binding.bind_ortvalue_input(name, value)
            self._binding.bind_ortvalue_output(f"new_{name}", value)

    def run(self, engines: Sequence[OnnxEngine], rows: Sequence[Row]) -> NDArray[np.float32]:
        """Run the rows, one of each engine in the order of their places, and return the logits [N, V]."""
        for i, (engine, row) in enumerate(zip(engines, rows, strict=True)):
            self._tokens[i, 0], self._positions[i, 0] = row.token, row.start
            if self._states:
                engine.states.prepare(row.start)
                for name, state in engine.states.inputs.items():
                    self._states[name][i] = state[0]
        self._longest[0] = 1 + max(row.start for row in rows)
        run_bound(self._session, self._binding)
        for i, (engine, row) in enumerate(zip(engines, rows, strict=True)):
            engine.states.keep([gated[i : i + 1] for gated in self._gated.values()], row.start)
            engine.end_step(row.start + 1)
        return self._logits


def _random(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype[Any]) -> NDArray[Any]:
    if dtype.kind == "i":
        return rng.integers(-100, 100, shape).astype(dtype)
    return rng.standard_normal(shape, np.float32).astype(dtype)
