"""The states of short convolutions beside a KV cache: the gated inputs of the newest positions, of each such layer.

A step needs those of the K - 1 positions before it, for K taps. A ring keeps `SLACK` more, so that any step of several
rows can be run again when its draft tokens are refused. An engine that must start before these starts at 0.
Knows no graph: it fills the inputs and reads the outputs that an engine binds (merino_edge.export.graph).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from merino_edge.architecture import Architecture
from merino_edge.graph_io import GATED_PREFIX, STATE_PREFIX
from merino_edge.storage import WINDOW_SLACK

SLACK = WINDOW_SLACK  # positions that a step may go back, whatever it wrote
LAST_PAIR = 2  # positions that a session runs again at the end of a prompt that it has


class ConvolutionStates:
    """The rings of all layers. Position p stands in row p modulo the ring's length."""

    def __init__(self, a: Architecture) -> None:
        layers = [(layer, block) for layer, block in enumerate(a.layer_blocks()) if block.convolution]
        self._before = [block.convolution - 1 for _, block in layers]
        self.inputs = {  # by name, [1, K - 1, W]
            f"{STATE_PREFIX}{layer}": np.zeros((1, block.convolution - 1, block.width), np.float32)
            for layer, block in layers
        }
        self.outputs = {f"{GATED_PREFIX}{layer}": block.width for layer, block in layers}  # widths by name
        self.length = SLACK + max(self._before, default=0)  # of the rings
        self._rings = [np.zeros((self.length, block.width), np.float32) for _, block in layers]
        self._first = 0  # the lowest position whose row is held
        self.kept_start = 0  # a position whose state is kept apart; 0: none
        self._kept: list[NDArray[Any]] = []

    @property
    def least_start(self) -> int:
        """The lowest position beside 0 that a step may start at."""
        return self._first + max(self._before, default=0) if self._first else 0

    def prepare(self, start: int) -> None:
        """Fill the inputs for a step at `start`: its state, or zeros before the first position."""
        if 0 < start < self.least_start:
            self._take_back(start)
        for ring, state, before in zip(self._rings, self.inputs.values(), self._before, strict=True):
            held = min(start, before)
            state[0, : before - held] = 0
            state[0, before - held :] = ring[np.arange(start - held, start) % self.length]

    def _take_back(self, start: int) -> None:
        """Put the kept state into the rings, from where the steps after the next one read it too."""
        assert start == self.kept_start
        for ring, kept, before in zip(self._rings, self._kept, self._before, strict=True):
            held = min(start, before)
            ring[np.arange(start - held, start) % self.length] = kept[0, before - held :]
        self._first = max(0, start - max(self._before))

    def keep(self, gated: Sequence[NDArray[Any]], start: int) -> None:
        """Keep the gated inputs [1, T, W] of each layer of a step at `start`."""
        if not self._rings:
            return
        end = start + gated[0].shape[1]
        first = max(start, end - self.length)
        rows = np.arange(first, end) % self.length
        for ring, array in zip(self._rings, gated, strict=True):
            ring[rows] = array[0, first - start :]
        self._first = max(min(self._first, start), end - self.length)

    def keep_from(self, position: int) -> None:
        """Keep the state of a step at `position`, wherever later steps go. 0: keep none."""
        if position and position != self.kept_start:
            self.prepare(position)
            self._kept = [state.copy() for state in self.inputs.values()]
        self.kept_start = position if self._rings else 0

    def mark_filled(self, positions: int) -> None:
        """Treat the positions before `positions` as written, whatever they hold."""
        self._first = max(0, positions - self.length) if self._rings else 0

    def shapes(self, positions: int) -> list[tuple[int, int, int]]:
        """The shape (1, P, W) of what `read` returns of each layer."""
        return [(1, len(self._newest(positions)), ring.shape[1]) for ring in self._rings]

    def read(self, positions: int) -> list[NDArray[Any]]:
        """A copy of the newest of the first `positions` of each layer: enough to run its last pair again."""
        return [ring[None, self._newest(positions) % self.length] for ring in self._rings]

    def write(self, arrays: Sequence[NDArray[Any]], positions: int) -> None:
        """Take what `read` returned for as many positions."""
        rows = self._newest(positions)
        for ring, array in zip(self._rings, arrays, strict=True):
            ring[rows % self.length] = array[0]
        self._first = int(rows[0]) if self._rings else 0

    def _newest(self, positions: int) -> NDArray[np.int64]:
        return np.arange(max(0, positions - LAST_PAIR - max(self._before, default=0)), positions)
