"""An engine and the tokens its cache holds: what the next prompt need not run again."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np

from merino_edge.runtime.engine import Candidates, Engine, Logits, TopKEngine

PREFILL_CHUNK = 256  # tokens between two looks at the cancel flag


class Session:
    """An engine and the ids whose keys and values are in its cache. Nothing else may use the engine."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.ids: list[int] = []
        self.selecting = engine if isinstance(engine, TopKEngine) else None

    def prefill(self, ids: Sequence[int], cancel: threading.Event | None = None) -> Logits | None:
        """Bring the cache to exactly `ids`, running only those it lacks; logits [V] after the last.

        None when `cancel` was set on the way; what has been run stays usable.
        """
        # The last id always runs, for its logits.
        start = min(_common_prefix(self.ids, ids), len(ids) - 1)
        del self.ids[start:]
        logits = None
        for at in range(start, len(ids), PREFILL_CHUNK):
            if cancel is not None and cancel.is_set():
                return None
            chunk = ids[at : at + PREFILL_CHUNK]
            logits = self.engine.forward(np.asarray(chunk, np.int64), at)
            self.ids.extend(chunk)
        return logits

    def step(self, token: int, guess: Sequence[int] = ()) -> Logits:
        """Append one token and return the logits after it, and after each of a `guess` at what follows: [1 + N, V].

        The guess is not appended: `keep` does that, for as much of it as turned out right.
        """
        tokens = np.asarray([token, *guess], np.int64)
        logits = self.engine.forward_rows(tokens, len(self.ids), len(tokens))
        self.ids.append(token)
        return logits

    def step_topk(self, token: int, k: int) -> Candidates:
        """As `step` where the engine is `selecting`: at least the `k` largest of the logits, and all their ties."""
        assert self.selecting is not None
        candidates = self.selecting.forward_topk(np.asarray([token], np.int64), len(self.ids), k)
        self.ids.append(token)
        return candidates

    def keep(self, token: int) -> None:
        """Append the next token of the guess, whose keys and values are in the cache already."""
        self.ids.append(token)


def _common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
