"""How much of a core others take, felt between two steps.

Two virtual cores are often two threads of one physical core, or of as many as other guests want at that moment. Such a
neighbour comes and goes within a millisecond, no counter of the system shows it, and while it runs a step takes up to
half longer: a median over steps then says how often it ran. A loop that touches no memory takes twice as long beside
it, so one just before and one just after a step tell what the step met.

Eight models of the demo space at int4, eight repetitions each, minutes apart, on such a machine (a neighbour during four
fifths of the time): repetitions were 7.8 - 10 % (decode, warm), 6.4 % (cold) and 6.8 % (prefill) from their median, and with
a neighbour taken out 4.5 - 6.4, 2.9 and 2.1 %. Where the loop is even, nothing changes.
"""

from __future__ import annotations

import statistics
import time

TURNS = 800  # of the loop: about 20 us, where a neighbour stays for some hundred
WARM_TURNS = 200  # before it: a step leaves the loop's own code cold, a long one so that it takes a fifth longer
QUIET_LOOPS = 20_000  # half a second, in which it is without_contention for a moment, as a rule
STEP_SHARE = 0.6  # of the loop's slowness that a step shares; 0.5 to 0.8 repeat alike, in all three kinds of step
MOST = 3.0  # times slower: beyond, the loop itself was interrupted


class ContentionProbe:
    """Feels the core that this thread is on. Taking it out needs a step that runs on the same core alone."""

    def __init__(self) -> None:
        self.quiet_s = min(_loop() for _ in range(QUIET_LOOPS))

    def slowness(self) -> float:
        """How many times longer than without_contention the loop takes now."""
        _loop(WARM_TURNS)
        took_s = _loop()
        self.quiet_s = min(self.quiet_s, took_s)
        return min(MOST, took_s / self.quiet_s)


def without_contention(seconds: float, before: float, after: float) -> float:
    """What a step would have taken, had the loop not been slower just before and after it."""
    return seconds / (1 + STEP_SHARE * ((before + after) / 2 - 1))


def loop_seconds() -> float:
    """Of feeling the core once, as a rule."""
    return statistics.median(_loop(WARM_TURNS) + _loop() for _ in range(100))


def _loop(turns: int = TURNS) -> float:
    begun = time.perf_counter()
    total = 0
    for turn in range(turns):
        total += turn
    return time.perf_counter() - begun
