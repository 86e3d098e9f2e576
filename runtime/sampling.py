"""From logits to the next token. Knows no engine, no tokenizer and no text.

The filters, their order and their treatment of ties are those of Hugging Face `generate`: repetition
penalty, temperature, top-k, top-p, min-p. A filter at its neutral value (1, 1, 0, 1, 0) is not run.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merino_edge import limits
from merino_edge.errors import ArtefactError, InputError
from merino_edge.runtime.engine import Logits, TokenIds


def _check_real(name: str, value: float, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise InputError(f"{name} is {value!r}, outside {low:g} to {high:g}", f"give {low:g} to {high:g}")


@dataclass(frozen=True)
class Sampling:
    """How to choose a token. Construction raises InputError naming the value out of range."""

    temperature: float = 0.5  # 0: greedy. Models this small wander off at the usual 0.8 (docs/lab-notes.md)
    top_k: int = 40  # keep the k likeliest and their ties; 0: all
    top_p: float = 0.95  # keep the fewest that together hold this probability; 1: all
    min_p: float = 0.0  # keep those at least this likely relative to the likeliest; 0: all
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens already seen
    seed: int | None = None  # None: a fresh one, see Sampler.seed
    greedy: bool = False  # the likeliest token, after the repetition penalty; the rest is not looked at

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, 0.0, 100.0)
        limits.check_range("top_k", self.top_k, 0, limits.MAX_VOCAB_SIZE)
        _check_real("top_p", self.top_p, 0.0, 1.0)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        _check_real("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        if self.seed is not None:
            limits.check_range("seed", self.seed, 0, limits.MAX_SEED)


class Sampler:
    """Draws tokens; one per answer, so that a seed always gives the same answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = int(np.random.default_rng().integers(2**32)) if sampling.seed is None else sampling.seed
        self._random = np.random.default_rng(self.seed)

    def __call__(self, logits: Logits, history: Sequence[int]) -> int:
        """The next token id. `logits` [V] are not changed; `history` is every id so far, prompt included."""
        if self.sampling.repetition_penalty != 1:
            logits = penalise(logits, history, self.sampling.repetition_penalty)
        best = int(logits.argmax())  # NaN and +infinity come out first
        if not math.isfinite(logits[best]):
            raise ArtefactError(f"the model returned logits of {logits[best]}", "export again with --precision fp32")
        if self.sampling.greedy or self.sampling.temperature == 0:
            return best
        ids, probabilities = distribution(logits, self.sampling)
        cumulative = probabilities.cumsum()
        # The first id whose cumulative probability exceeds the draw: never one of probability zero.
        index = int(cumulative.searchsorted(self._random.random() * cumulative[-1], side="right"))
        return int(ids[min(index, ids.size - 1)])


def penalise(logits: Logits, history: Sequence[int], penalty: float) -> Logits:
    """A copy of `logits` [V] with every id of `history` made less likely, once however often it occurs."""
    seen = np.asarray(history, np.int64)
    values = logits[seen]
    logits = logits.copy()
    logits[seen] = np.where(values < 0, values * penalty, values / penalty)
    return logits


def distribution(logits: Logits, sampling: Sampling) -> tuple[TokenIds, NDArray[np.float64]]:
    """The candidate ids [N] and their probabilities [N], summing to 1, after the filters.

    Top-k goes first, on the float32 logits: it does not depend on the temperature, and what follows
    then handles k numbers, not V.
    """
    k = sampling.top_k
    if 0 < k < logits.size:
        threshold = np.partition(logits, logits.size - k)[logits.size - k]
        ids = np.flatnonzero(logits >= threshold)
    else:
        ids = np.arange(logits.size)
    scores = logits[ids].astype(np.float64) / sampling.temperature
    likely = _normal(np.exp(scores - scores.max()))
    if sampling.top_p < 1:
        # Drop the unlikeliest while they hold no more than 1 - top_p; the likeliest always stays. Those below a
        # V-th of that go in any case, and unsorted: sorting a whole vocabulary takes longer than a small model.
        tail = likely < min((1 - sampling.top_p) / likely.size, likely.max())
        tail_mass, ids, likely = likely[tail].sum(), ids[~tail], likely[~tail]
        order = likely.argsort(kind="stable")
        first = int((tail_mass + likely[order[:-1]].cumsum()).searchsorted(1 - sampling.top_p, side="right"))
        ids, likely = ids[order[first:]], likely[order[first:]]
    if sampling.min_p > 0:
        keep = likely >= sampling.min_p * likely.max()
        ids, likely = ids[keep], likely[keep]
    return ids, _normal(likely)


def _normal(weights: NDArray[np.float64]) -> NDArray[np.float64]:
    return weights / np.float64(weights.sum())
