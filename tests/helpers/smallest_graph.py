"""The smallest graph that a bundle may hold: it computes nothing, and no engine opens it."""

from __future__ import annotations

SMALLEST_GRAPH = b"\x08\x0b\x3a\x00\x42\x00"  # a version, an empty graph, an operator set
