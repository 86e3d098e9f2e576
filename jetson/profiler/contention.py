"""Contention probe: it measures how much of a core other guests of the machine take between two steps.

Two virtual cores are often two threads of one physical core. A neighbour there comes and goes within a millisecond,
and no counter of the system shows it. While it runs, a step takes up to half longer, and a loop that touches no memory
takes twice as long. So the probe runs such a loop just before and just after each step, and corrects the step's time.

The table gives the mean distance of a repetition from its model's median. It was measured with eight models of the demo
space at int4, eight repetitions each, minutes apart. A neighbour was there four fifths of the time.

    step              uncorrected    corrected
    decode, warm      7.8 - 10 %     4.5 - 6.4 %
    decode, cold      6.4 %          2.9 %
    prefill           6.8 %          2.1 %
"""

from __future__ import annotations

import statistics
import time

LOOP_TURNS = 800  # about 20 us; a neighbour stays for some hundred
WARM_UP_TURNS = 200  # run first: after a long step the loop's own code is cold and takes a fifth longer
QUIET_LOOPS = 20_000  # half a second, in which some loop is usually undisturbed
STEP_SHARE = 0.6  # of the loop's slowness that a step has; 0.5 to 0.8 do as well in all three kinds of step
MAX_SLOWNESS = 3.0  # a slower loop was itself interrupted


class ContentionProbe:
    """Times a short loop on this thread's core. It can correct steps that run on this core alone."""

    def __init__(self) -> None:
        self.quiet_s = min(_loop() for _ in range(QUIET_LOOPS))

    def slowness(self) -> float:
        """How many times longer than undisturbed the loop takes now, at most MAX_SLOWNESS."""
        _loop(WARM_UP_TURNS)
        took_s = _loop()
        self.quiet_s = min(self.quiet_s, took_s)
        return min(MAX_SLOWNESS, took_s / self.quiet_s)


def without_contention(seconds: float, before: float, after: float) -> float:
    """A step's time without contention, by the loop's slowness just `before` and `after` it."""
    return seconds / (1 + STEP_SHARE * ((before + after) / 2 - 1))


def probe_seconds() -> float:
    """The median time of one probe."""
    return statistics.median(_loop(WARM_UP_TURNS) + _loop() for _ in range(100))


def _loop(turns: int = LOOP_TURNS) -> float:
    begun = time.perf_counter()
    total = 0
    for turn in range(turns):
        total += turn
    return time.perf_counter() - begun
