"""Sampling: chooses the next token from the logits. Knows no engine, no tokenizer and no text.

The filters are those of Hugging Face `generate`, in its order and with its treatment of ties: bias, repetition
penalty, temperature, top-k, top-p, min-p, typical-p. Frequency and presence penalties are OpenAI's and count the
answer's tokens only. A filter at its neutral value is not run.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from merino_edge.errors import ArtefactError, InputError
from merino_edge.runtime.engine import Logits, TokenIds
from merino_edge.runtime.loop_guard import LoopGuard
from merino_edge.runtime.sampling_parameters import Sampling

Floats = NDArray[np.float64]
# Up to this many candidates plain Python is faster than NumPy, whose code is not in the CPU's caches after a step.
FEW = 128
DRAWN_AT_ONCE = 64  # random numbers drawn in one call, for the same reason
MANY = 1024  # from this many probabilities on, a filter before sorting saves time
GROUP = 32  # logits in a group, which is represented by its largest


class Sampler:
    """Samples the tokens of one answer. The same seed gives the same answer."""

    def __init__(self, sampling: Sampling, *, end_ids: Collection[int] = (), guards: bool = True) -> None:
        """`end_ids` end the answer: no penalty makes them rarer. Without `guards` an answer may repeat itself."""
        self.sampling = sampling
        self._end_ids = np.asarray(sorted(end_ids), np.int64)
        self._guard = LoopGuard(sampling.loop_strength if guards else 0.0)
        self.seed = int(np.random.default_rng().integers(2**32)) if sampling.seed is None else sampling.seed
        self._random = np.random.default_rng(self.seed)
        self._drawn: list[float] = []  # random numbers from 0 to 1, the next one last
        random = sampling.temperature > 0 and not sampling.greedy
        self._few = random and 0 < sampling.top_k <= FEW and sampling.min_p == 0 and sampling.typical_p == 1

    def __call__(self, logits: Logits, context_ids: Sequence[int], output_ids: Sequence[int] = ()) -> int:
        """Sample the next token id from `logits` [V], which are not changed.

        `context_ids` are all ids so far, prompt and answer; `output_ids` are those of the answer. Raises InputError
        (a bias for an id outside the vocabulary), ArtefactError (logits that are not finite).
        """
        sampling = self.sampling
        logits = adjusted(logits, context_ids, output_ids, sampling, self._end_ids)
        if repeated := self.repeats(output_ids):
            logits = logits.copy()
            logits[list(repeated)] -= np.fromiter(repeated.values(), np.float32)
        if self._few:
            return self._sample_few(logits)
        best = int(logits.argmax())  # argmax returns NaN and +infinity first
        if not math.isfinite(logits[best]):
            raise _not_finite(logits)
        if sampling.greedy or sampling.temperature == 0:
            return best
        ids, probabilities = distribution(logits, sampling)
        cumulative = probabilities.cumsum()
        # The first id whose cumulative probability exceeds the random number, so never one of probability zero.
        index = int(cumulative.searchsorted(self._draw() * cumulative[-1], side="right"))
        return int(ids[min(index, ids.size - 1)])

    def repeats(self, output_ids: Sequence[int]) -> Mapping[int, float]:
        """What the tokens lose that would go on with what repeats in the answer, by id; mostly nothing."""
        return {token: lost for token, lost in self._guard.penalties(output_ids).items() if token not in self._end_ids}

    def _draw(self) -> float:
        """The next random number from 0 to 1."""
        if not self._drawn:
            self._drawn = self._random.random(DRAWN_AT_ONCE)[::-1].tolist()
        return self._drawn.pop()

    def _sample_few(self, logits: Logits) -> int:
        """Sample like `distribution`, with the same token for the same random number, in plain Python.

        It handles temperature, top-k and top-p only.
        """
        ids, values = _candidates(logits, self.sampling.top_k)
        largest, temperature = max(values), self.sampling.temperature
        weights = [math.exp((value - largest) / temperature) for value in values]
        total = sum(weights)
        if not math.isfinite(total):  # a logit is NaN, or the largest is infinite
            raise _not_finite(logits)
        probabilities = [weight / total for weight in weights]
        order = [index for index, probability in enumerate(probabilities) if probability]
        if self.sampling.top_p < 1:
            order.sort(key=probabilities.__getitem__)
            dropped, dropped_mass = 0, probabilities[order[0]]
            while dropped_mass <= 1 - self.sampling.top_p and dropped < len(order) - 1:
                dropped += 1
                dropped_mass += probabilities[order[dropped]]
            order = order[dropped:]
        left = self._draw() * sum(probabilities[index] for index in order)
        for index in order:
            left -= probabilities[index]
            if left < 0:
                break
        return ids[index]


def _not_finite(logits: Logits) -> ArtefactError:
    worst = logits[logits.argmax()]
    return ArtefactError(f"the model returned logits of {worst}", "export again with --precision fp32")


def adjusted(
    logits: Logits,
    context_ids: Sequence[int],
    output_ids: Sequence[int],
    sampling: Sampling,
    end_ids: TokenIds | tuple[()] = (),
) -> Logits:
    """`logits` [V] with bias and penalties applied, as a copy; the array itself if there are none.

    `context_ids` are all ids so far, `output_ids` those of the answer. The repetition penalty leaves `end_ids` alone:
    every prompt of a chat has them, so that answers would not end. Raises InputError for a bias outside V.
    """
    repetition, frequency, presence = (
        sampling.repetition_penalty,
        sampling.frequency_penalty,
        sampling.presence_penalty,
    )
    if repetition == 1 and not (frequency or presence or sampling.logit_bias):
        return logits
    logits = logits.copy()
    if sampling.logit_bias:
        biased = np.fromiter(sampling.logit_bias, np.int64)
        if biased.max() >= logits.size:
            raise InputError(f"logit_bias has token {biased.max()}", f"give ids of 0 to {logits.size - 1}")
        logits[biased] += np.fromiter(sampling.logit_bias.values(), np.float32)
    if repetition != 1:  # applied once, however often a token occurs
        seen = np.asarray(context_ids, np.int64)
        seen = seen[~np.isin(seen, end_ids)] if len(end_ids) else seen
        values = logits[seen]
        logits[seen] = np.where(values < 0, values * repetition, values / repetition)
    if (frequency or presence) and output_ids:
        repeated, counts = np.unique(np.asarray(output_ids, np.int64), return_counts=True)
        logits[repeated] -= (presence + frequency * counts).astype(np.float32)
    return logits


def distribution(logits: Logits, sampling: Sampling) -> tuple[TokenIds, Floats]:
    """The ids [N] that the filters keep, and their probabilities [N], which sum to 1.

    Top-k is applied first, on the float32 logits. It does not depend on the temperature, and the other filters then
    handle k numbers instead of V.
    """
    k = sampling.top_k
    ids, logits = _top(logits, k) if 0 < k < logits.size else (np.arange(logits.size), logits)
    below = np.subtract(logits, np.maximum.reduce(logits), dtype=np.float64)
    with np.errstate(over="ignore"):  # with a temperature close to 0 only the most likely remains
        likely = _normal(np.exp(below / sampling.temperature))
    if sampling.top_p < 1:
        # Drop the least likely while their sum is at most 1 - top_p; the most likely always stays. Those below a V-th
        # of that are dropped in any case and need no sorting: to sort all V takes longer than a small model's step.
        tail_mass = 0.0
        if likely.size > MANY:
            tail = likely < min((1 - sampling.top_p) / likely.size, likely.max())
            tail_mass, ids, likely = float(likely[tail].sum()), ids[~tail], likely[~tail]
        order = likely.argsort(kind="stable")
        first = int((tail_mass + likely[order[:-1]].cumsum()).searchsorted(1 - sampling.top_p, side="right"))
        ids, likely = ids[order[first:]], likely[order[first:]]
    if sampling.min_p > 0:
        keep = likely >= sampling.min_p * likely.max()
        ids, likely = ids[keep], likely[keep]
    if sampling.typical_p < 1:
        ids, likely = _typical(ids, _normal(likely), sampling.typical_p)
    return ids, _normal(likely)


def _top(logits: Logits, k: int) -> tuple[TokenIds, Logits]:
    """The ids of the k largest logits and their ties, ascending, and those logits."""
    ids = _at_least_top(logits, k)
    values = logits[ids]
    ordered = values.copy()
    ordered.partition(values.size - k)
    keep = values >= ordered[values.size - k]
    return ids[keep], values[keep]


def _candidates(logits: Logits, k: int) -> tuple[list[int], list[float]]:
    """Like `_top`, as lists. Raises ArtefactError where a logit outside the top k is NaN."""
    if k >= logits.size:
        return list(range(logits.size)), logits.tolist()
    ids = _at_least_top(logits, k)
    # A grammar's mask makes all other tokens tie at -infinity.
    if ids.size > MANY and (possible := (logits > -math.inf).nonzero()[0]).size:
        ids = possible
    values: list[float] = logits[ids].tolist()
    smallest = sorted(values)[-min(k, len(values))]
    kept = [index for index, value in enumerate(values) if not value < smallest]
    id_list = ids.tolist()
    return [id_list[index] for index in kept], [values[index] for index in kept]


def _at_least_top(logits: Logits, k: int) -> TokenIds:
    """The ids of the k largest logits, their ties and some others, ascending.

    The k-th largest of the groups' maxima is at most the k-th largest logit, and few logits are as large. So all V
    logits are read twice; to sort them takes ten times as long. Raises ArtefactError for NaN among many logits.
    """
    groups = logits.size // GROUP
    if groups <= k:
        return np.arange(logits.size)
    maxima = np.maximum.reduce(logits[: GROUP * groups].reshape(GROUP, groups))
    maxima.partition(groups - k)  # NaN comes last
    largest, rest = maxima[groups - k :].tolist(), logits[GROUP * groups :].tolist()
    if math.isnan(sum(largest)) or math.isnan(sum(rest)):
        raise _not_finite(logits)
    ids: TokenIds = (logits >= largest[0]).nonzero()[0]
    return ids


def _typical(ids: TokenIds, likely: Floats, mass: float) -> tuple[TokenIds, Floats]:
    """The ids and probabilities closest to the expected surprise whose sum reaches `mass`.

    Source: locally typical sampling, Meister et al., TACL 2023.
    """
    possible = likely > 0
    ids, likely = ids[possible], likely[possible]
    surprise = -np.log(likely)
    apart = np.abs(surprise - (likely * surprise).sum())
    order = apart.argsort(kind="stable")
    last = min(int((likely[order].cumsum() < mass).sum()), order.size - 1)
    keep = apart <= apart[order[last]]
    return ids[keep], likely[keep]


def _normal(weights: Floats) -> Floats:
    return weights / np.float64(np.add.reduce(weights))
