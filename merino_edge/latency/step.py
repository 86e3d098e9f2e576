"""What is asked of a latency table: the time or the energy of one step of a model."""

from __future__ import annotations

from typing import Literal, NamedTuple

from merino_edge.latency.measurement import Mode

Unit = Literal["ms", "mj"]


class Step(NamedTuple):
    """A decode step that reads `length` positions of the cache, or the prefill of a prompt of so many tokens; by which
    piece of the table's prediction (`LatencyTable.alternatives`)."""

    mode: Mode
    length: int
    unit: Unit = "ms"
    piece: int = 0

    @property
    def fitted(self) -> bool:
        """Whether the step_time have a say: they were fitted to the times of decode steps."""
        return (self.mode, self.unit) == ("decode", "ms")
