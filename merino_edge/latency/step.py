"""A query of a latency table: the time or the energy of one step of a model."""

from __future__ import annotations

from typing import Literal, NamedTuple

from merino_edge.latency.measurement import Mode

Unit = Literal["ms", "mj"]


class Step(NamedTuple):
    """A decode step that reads `length` cache positions, or the prefill of a prompt of `length` tokens.

    `piece` is the index of the step-time model's piece that sums the parts (`LatencyTable.alternatives`).
    """

    mode: Mode
    length: int
    unit: Unit = "ms"
    piece: int = 0

    @property
    def fitted(self) -> bool:
        """Whether the step-time model applies: it was fitted to the times of decode steps."""
        return (self.mode, self.unit) == ("decode", "ms")
