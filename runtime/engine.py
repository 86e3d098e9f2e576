"""What the runtime asks of a backend: `Engine`, one sequence on one device, and `open_engine`.

Everything above it (sampling, stopping, detokenising, chat, bench) is written against this protocol
and knows no backend. Prefill, decode, rewind and prefix reuse are all `forward` at a chosen `start`.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from merino_edge import bundle, limits
from merino_edge.bundle import Bundle
from merino_edge.tokenizer import Tokenizer

# Prefix of the outputs of a `primitive` graph: new keys and values, which the engine copies into the cache.
ROWS = "row_"
WANTED = "wanted"  # the input of an `ort` graph that says of how many of the last positions the logits leave

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

    def assume(self, positions: int) -> None:
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
class SelectingEngine(Engine, Protocol):
    """One that can leave most of a row where it is."""

    def forward_largest(self, tokens: TokenIds, start: int, k: int) -> Candidates:
        """As `forward`, the `k` largest logits and all that tie with the least of them, which is what greedy and top-k
        look at; the whole row where the engine cannot tell them, and of several tokens."""
        ...


def open_engine(
    path: Path | str,
    threads: int | None = None,
    cpu: bool = False,
    cuda_graphs: bool = True,
    on_bundle: Callable[[Bundle], None] = lambda loaded: None,
) -> tuple[Engine, Tokenizer, Bundle]:
    """Verify a bundle and load it: by the engine that TensorRT built last, where there is one, else its graph on the
    CPU, or always that with `cpu`. `threads` None: as many as were measured to be best here, if they were, else all
    cores. `cuda_graphs`: an engine of TensorRT launches a step as one graph. `on_bundle` is told what was verified
    before a backend opens it.

    Raises ArtefactError (missing, altered), InputError (threads), UnsupportedError, MissingExtraError (the engine's
    TensorRT or GPU is not here).
    """
    if threads is not None:
        limits.check_range("threads", threads, 1, limits.MAX_THREADS)
    loaded = bundle.load(path)
    tokenizer = Tokenizer.load(loaded.path)
    on_bundle(loaded)
    # The backend's library loads only when a bundle opens.
    if loaded.engines and not cpu:
        from merino_edge.runtime.tensorrt_engine import TensorRtEngine

        return TensorRtEngine.from_bundle(loaded, cuda_graphs), tokenizer, loaded
    from merino_edge.runtime.onnx_engine import OnnxEngine
    from merino_edge.runtime.tuning import tuning_here

    if threads is None and (tuning := tuning_here(loaded)):
        return OnnxEngine.from_bundle(loaded, tuning.threads, tuning.spinning), tokenizer, loaded
    return OnnxEngine.from_bundle(loaded, threads), tokenizer, loaded
