"""The memory of one more sequence beside an open model, and how many sequences the free memory allows."""

from __future__ import annotations

from merino_edge import counts
from merino_edge.bundle import Bundle
from merino_edge.runtime.memory import meminfo_bytes

MOST_BY_DEFAULT = 4  # more gain little: on two cores 8 make 1.3 times as many tokens a second, each at half the speed
LOGIT_BYTES = 4


def sequence_bytes(bundle: Bundle) -> int:
    """Most bytes that one more sequence takes on the CPU: its cache when it is full, and a row of logits."""
    a, graph = bundle.architecture, bundle.manifest.get("graph") or {}
    is_int8 = graph.get("cache") == "int8"
    element_bytes = 1 if is_int8 else counts.cache_element_bytes(bundle.precision, bundle.target)
    return counts.kv_bytes(a, bundle.context, element_bytes) + a.vocab_size * LOGIT_BYTES


def sequences_that_fit(bundle: Bundle) -> int:
    """How many sequences the free memory has room for, 1 to MOST_BY_DEFAULT; half of it stays free."""
    free_bytes = meminfo_bytes("MemAvailable")
    if free_bytes is None:
        return 1
    weights = sum(int(entry["bytes"]) for entry in bundle.manifest["files"].values())
    room = (free_bytes - 2 * weights) // 2  # ONNX Runtime holds them a second time while it loads
    return min(max(room // sequence_bytes(bundle), 1), MOST_BY_DEFAULT)
