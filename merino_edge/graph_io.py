"""Names on which export and runtime agree: of a graph's inputs and outputs, and of one target.

Knows no operator and no engine. `merino_edge.export.graph` shows the whole signature.
"""

from __future__ import annotations

# The target whose graphs ONNX Runtime runs on a GPU: float16, as its attention has no other kernel there.
ONNX_CUDA_TARGET = "onnxruntime-cuda"

# Prefix of the cache outputs of a `primitive` graph: the keys and values of the step's new positions. The engine copies
# them into the cache.
NEW_KV_PREFIX = "row_"

# Input of an `ort` graph, int64 [1]: how many of the last positions the graph returns logits for. Others call it
# num_logits_to_keep; the name in the file stays, so that bundles stay readable.
NUM_LOGITS = "wanted"

# Input of a `native` or `primitive` graph, int64 [N]: which of the step's tokens the graph returns logits for, counted
# from 0. Its length is known when TensorRT compiles, so the head of a one-token step is compiled for one row.
LOGIT_ROWS = "logit_rows"
MAX_LOGIT_ROWS = 8  # most of them in an engine: draft tokens and the token before them

# Input and output of a layer with a short convolution: its gated inputs before the step, and those of the step
# (merino_edge.export.lowerings.short_convolution).
STATE_PREFIX = "state_"
GATED_PREFIX = "gated_"
