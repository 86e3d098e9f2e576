"""Ring caches in the host's memory: what ONNX Runtime's engine keeps for a `primitive` graph for TensorRT."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merino_edge.cache_rings import ring_positions
from merino_edge.runtime.engines.ring_caches import Positions, RingCaches, Rows


class HostRings(RingCaches):
    """The rings of a graph. `arrays` are its caches [1, Hkv, L, D] by name, once they are allocated."""

    def __init__(self, rows: Mapping[str, Any], windows: Mapping[str, int], context: int) -> None:
        """`rows`: of each cache, as the graph says. Those that fit a window of `windows` are rings, others whole."""
        lengths = {name: ring_positions(window, context) for name, window in windows.items()}
        self.lengths = {name: length for name, length in lengths.items() if rows[name] == length < context}
        super().__init__({name: windows[name] for name in self.lengths}, self.lengths)
        self.arrays: dict[str, NDArray[Any]] = {}

    def read_rows(self, name: str, positions: Positions) -> Rows:
        """A copy of what a ring holds of `positions` [N]: [Hkv, N, D]."""
        return np.asarray(self.arrays[name][0][:, positions % self.lengths[name]])

    def write_rows(self, name: str, positions: Positions, rows: Rows) -> None:
        """Let a ring hold `rows` [Hkv, N, D] at `positions` [N]."""
        self.arrays[name][0][:, positions % self.lengths[name]] = rows

    def write_newest(self, name: str, rows: Rows, end: int) -> None:
        """Write rows [Hkv, N, D] of the positions before `end`: as many of the newest as a ring has."""
        newest = rows[:, -self.lengths[name] :]
        self.write_rows(name, np.arange(end - newest.shape[1], end), newest)

    def read_whole(self, name: str, positions: int) -> Rows:
        """The first `positions` [Hkv, P, D], with zeros for those that are not held."""
        array, held = self.arrays[name], self.held(name, positions)
        whole = np.zeros((array.shape[1], positions, array.shape[3]), array.dtype)
        whole[:, held] = self.read_rows(name, held)
        return whole
