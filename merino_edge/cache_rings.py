"""How many positions a layer's cache holds where a ring keeps its window: position p stands in row p modulo that many.

The exporter writes graphs by this, an engine keeps the rings by it, and counts count by it. `primitive` graphs for
TensorRT have such rings. TensorRT's own update of a cache cannot wrap, so a `native` graph has none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from merino_edge.storage import WINDOW_SLACK

if TYPE_CHECKING:
    from merino_edge.architecture import Architecture

SLACK = WINDOW_SLACK  # positions behind a window that its ring holds too: a step may go back as far
WORTH_SHARE = 0.5  # of the whole cache; where rings keep no more, they are worth another lowering


def ring_positions(window: int, capacity: int) -> int:
    """Positions of the ring of a layer with a `window` (0: none), of a cache for `capacity` positions."""
    return min(window + SLACK, capacity) if window else capacity


def kept_share(a: Architecture, capacity: int) -> float:
    """The share of the whole cache's bytes that rings keep."""
    layers = [block for block in a.blocks if not block.convolution]
    whole = sum(block.layers * block.kv_heads for block in layers) * capacity
    kept = sum(block.layers * block.kv_heads * ring_positions(block.window, capacity) for block in layers)
    return kept / whole if whole else 1.0


def are_worth(a: Architecture, capacity: int) -> bool:
    """Whether rings keep so little of the whole cache that the lowering is chosen for them."""
    return kept_share(a, capacity) <= WORTH_SHARE


def lengths(a: Architecture, capacity: int) -> list[int]:
    """The different lengths of rings that are shorter than the cache, ascending."""
    found = {ring_positions(block.window, capacity) for block in a.blocks if not block.convolution}
    return sorted(found - {capacity})
