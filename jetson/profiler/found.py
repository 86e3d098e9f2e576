"""Found models: whole models that a search finds with the table just measured, measured to see how far off it is there.

A search picks its model among millions, preferably where the table errs low. So its models cost more than predicted
more often than random ones do. Their errors stand apart in the validation, and a search prints its intervals by them.
A profile cannot search by itself: its caller says how (`Request.find`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

from merino_edge.architecture import Architecture
from merino_edge.jetson.profiler import probe
from merino_edge.jetson.profiler.probe import Probe
from merino_edge.latency.measurement import MODES, Measurement, Mode
from merino_edge.latency.table import LatencyTable

# (table, mode, how many at most, seconds, models to leave out) -> models that a search found
FindModels = Callable[[LatencyTable, Mode, int, float, Collection[Architecture]], Sequence[Architecture]]

COMPILED_COUNT = 8  # models where each engine is compiled first, which takes longer than all its measurements
QUICK_COUNTS: dict[Mode, int] = {"decode": 10, "prefill": 6}
COUNTS: dict[Mode, int] = {"decode": 20, "prefill": 10}
SHARE = 0.15  # of the time asked for: to find these models and to measure them
SEARCH_SHARE = 0.04  # of the time asked for: to find them
FEWEST_SECONDS = 1.0


def found_probes(
    table: LatencyTable, lines: Sequence[Measurement], find: FindModels, *, quick: bool, seconds: float, compiled: bool
) -> Iterator[Probe]:
    """The probes of found models: those that `lines` hold a repetition of, and as many more as are wanted.

    Where engines are `compiled`, a few models found in decode are measured in both modes.
    """
    counts = QUICK_COUNTS if quick else COUNTS
    if compiled:
        counts = {"decode": COMPILED_COUNT}
    for mode, count in counts.items():
        seen, drawn = (
            dict.fromkeys(
                Architecture.from_dict(m.shape["architecture"]) for m in lines if (m.what, m.mode) == (what, mode)
            )
            for what in ("found", "model")
        )
        share_s = max(FEWEST_SECONDS, SEARCH_SHARE * seconds) * count / sum(counts.values())
        more = find(table, mode, count - len(seen), share_s, {**seen, **drawn}) if len(seen) < count else ()
        for a in [*seen, *more]:
            for timed in MODES if compiled else (mode,):
                yield probe.whole("found", timed, min(table.default_length, a.max_positions), a)
