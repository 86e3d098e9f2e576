"""Guesses at what comes next, from what came before: after the same few tokens, the same again ("prompt lookup").

A step that runs a guess along with its token costs little more than a step, where reading the weights is what takes
time, and gives every token of the guess that is right for nothing. Whether that pays depends on the text and the
machine: `Drafter` watches how often guesses hit, those that were not run too, and how long steps of one and of more
tokens take here, and guesses as many tokens as promise the most per second, none where none does.

A guess is only run; whether it is right is for the sampler to say (merino_edge.runtime.generation). Source: prompt
lookup decoding, https://github.com/apoorvumang/prompt-lookup-decoding. Knows no engine and no text.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Iterable

NGRAMS = (4, 3, 2)  # tokens that must be the same; the longest that is found before counts
LENGTHS = (1, 3, 7)  # of a guess: steps of 2, 4 and 8 tokens
MOST = max(LENGTHS)
RATE = 0.1  # at which old hits are forgotten
FIRST_RATE = 0.5  # of hits, before there were any
SAMPLES = 5  # of a step's time, whose median counts
TRIES = 2  # of a length before its time counts
STALE_STEPS = 128  # after which a length that was not run is tried again
GAIN = 1.02  # that a guess must promise


class PromptLookup:
    """An index of the last places of all short runs of tokens."""

    def __init__(self) -> None:
        self._ids: list[int] = []
        self._after: dict[tuple[int, ...], int] = {}  # a run of tokens: the place after its last one

    def push(self, token: int) -> None:
        """Append. A run is indexed once something follows it."""
        end = len(self._ids)
        for n in NGRAMS:
            if end >= n:
                self._after[tuple(self._ids[end - n :])] = end
        self._ids.append(token)

    def guess(self, most: int) -> list[int]:
        """What followed the longest run that ends here when it came before; at most so many tokens, perhaps none."""
        end = len(self._ids)
        for n in NGRAMS:
            if end > n and (place := self._after.get(tuple(self._ids[end - n :]))) is not None:
                return self._ids[place : place + most]
        return []


class Drafter:
    """Decides what guess to run. `hit_rate`: of a guessed token, where those before it were right."""

    def __init__(self, prompt: Iterable[int]) -> None:
        self.hit_rate = FIRST_RATE
        self._lookup = PromptLookup()
        self._guess: list[int] = []  # the last one, run or not; its right beginning is taken off as tokens come
        self._times_s: dict[int, deque[float]] = {}  # of steps, by their tokens
        self._steps, self._last_run = 0, dict.fromkeys(LENGTHS, 0)
        for token in prompt:
            self._lookup.push(token)

    def push(self, token: int) -> None:
        """A token came: the prompt's next, or the one that was sampled."""
        if self._guess:
            hit = token == self._guess.pop(0)
            self.hit_rate += RATE * (hit - self.hit_rate)
            if not hit:
                self._guess = []
        self._lookup.push(token)

    def draft(self, room: int) -> list[int]:
        """The tokens to run after the next one; at most `room`, perhaps none."""
        self._steps += 1
        self._guess = self._lookup.guess(MOST)
        possible = [length for length in LENGTHS if length <= min(room, len(self._guess))]
        if not possible or self._step_s(1) is None:
            return []
        best = max((0, *possible), key=self._tokens_per_second)
        if best and self._tokens_per_second(best) < GAIN * self._tokens_per_second(0):
            best = 0
        if best:
            self._last_run[best] = self._steps
        return self._guess[:best]

    def ran(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._times_s.setdefault(tokens, deque(maxlen=SAMPLES)).append(seconds)

    def _tokens_per_second(self, length: int) -> float:
        """What a guess of this length promises: its hits and one more token, over the time of its step."""
        expected = sum(self.hit_rate**i for i in range(length + 1))
        alone_s, step_s = self._step_s(1), self._step_s(1 + length)
        assert alone_s is not None
        stale = length and self._steps - self._last_run[length] > STALE_STEPS
        return expected / (alone_s if step_s is None or stale else step_s)  # hopeful, so that it is tried

    def _step_s(self, tokens: int) -> float | None:
        times = self._times_s.get(tokens, ())
        return statistics.median(times) if len(times) >= TRIES else None
