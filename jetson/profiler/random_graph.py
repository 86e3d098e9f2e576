"""The graph of an architecture with random weights, as a profile times it."""

from __future__ import annotations

import functools

from merino_edge.architecture import Architecture
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.quantization.stored_weights import random_stored
from merino_edge.export.targets import Target

MAX_GRAPH_BYTES = 2_000_000_000  # a serialized model may have 2 GiB
KEPT_BYTES, KEPT_GRAPHS = 2**20, 64  # of a graph that is kept, and how many: most models are opened several times


def random_graph(a: Architecture, precision: str, target: str, lowering: str) -> bytes:
    """The graph that export writes of `a`, with random weights, the same in every run.

    Raises UnsupportedError where it is too large.
    """
    resolved = Target.named(target, precision, lowering)
    if a.weight_bytes(precision) > MAX_GRAPH_BYTES:
        raise UnsupportedError(
            f"{a.parameters:,} parameters at {precision} are more than one graph of 2 GB holds",
            "choose a lower precision",
        )
    return (_kept if a.weight_bytes(precision) <= KEPT_BYTES else _built)(a, resolved)


def _built(a: Architecture, resolved: Target) -> bytes:
    return to_bytes(build_stored(a, random_stored(a, resolved), resolved, a.max_positions))


_kept = functools.lru_cache(KEPT_GRAPHS)(_built)
