"""A session: an engine and the token ids that its KV cache holds, so that a common prefix is not run again.

The bits of an answer do not depend on what was in the cache before. Some kernels compute rows in pairs, and round a row
without a partner otherwise. So a prompt runs in pieces of an even number of tokens, however much of it is reused. Where
the bits depend on how a prompt is cut, it is always cut at the same places. The tokens of an answer ran one by one, so
they run again where the next prompt holds them.
"""

from __future__ import annotations

import threading
from collections.abc import Generator, Sequence

import numpy as np

from merino_edge.errors import EngineInUseError
from merino_edge.runtime.engine import Candidates, Engine, Logits, TopKEngine, WindowedEngine
from merino_edge.runtime.engine_use import EngineUse
from merino_edge.runtime.turns import PromptPiece

PREFILL_CHUNK = 128  # tokens between two checks of the cancel flag, as many as engines run at once
LONGEST_ODD = 127  # tokens of a piece that gets a partner for its last one; engines return two rows of 128 tokens


class Session:
    """An engine and the ids whose keys and values are in its cache.

    The engine is the session's from its first prompt on, until `close`. Another session that runs on it meanwhile
    raises EngineInUseError, and so does a second thread in this one.
    """

    def __init__(self, engine: Engine, *, exact: bool = True) -> None:
        """Without `exact` everything in the cache is reused, and the bits depend on how it came there."""
        self.engine = engine
        self.ids: list[int] = []
        self.prompt_length = 0  # of `ids`, those whose bits are those of a prompt
        self.prompts = 0  # run so far; an answer to an earlier one cannot go on
        self.use = EngineUse(engine)
        self._exact, self._grid = exact, engine.prompt_grid if exact else 1
        self._in_pairs, self._piece = self._grid == 2, PREFILL_CHUNK if self._grid <= 2 else self._grid
        self.topk_engine = engine if isinstance(engine, TopKEngine) else None

    def prefill(self, ids: Sequence[int], cancel: threading.Event | None = None) -> Logits | None:
        """Make the cache hold exactly `ids`, and return the logits [V] after the last one.

        Only the ids from `first_to_run` are run. Returns None if `cancel` was set meanwhile; the part that has been run
        stays in the cache. Raises EngineInUseError.
        """
        pieces = self.prefill_pieces(ids, cancel)
        while True:
            try:
                next(pieces)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]

    def prefill_pieces(
        self, ids: Sequence[int], cancel: threading.Event | None = None
    ) -> Generator[PromptPiece, None, Logits | None]:
        """Like `prefill`, but stop before every piece."""
        with self.use:
            self.prompts += 1
            number, start = self.prompts, self.first_to_run(ids)
            self.cut(start)  # before a cancel too: what stays is always of this prompt, as a prompt cache file expects
        logits = None
        while start < len(ids):
            yield PromptPiece()
            if cancel is not None and cancel.is_set():
                return None
            piece = ids[start : start + self._piece]
            if self._in_pairs and len(piece) % 2 and len(piece) > LONGEST_ODD:
                piece = piece[: LONGEST_ODD + 1]
            elif self._is_alone(start + len(piece)):
                piece = piece[: max(1, len(piece) - 1)]
            with self.use:
                if self.prompts != number:
                    raise EngineInUseError("a newer prompt has begun in this session", "run one at a time")
                logits = self._run(piece, start)
                self.ids.extend(piece)
            start += len(piece)
        if isinstance(self.engine, WindowedEngine):
            self.engine.keep_from(self._grid_point(self.prompt_length))
        return logits

    def first_to_run(self, ids: Sequence[int]) -> int:
        """The first position that a prompt `ids` has to run. The last one always runs: its logits are needed."""
        reusable = self.prompt_length if self._exact else len(self.ids)
        last = len(ids) - (3 if self._is_alone(len(ids)) else 1)
        start = max(0, self._grid_point(min(common_prefix(self.ids, ids), reusable, last)))
        gone = isinstance(self.engine, WindowedEngine) and not self.engine.holds(start)
        return 0 if gone else start  # windows and short convolutions hold the newest positions only

    def _run(self, piece: Sequence[int], start: int) -> Logits:
        """Run a piece of a prompt and return the logits [V] after its last token."""
        engine, end = self.engine, start + len(piece)
        if self._in_pairs and len(piece) % 2 and end < engine.max_positions and engine.max_rows > 1:
            self.prompt_length = end
            # The last token gets a partner, which the next step overwrites.
            return np.asarray(engine.forward_rows(np.asarray([*piece, piece[-1]], np.int64), start, 2)[0])
        self.prompt_length = self._grid_point(end)
        if self._is_alone(end) and start:
            piece, start = [self.ids[start - 1], *piece], start - 1
        return engine.forward(np.asarray(piece, np.int64), start)

    def _is_alone(self, end: int) -> bool:
        """Whether the last token of a prompt has no partner behind it, for want of room, and takes the one before."""
        return self._in_pairs and end % 2 > 0 and end == self.engine.max_positions

    def _grid_point(self, position: int) -> int:
        """The last position up to this one at which a prompt is cut."""
        return position // self._grid * self._grid

    def cut(self, length: int) -> None:
        """Forget all but the first `length` ids."""
        del self.ids[length:]
        self.prompt_length = min(self.prompt_length, length)

    def hold(self, ids: Sequence[int]) -> None:
        """The engine's cache holds the prompt `ids`, which was read from elsewhere."""
        self.ids, self.prompt_length = list(ids), self._grid_point(len(ids))
        self.prompts += 1

    def close(self) -> None:
        """Give the engine back, for another session. The cache is forgotten."""
        self.cut(0)
        self.prompts += 1
        self.use.give_back()

    def step(self, token: int, draft: Sequence[int] = ()) -> Logits:
        """Append `token`, run it together with the `draft` tokens, and return the logits after each, [1 + N, V].

        Draft tokens are not appended. The caller appends each accepted one with `accept`.
        """
        tokens = np.asarray([token, *draft], np.int64)
        with self.use:
            logits = self.engine.forward_rows(tokens, len(self.ids), len(tokens))
            self.ids.append(token)
        return logits

    def step_topk(self, token: int, k: int) -> Candidates:
        """Append `token`, run it, and return at least the `k` largest logits and all ties. Needs a `topk_engine`."""
        assert self.topk_engine is not None
        with self.use:
            candidates = self.topk_engine.forward_topk(np.asarray([token], np.int64), len(self.ids), k)
            self.ids.append(token)
        return candidates

    def accept(self, token: int) -> None:
        """Append the next draft token; its keys and values are in the cache already."""
        self.ids.append(token)


def common_prefix(a: Sequence[int], b: Sequence[int]) -> int:
    """How many leading ids are the same."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))
