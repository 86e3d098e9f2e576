"""From logits to the next token. Knows no engine, no tokenizer and no text.

The filters, their order and their treatment of ties are those of Hugging Face `generate`: bias, repetition penalty,
temperature, top-k, top-p, min-p, typical-p. Frequency and presence penalties are OpenAI's, over the answer alone. A
filter at its neutral value is not run.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from merino_edge import limits
from merino_edge.errors import ArtefactError, InputError
from merino_edge.runtime.engine import Logits, TokenIds

Floats = NDArray[np.float64]
FEW = 128  # candidates up to which Python's own numbers take less time than NumPy's calls, which a step leaves cold
DRAWN_AT_ONCE = 64  # random numbers, for the same reason
MANY = 1024  # probabilities from which on it pays to look before sorting
GROUP = 32  # logits that are represented by their largest


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
    typical_p: float = 1.0  # keep those nearest to the expected surprise that hold this probability; 1: all
    repetition_penalty: float = 1.0  # divides positive and multiplies negative logits of tokens already seen
    frequency_penalty: float = 0.0  # taken off a token's logit for each time that the answer has it
    presence_penalty: float = 0.0  # taken off it once if the answer has it
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added, by token id; -100 forbids
    seed: int | None = None  # None: a fresh one, see Sampler.seed
    greedy: bool = False  # the likeliest token, after bias and penalties; the rest is not looked at

    def __post_init__(self) -> None:
        _check_real("temperature", self.temperature, 0.0, 100.0)
        limits.check_range("top_k", self.top_k, 0, limits.MAX_VOCAB_SIZE)
        _check_real("top_p", self.top_p, 0.0, 1.0)
        _check_real("min_p", self.min_p, 0.0, 1.0)
        _check_real("typical_p", self.typical_p, 0.0, 1.0)
        _check_real("repetition_penalty", self.repetition_penalty, 0.01, 100.0)
        _check_real("frequency_penalty", self.frequency_penalty, -2.0, 2.0)
        _check_real("presence_penalty", self.presence_penalty, -2.0, 2.0)
        for token, bias in self.logit_bias.items():
            limits.check_range("logit_bias's token", token, 0, limits.MAX_VOCAB_SIZE - 1)
            _check_real(f"logit_bias of token {token}", bias, -100.0, 100.0)
        if self.seed is not None:
            limits.check_range("seed", self.seed, 0, limits.MAX_SEED)

    @property
    def required_topk(self) -> int | None:
        """How many of the largest logits, with what ties with the least of them, decide; None: all, as with penalties.

        Top-k goes first: what is left to the other filters is the same, whether they are given a row or that.
        """
        if self.logit_bias or self.frequency_penalty or self.presence_penalty or self.repetition_penalty != 1:
            return None
        return 1 if self.greedy or self.temperature == 0 else self.top_k or None


class Sampler:
    """Draws tokens; one per answer, so that a seed always gives the same answer."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self.seed = int(np.random.default_rng().integers(2**32)) if sampling.seed is None else sampling.seed
        self._random = np.random.default_rng(self.seed)
        self._drawn: list[float] = []  # of 0 to 1, the next one last
        drawn = sampling.temperature > 0 and not sampling.greedy
        self._of_few = drawn and 0 < sampling.top_k <= FEW and sampling.min_p == 0 and sampling.typical_p == 1

    def __call__(self, logits: Logits, history: Sequence[int], answer: Sequence[int] = ()) -> int:
        """The next token id. `logits` [V] are not changed; `history`: all ids so far, `answer`: those after the prompt.

        Raises InputError (a bias for a token that is not there), ArtefactError (logits that are not finite).
        """
        sampling = self.sampling
        logits = adjusted(logits, history, answer, sampling)
        if self._of_few:
            return self._draw_of_few(logits)
        best = int(logits.argmax())  # NaN and +infinity come out first
        if not math.isfinite(logits[best]):
            raise _not_finite(logits)
        if sampling.greedy or sampling.temperature == 0:
            return best
        ids, probabilities = distribution(logits, sampling)
        cumulative = probabilities.cumsum()
        # The first id whose cumulative probability exceeds the draw: never one of probability zero.
        index = int(cumulative.searchsorted(self._draw() * cumulative[-1], side="right"))
        return int(ids[min(index, ids.size - 1)])

    def _draw(self) -> float:
        """The next number of 0 to 1."""
        if not self._drawn:
            self._drawn = self._random.random(DRAWN_AT_ONCE)[::-1].tolist()
        return self._drawn.pop()

    def _draw_of_few(self, logits: Logits) -> int:
        """As by `distribution`: the same token for the same draw, with temperature, top-k and top-p alone."""
        ids, values = _candidates(logits, self.sampling.top_k)
        most, temperature = max(values), self.sampling.temperature
        likely = [math.exp((value - most) / temperature) for value in values]
        mass = sum(likely)
        if not math.isfinite(mass):  # for NaN, or all as infinite, which nothing else makes of differences to the most
            raise _not_finite(logits)
        likely = [weight / mass for weight in likely]
        order = [place for place, chance in enumerate(likely) if chance]
        if self.sampling.top_p < 1:
            order.sort(key=likely.__getitem__)
            dropped, held = 0, likely[order[0]]
            while held <= 1 - self.sampling.top_p and dropped < len(order) - 1:
                dropped += 1
                held += likely[order[dropped]]
            order = order[dropped:]
        left = self._draw() * sum(likely[place] for place in order)
        for place in order:
            left -= likely[place]
            if left < 0:
                break
        return ids[place]


def _not_finite(logits: Logits) -> ArtefactError:
    worst = logits[logits.argmax()]
    return ArtefactError(f"the model returned logits of {worst}", "export again with --precision fp32")


def adjusted(logits: Logits, history: Sequence[int], answer: Sequence[int], sampling: Sampling) -> Logits:
    """`logits` [V] with bias and penalties; a copy where there are any."""
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
    if repetition != 1:  # once however often a token occurs
        seen = np.asarray(history, np.int64)
        values = logits[seen]
        logits[seen] = np.where(values < 0, values * repetition, values / repetition)
    if (frequency or presence) and answer:
        said, times = np.unique(np.asarray(answer, np.int64), return_counts=True)
        logits[said] -= (presence + frequency * times).astype(np.float32)
    return logits


def distribution(logits: Logits, sampling: Sampling) -> tuple[TokenIds, Floats]:
    """The candidate ids [N] and their probabilities [N], summing to 1, after the filters.

    Top-k goes first, on the float32 logits: it does not depend on the temperature, and what follows
    then handles k numbers, not V.
    """
    k = sampling.top_k
    ids, logits = _top(logits, k) if 0 < k < logits.size else (np.arange(logits.size), logits)
    below = np.subtract(logits, np.maximum.reduce(logits), dtype=np.float64)
    with np.errstate(over="ignore"):  # a temperature next to 0 leaves the likeliest alone
        likely = _normal(np.exp(below / sampling.temperature))
    if sampling.top_p < 1:
        # Drop the unlikeliest while they hold no more than 1 - top_p; the likeliest always stays. Of many, those below
        # a V-th of that go in any case, and unsorted: sorting a whole vocabulary takes longer than a small model.
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
    """Ids of the k largest and their ties, ascending, and their logits."""
    ids = _at_least_top(logits, k)
    found = logits[ids]
    ordered = found.copy()
    ordered.partition(found.size - k)
    keep = found >= ordered[found.size - k]
    return ids[keep], found[keep]


def _candidates(logits: Logits, k: int) -> tuple[list[int], list[float]]:
    """As `_top`. Raises ArtefactError where a logit is NaN, and is not among them."""
    if k >= logits.size:
        return list(range(logits.size)), logits.tolist()
    ids = _at_least_top(logits, k)
    if ids.size > MANY and (possible := (logits > -math.inf).nonzero()[0]).size:  # a grammar's mask makes the rest tie
        ids = possible
    values: list[float] = logits[ids].tolist()
    least = sorted(values)[-min(k, len(values))]
    kept = [place for place, value in enumerate(values) if not value < least]
    numbers = ids.tolist()
    return [numbers[place] for place in kept], [values[place] for place in kept]


def _at_least_top(logits: Logits, k: int) -> TokenIds:
    """Ascending, the ids of the k largest, their ties and some others. Raises ArtefactError for NaN among many logits.

    The k-th largest of the maxima of any groups is no larger than the k-th of all, and few logits are as large as it.
    So a whole vocabulary is read twice; sorting it takes ten times as long.
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
    """Those whose surprise is nearest to the expected one, until they hold `mass` (Meister et al., TACL 2023)."""
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
