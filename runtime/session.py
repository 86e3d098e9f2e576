"""A session: an engine and the token ids that its KV cache holds, so that a common prefix is not run again."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from merino_edge.runtime.engine import Candidates, Engine, Logits, TopKEngine, WindowedEngine

PREFILL_CHUNK = 256  # tokens between two checks of the cancel flag


class Session:
    """An engine and the ids whose keys and values are in its cache. Nothing else may use the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ids: list[int] = []
        self.topk_engine = engine if isinstance(engine, TopKEngine) else None

    def prefill(self, ids: Sequence[int], cancel: threading.Event | None = None) -> Logits | None:
        """Make the cache hold exactly `ids`, and return the logits [V] after the last one.

        Only the ids after the common prefix are run. Returns None if `cancel` was set meanwhile; the part that
        has been run stays in the cache.
        """
        # The last id always runs, because its logits are needed.
        start = min(common_prefix(self.ids, ids), len(ids) - 1)
        if isinstance(self.engine, WindowedEngine) and start < self.engine.least_start:
            start = 0  # windows no longer hold what is before the common prefix's end
        del self.ids[start:]
        logits = None
        for at in range(start, len(ids), PREFILL_CHUNK):
            if cancel is not None and cancel.is_set():
                return None
            chunk = ids[at : at + PREFILL_CHUNK]
            logits = self.engine.forward(np.asarray(chunk, np.int64), at)
            self.ids.extend(chunk)
        return logits

    def step(self, token: int, draft: Sequence[int] = ()) -> Logits:
        """Append `token`, run it together with the `draft` tokens, and return the logits after each, [1 + N, V].

        Draft tokens are not appended. The caller appends each accepted one with `accept`.
        """
        tokens = np.asarray([token, *draft], np.int64)
        logits = self.engine.forward_rows(tokens, len(self.ids), len(tokens))
        self.ids.append(token)
        return logits

    def step_topk(self, token: int, k: int) -> Candidates:
        """Append `token`, run it, and return at least the `k` largest logits and all ties. Needs a `topk_engine`."""
        assert self.topk_engine is not None
        candidates = self.topk_engine.forward_topk(np.asarray([token], np.int64), len(self.ids), k)
        self.ids.append(token)
        return candidates

    def accept(self, token: int) -> None:
        """Append the next draft token; its keys and values are in the cache already."""
        self.ids.append(token)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
