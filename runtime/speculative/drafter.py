"""Speculative decoding: chooses how many draft tokens to run with each step, so that tokens per second are highest.

A step of a few tokens takes little longer than a step of one, as long as reading the weights takes most of the time.
Each accepted draft token then saves a step. Whether that pays depends on the text and on the machine. `Drafter`
therefore measures the acceptance rate, the time of the proposer and the time of steps of each length.

Draft tokens come from a `Proposer`: `PromptLookup` or `DraftModel` in this folder. Whether a draft token is accepted
is the sampler's decision (merino_edge.runtime.generation).
"""

from __future__ import annotations

import statistics
import threading
from collections import deque
from collections.abc import Sequence
from time import perf_counter
from typing import Protocol

LENGTHS = (1, 3, 7)  # draft tokens of a step: with the sampled token, steps of 2, 4 and 8 tokens
MAX_LENGTH = max(LENGTHS)
RATE_SMOOTHING = 0.1  # weight of the newest outcome in the acceptance rate (exponential moving average)
FIRST_RATE = 0.5  # acceptance rate before anything was measured
SAMPLES = 5  # the newest times of one kind, whose median is used
MIN_SAMPLES = 2  # times of one step length before their median is used
STALE_STEPS = 128  # a length that was not run for this many steps is tried again
MIN_GAIN = 1.02  # the ratio of tokens per second that a draft must promise


class Proposer(Protocol):
    """Proposes draft tokens for one text at a time."""

    free: bool  # proposing takes no time worth measuring

    def begin(self, prompt: Sequence[int], cancel: threading.Event | None = None) -> None:
        """Start a new text, which begins with `prompt`. Setting `cancel` ends this early."""
        ...

    def push(self, token: int) -> None:
        """Append the next token of the text."""
        ...

    def propose(self, max_tokens: int) -> list[int]:
        """Return up to `max_tokens` draft tokens that may follow the text; possibly none."""
        ...

    def close(self) -> None:
        """Free what it holds."""
        ...


class Drafter:
    """Asks a proposer for as many draft tokens as promise the most tokens per second.

    `acceptance_rate` is that of a draft token whose predecessors were accepted.
    """

    def __init__(self, proposer: Proposer) -> None:
        self.acceptance_rate = FIRST_RATE
        self._proposer = proposer
        self._draft: list[int] = []  # the last draft, run or not, without the tokens that were compared already
        self._step_times_s: dict[int, deque[float]] = {}  # by the number of tokens in the step
        self._propose_times_s: deque[float] = deque(maxlen=SAMPLES)  # per draft token
        self._steps, self._last_run = 0, dict.fromkeys(LENGTHS, 0)

    def begin(self, prompt: Sequence[int], cancel: threading.Event | None = None) -> None:
        """Start a new text. Call this first."""
        self._proposer.begin(prompt, cancel)

    def push(self, token: int) -> None:
        """Append a sampled token and update the acceptance rate."""
        if self._draft:
            accepted = token == self._draft.pop(0)
            self.acceptance_rate += RATE_SMOOTHING * (accepted - self.acceptance_rate)
            if not accepted:
                self._draft = []
        self._proposer.push(token)

    def draft(self, room: int) -> list[int]:
        """Return the draft tokens to run after the newest token: at most `room`, possibly none."""
        self._steps += 1
        if self._step_s(1) is None:
            self._draft = []
            return []
        if self._proposer.free:
            self._draft = self._proposer.propose(MAX_LENGTH)  # drafts that are not run still measure the rate
            best = self._best_length(min(room, len(self._draft)))
        elif best := self._best_length(room):
            began = perf_counter()
            self._draft = self._proposer.propose(best)
            if self._draft:
                self._propose_times_s.append((perf_counter() - began) / len(self._draft))
        if best:
            self._last_run[best] = self._steps
        return self._draft[:best]

    def record_step(self, tokens: int, seconds: float) -> None:
        """Record the time of a step of `tokens` tokens."""
        self._step_times_s.setdefault(tokens, deque(maxlen=SAMPLES)).append(seconds)

    def _best_length(self, max_length: int) -> int:
        """The draft length that promises the most; 0 if a step without a draft promises as much."""
        lengths = (0, *(length for length in LENGTHS if length <= max_length))
        best = max(lengths, key=self._tokens_per_second)
        return best if self._tokens_per_second(best) >= MIN_GAIN * self._tokens_per_second(0) else 0

    def _tokens_per_second(self, length: int) -> float:
        """Expected tokens of a step (accepted draft tokens and one more) over the time of proposing and the step."""
        expected_tokens = sum(self.acceptance_rate**i for i in range(length + 1))
        single_s, step_s = self._step_s(1), self._step_s(1 + length)
        assert single_s is not None
        if length and self._steps - self._last_run[length] > STALE_STEPS:
            return expected_tokens / single_s  # optimistic, so that this length is tried again
        propose_s = statistics.median(self._propose_times_s) if self._propose_times_s else 0.0
        return expected_tokens / ((single_s if step_s is None else step_s) + length * propose_s)

    def _step_s(self, tokens: int) -> float | None:
        times_s = self._step_times_s.get(tokens, ())
        return statistics.median(times_s) if len(times_s) >= MIN_SAMPLES else None
