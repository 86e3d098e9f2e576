"""The `Engine` protocol: one loaded model that runs one sequence on one device.

Sampling, stopping, detokenising, chat and benchmarks are written against this protocol and know no backend.
Prefill, decode, rewind and prefix reuse are all `forward` at a chosen `start`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

TokenIds = NDArray[np.int64]
Logits = NDArray[np.float32]


class Engine(Protocol):
    """A loaded model and its KV cache, which has a capacity of `max_positions`."""

    vocab_size: int
    max_positions: int
    max_rows: int  # the most rows of logits that one step can return
    # The bits of a prompt stay the same if it is cut at all multiples of this. 2: at any, into even pieces.
    prompt_grid: int

    def forward(self, tokens: TokenIds, start: int) -> Logits:
        """Run `tokens` [T] at positions start..start+T-1 and return the last position's logits [V].

        All positions before `start` must be filled. Positions from `start` on are overwritten.
        The returned array is valid only until the next call.
        """
        ...

    def forward_rows(self, tokens: TokenIds, start: int, rows: int) -> Logits:
        """Like `forward`, but return the logits of the last `rows` positions, [rows, V].

        `rows` is 1 to `max_rows`, and at most T.
        """
        ...

    def mark_filled(self, positions: int) -> None:
        """Treat the first `positions` of the cache as filled, whatever they hold.

        Benchmarks use this to time a step at any cache length without running a prompt.
        """
        ...

    def close(self) -> None:
        """Free the model and its cache."""
        ...


@runtime_checkable
class WindowedEngine(Protocol):
    """An engine whose layers with a window keep only that much of their cache."""

    @property
    def least_start(self) -> int:
        """The lowest `start` that `forward` takes beside 0 and a kept one."""
        ...

    def holds(self, start: int) -> bool:
        """Whether `forward` takes this `start`."""
        ...

    def keep_from(self, position: int) -> None:
        """Keep what a step at `position` needs, while not too many positions follow."""
        ...


@runtime_checkable
class CacheEngine(Engine, Protocol):
    """An engine whose KV cache can be read and written, as a prompt cache file needs."""

    @property
    def cache_dtype(self) -> np.dtype[Any]:
        """The type of keys and values."""
        ...

    def cache_shapes(self, positions: int) -> list[tuple[int, int, int]]:
        """The shape (Hkv, P, D) of the first `positions` of each cache: key and value of every layer, in order."""
        ...

    def read_cache(self, positions: int) -> list[NDArray[Any]]:
        """A copy of the keys and values of the first `positions`, in the order of `cache_shapes`."""
        ...

    def write_cache(self, arrays: Sequence[NDArray[Any]]) -> None:
        """Fill the first positions with arrays that `read_cache` returned."""
        ...


class Row(NamedTuple):
    """One token of one sequence of a joint step."""

    engine: Engine
    token: int
    start: int  # its position


class SequenceGroup(Protocol):
    """Several sequences of one model, which share its weights. Each is an engine by itself."""

    members: Sequence[Engine]

    @property
    def joins_steps(self) -> bool:
        """Whether `step` runs its rows in one step of the model; else one after the other."""
        ...

    def step(self, rows: Sequence[Row]) -> list[Logits]:
        """Run one token of each of several members, and return the logits [V] after each, with the bits of `forward`.

        The arrays are valid until the next step of any member.
        """
        ...

    def copy_prefix(self, source: Engine, target: Engine, positions: int) -> bool:
        """Fill the first `positions` of one member from another that holds them. False where that cannot be done."""
        ...

    def close(self) -> None:
        """Free the model and all caches."""
        ...


class Alone:
    """A group of one engine. Implements SequenceGroup."""

    joins_steps = False

    def __init__(self, engine: Engine) -> None:
        self.members: Sequence[Engine] = [engine]

    def step(self, rows: Sequence[Row]) -> list[Logits]:
        return [row.engine.forward(np.array([row.token], np.int64), row.start) for row in rows]

    def copy_prefix(self, source: Engine, target: Engine, positions: int) -> bool:
        return False

    def close(self) -> None:
        self.members[0].close()


class Candidates(NamedTuple):
    """The logits that a token is sampled from. `ids` None means the whole row: N is then the vocabulary size V."""

    logits: Logits  # [N]
    ids: TokenIds | None  # [N], ascending


@runtime_checkable
class TopKEngine(Engine, Protocol):
    """An engine that can return only the largest logits of a step, so that the whole row is not copied."""

    def forward_topk(self, tokens: TokenIds, start: int, k: int) -> Candidates:
        """Like `forward`, but return the `k` largest logits and all logits equal to the smallest of those.

        That is all that greedy and top-k sampling need. The whole row is returned for more than one token,
        and where the engine cannot find the top k.
        """
        ...
