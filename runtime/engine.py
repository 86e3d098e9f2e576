"""What the runtime asks of a backend: `Engine`, one sequence on one device, and `open_engine`.

Everything above it (sampling, stopping, detokenising, chat, bench) is written against this protocol
and knows no backend. Prefill, decode, rewind and prefix reuse are all `forward` at a chosen `start`.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
Logits = NDArray[np.float32]


class Engine(Protocol):
    """A loaded model and its key/value cache of `max_positions` places."""

    vocab_size: int
    max_positions: int
    max_rows: int  # of the last positions of a step, whose logits it can return at once

    def forward(self, tokens: TokenIds, start: int) -> Logits:
        """Run `tokens` [T] at positions start..start+T-1 and return the last one's logits [V].

        Every position before `start` must have been written; those from `start` on are overwritten.
        The returned array is valid only until the next call.
        """
        ...

    def forward_rows(self, tokens: TokenIds, start: int, rows: int) -> Logits:
        """As `forward`, the last `rows` positions' logits [rows, V]; 1 to `max_rows` of them, at most T."""
        ...

    def mark_filled(self, positions: int) -> None:
        """Take so many positions for written, whatever they hold: to time a step at any length without the prompt."""
        ...

    def close(self) -> None:
        """Free the model and its cache."""
        ...


class Candidates(NamedTuple):
    """What a token is chosen from: logits [N] and whose they are [N], ascending; ids None: a whole row's, V of them."""

    logits: Logits
    ids: TokenIds | None


@runtime_checkable
class TopKEngine(Engine, Protocol):
    """One that can leave most of a row where it is."""

    def forward_topk(self, tokens: TokenIds, start: int, k: int) -> Candidates:
        """As `forward`, the `k` largest logits and all that tie with the least of them, which is what greedy and top-k
        look at; the whole row where the engine cannot tell them, and of several tokens."""
        ...
