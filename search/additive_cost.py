"""Costs that add up: a sum over a model's parts, and a metric as a minimum over alternatives of a maximum of sums.

This module knows no metric and no table (`merino_edge.search.costs`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from merino_edge.architecture import Architecture, Block


@dataclass(frozen=True)
class AdditiveCost:
    """A cost that is a sum over a model's parts, in units, for models of one vocabulary."""

    # The third argument is the precision of the block's weights; None: that of everything else.
    block: Callable[[Architecture, Block, str | None], float]
    change: Callable[[int, int], float]
    end: Callable[[Architecture], float]  # of embedding and head: a sum over the two outer widths
    # Only the largest of the activations counts.
    activation: Callable[[Architecture, Block], float] | None = None
    end_activation: Callable[[Architecture], float] | None = None

    def units(self, a: Architecture, precisions: Sequence[str] = ()) -> float:
        """The cost of a whole architecture in units, whose blocks may have `precisions` of their own."""
        own: Sequence[str | None] = precisions or [None] * len(a.blocks)
        changes = (self.change(x.width, y.width) for x, y in itertools.pairwise(a.blocks))
        total = self.end(a) + sum(changes)
        total += sum(self.block(a, block, precision) for block, precision in zip(a.blocks, own, strict=True))
        if self.activation is not None and self.end_activation is not None:
            total += max(self.end_activation(a), *(self.activation(a, block) for block in a.blocks))
        return total


@dataclass(frozen=True)
class MetricCost:
    """One metric of models of one vocabulary: the minimum over `alternatives` of the maximum of their sums.

    One of the metric is `scale` units.
    """

    alternatives: tuple[tuple[AdditiveCost, ...], ...]
    scale: float = 1.0

    @property
    def sums(self) -> list[AdditiveCost]:
        """The sums of all alternatives, each once."""
        return list(dict.fromkeys(itertools.chain(*self.alternatives)))

    def value(self, a: Architecture, precisions: Sequence[str] = ()) -> float:
        """The cost of a whole architecture in the metric's own unit; its blocks may have `precisions` of their own."""
        units = {each: each.units(a, precisions) for each in self.sums}
        return min(max(units[each] for each in sums) for sums in self.alternatives) / self.scale


def unit_limit(limit: float, scale: float) -> float:
    """The largest number of units with units / scale <= `limit`."""
    units = limit * scale
    while units / scale > limit:
        units = math.nextafter(units, 0)
    while math.nextafter(units, math.inf) / scale <= limit:
        units = math.nextafter(units, math.inf)
    return units
