"""In which order a profile's probes are timed: batches, in random order, the same every time.

Probes that share models stay together, and a batch's models fit in memory together. What one part costs is averaged
with others' in every sum, but a whole model stands for itself, and how much of the caches other guests leave it changes
within minutes. So batches of whole models come several times, in every part of the make_batches, and where they are few they
are timed more often.
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Collection, Iterable, Iterator

from merino_edge.architecture import Architecture
from merino_edge.jetson.profiler.probe import Probe
from merino_edge.jetson.profiler.timer import Rounds
from merino_edge.latency.measurement import WHOLE

BATCH_PROBES = 8  # what a kill can lose
BATCH_BYTES = 2**30  # of float32 weights; engines need about twice as much
MIN_ROUNDS = 6  # fewer look steady by chance
QUICK_TIMES, FULL_TIMES = 2, 5  # that a whole model's batch comes
QUICK_SHARE, FULL_SHARE = 2.0, 1.0  # rounds of a whole model in all, for each of a part; few models count for more


@dataclasses.dataclass(frozen=True)
class ProbeBatch:
    """Probes that are timed side by side, so many rounds; `repetition`: how often they came before."""

    probes: tuple[Probe, ...]
    rounds: Rounds
    repetition: int = 0
    last: bool = True

    @property
    def keys(self) -> set[tuple[str, int]]:
        """Of the lines that it makes."""
        return {(probe.key, self.repetition) for probe in self.probes}


def make_batches(
    probes: Iterable[Probe], quick: bool, most: int, known: Collection[tuple[str, int]] = frozenset()
) -> list[ProbeBatch]:
    """The batches of a profile in order: of parts for at most `most` rounds. What is `known` is left out."""
    probes = list(probes)
    times, share = (QUICK_TIMES, QUICK_SHARE) if quick else (FULL_TIMES, FULL_SHARE)
    rounds, whole_rounds = _rounds(most), _rounds(math.ceil(share * most / times))
    parts = [ProbeBatch(batch, rounds) for batch in _batches(p for p in probes if p.what not in WHOLE)]
    wholes = list(_batches(p for p in probes if p.what in WHOLE))
    order = []
    for time in range(times):
        between = [*parts[time::times], *(ProbeBatch(batch, whole_rounds, time, time == times - 1) for batch in wholes)]
        random.Random(time).shuffle(between)
        order += between
    if not known:
        return order
    left = (
        dataclasses.replace(batch, probes=tuple(p for p in batch.probes if (p.key, batch.repetition) not in known))
        for batch in order
    )
    return [batch for batch in left if batch.probes]


def _rounds(most: int) -> Rounds:
    return Rounds(max(min(most, MIN_ROUNDS), most // 3), most)


def _batches(probes: Iterable[Probe]) -> Iterator[tuple[Probe, ...]]:
    groups: dict[tuple[Architecture, ...], list[Probe]] = {}
    for probe in probes:
        groups.setdefault(probe.models, []).append(probe)
    order = list(groups.values())
    random.Random(0).shuffle(order)
    batch: list[Probe] = []
    for group in order:
        size_bytes = 4 * sum(a.parameters for a in {a for p in [*batch, *group] for a in p.models})
        if batch and (len(batch) + len(group) > BATCH_PROBES or size_bytes > BATCH_BYTES):
            yield tuple(batch)
            batch = []
        batch += group
    if batch:
        yield tuple(batch)
