"""Decides when to guess at what comes next, and how many tokens, so that most come in a second.

A step that runs a guess along with its token costs little more than a step, where reading the weights is what takes
time, and gives every token of the guess that is right for nothing. Whether that pays depends on the text and the
machine: `Drafter` watches how often guesses hit, how long they take to make, and how long steps of one and of more
tokens take here, and guesses as many tokens as promise the most per second, none where none does.

A guess is only run; whether it is right is for the sampler to say (merino_edge.runtime.generation). Who guesses is a
`Proposer`: merino_edge.runtime.speculative.prompt_lookup.PromptLookup or merino_edge.runtime.speculative.draft_model.DraftModel.
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

LENGTHS = (1, 3, 7)  # of a guess: steps of 2, 4 and 8 tokens
MOST = max(LENGTHS)
RATE = 0.1  # at which old hits are forgotten
FIRST_RATE = 0.5  # of hits, before there were any
SAMPLES = 5  # of a time, whose median counts
TRIES = 2  # of a length before its time counts
STALE_STEPS = 128  # after which a length that was not run is tried again
GAIN = 1.02  # that a guess must promise


class Proposer(Protocol):
    """Guesses at how a text goes on, of one text at a time."""

    free: bool  # guessing takes no time worth counting

    def begin(self, prompt: Sequence[int], cancel: threading.Event | None = None) -> None:
        """Follow another text, which begins so; `cancel` ends that early."""
        ...

    def push(self, token: int) -> None:
        """The text's next token."""
        ...

    def propose(self, most: int) -> list[int]:
        """The tokens after it, at most so many, perhaps none."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Drafter:
    """Asks a proposer. `acceptance_rate`: of a guessed token, where those before it were right."""

    def __init__(self, proposer: Proposer) -> None:
        self.acceptance_rate = FIRST_RATE
        self._guesser = proposer
        self._guess: list[int] = []  # the last one, run or not; its right beginning is taken off as tokens come
        self._times_s: dict[int, deque[float]] = {}  # of steps, by their tokens
        self._guess_s: deque[float] = deque(maxlen=SAMPLES)  # a token
        self._steps, self._last_run = 0, dict.fromkeys(LENGTHS, 0)

    def begin(self, prompt: Sequence[int], cancel: threading.Event | None = None) -> None:
        """Before anything else."""
        self._guesser.begin(prompt, cancel)

    def push(self, token: int) -> None:
        """A token was sampled."""
        if self._guess:
            hit = token == self._guess.pop(0)
            self.acceptance_rate += RATE * (hit - self.acceptance_rate)
            if not hit:
                self._guess = []
        self._guesser.push(token)

    def draft(self, room: int) -> list[int]:
        """The tokens to run after the next one; at most `room`, perhaps none."""
        self._steps += 1
        if self._step_s(1) is None:
            self._guess = []
            return []
        if self._guesser.free:
            self._guess = self._guesser.propose(MOST)  # those that are not run tell how often they hit, too
            best = self._best(min(room, len(self._guess)))
        elif best := self._best(room):
            began = perf_counter()
            self._guess = self._guesser.propose(best)
            if self._guess:
                self._guess_s.append((perf_counter() - began) / len(self._guess))
        if best:
            self._last_run[best] = self._steps
        return self._guess[:best]

    def ran(self, tokens: int, seconds: float) -> None:
        """A step of so many tokens took so long."""
        self._times_s.setdefault(tokens, deque(maxlen=SAMPLES)).append(seconds)

    def _best(self, most: int) -> int:
        """The length that promises most; 0 where a step alone promises as much."""
        best = max((0, *(length for length in LENGTHS if length <= most)), key=self._tokens_per_second)
        return best if self._tokens_per_second(best) >= GAIN * self._tokens_per_second(0) else 0

    def _tokens_per_second(self, length: int) -> float:
        """What a guess of this length promises: its hits and one more token, over the time of it and its step."""
        expected = sum(self.acceptance_rate**i for i in range(length + 1))
        alone_s, step_s = self._step_s(1), self._step_s(1 + length)
        assert alone_s is not None
        if length and self._steps - self._last_run[length] > STALE_STEPS:
            return expected / alone_s  # hopeful, so that it is tried
        guess_s = statistics.median(self._guess_s) if self._guess_s else 0.0
        return expected / ((alone_s if step_s is None else step_s) + length * guess_s)

    def _step_s(self, tokens: int) -> float | None:
        times = self._times_s.get(tokens, ())
        return statistics.median(times) if len(times) >= TRIES else None
