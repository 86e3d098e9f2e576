"""Interruptions: a step that the kernel stopped, to let another program run on its core, is timed again.

A program keeps a core for a few milliseconds at a time, and most steps are shorter. So even beside a program that never
rests most steps run to their end, and the kernel counts the others: they end with an involuntary switch. A step that
fails so again and again is longer than the time that a program is left alone. Then the processor time of its thread
counts, which waits for nobody. With several threads there is no such figure, and the shortest try counts.
"""

from __future__ import annotations

import resource
import time
from collections.abc import Callable

TRIES = 4


def switches() -> int:
    """How often the kernel stopped a thread of this process in favour of another program."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_nivcsw


def uninterrupted_seconds(run: Callable[[], float], again: Callable[[], object], *, one_thread: bool) -> float:
    """The seconds that `run` says it took, of a run that nothing interrupted. `again` runs before another try.

    `one_thread`: all work is done by this thread.
    """
    shortest_s = float("inf")
    for number in range(TRIES):
        if number:
            again()
        switched, processor_s = switches(), time.thread_time()
        seconds = run()
        processor_s = time.thread_time() - processor_s
        if switches() == switched:
            return seconds
        shortest_s = min(shortest_s, processor_s if one_thread else seconds)
    return shortest_s
