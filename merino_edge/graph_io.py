"""Names of a graph's inputs and outputs: what export and runtime agree on.

Knows no operator and no engine. The whole signature stands in `merino_edge.export.graph`.
"""

from __future__ import annotations

# Prefix of the cache outputs of a `primitive` graph: the step's new keys and values, which the engine copies into the cache.
NEW_KV_PREFIX = "row_"

# Input of an `ort` graph, int64 [1]: for how many of the last positions the graph returns logits.
NUM_LOGITS = "wanted"
