"""Batching: it groups a profile's probes and puts the batches into a random order, the same every time.

Probes that share models stay together, and a batch's models fit in memory together. A sum over parts averages the
errors of its entries, but a whole model stands for itself. How much of the caches other guests leave it changes within
minutes. So batches of whole models are repeated in every part of the profile, and few models get more rounds each.
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

BATCH_PROBES = 8  # at most so many probes are lost when a profile is killed
BATCH_BYTES = 2**30  # of float32 weights; engines need about twice as much
MIN_ROUNDS = 6  # fewer can agree by chance
QUICK_REPETITIONS, FULL_REPETITIONS = 2, 5  # of a batch of whole models
QUICK_SHARE, FULL_SHARE = 2.0, 1.0  # a whole model's rounds over all repetitions, for each round of a part
PUBLIC_ROUNDS = 8  # at most: a public model is large, and it is measured once


@dataclasses.dataclass(frozen=True)
class ProbeBatch:
    """Probes that are timed side by side. `repetition` counts from 0 how often the batch came before."""

    probes: tuple[Probe, ...]
    rounds: Rounds
    repetition: int = 0
    last: bool = True

    @property
    def keys(self) -> set[tuple[str, int]]:
        """(key, repetition) of the lines that it makes."""
        return {(probe.key, self.repetition) for probe in self.probes}


def make_batches(
    probes: Iterable[Probe], *, quick: bool, max_rounds: int, measured: Collection[tuple[str, int]] = frozenset()
) -> list[ProbeBatch]:
    """The batches of a profile in order, without the (key, repetition) pairs already `measured`.

    A part gets at most `max_rounds` rounds.
    """
    probes = list(probes)
    repetitions, share = (QUICK_REPETITIONS, QUICK_SHARE) if quick else (FULL_REPETITIONS, FULL_SHARE)
    rounds, whole_rounds = _rounds(max_rounds), _rounds(math.ceil(share * max_rounds / repetitions))
    parts = [ProbeBatch(group, rounds) for group in _groups(p for p in probes if p.what not in WHOLE)]
    public_rounds = _rounds(min(max_rounds, PUBLIC_ROUNDS))
    parts += [ProbeBatch(group, public_rounds) for group in _groups(p for p in probes if p.what == "public")]
    wholes = list(_groups(p for p in probes if p.what in WHOLE and p.what != "public"))
    batches = []
    for repetition in range(repetitions):
        last = repetition == repetitions - 1
        section = parts[repetition::repetitions]
        section += [ProbeBatch(group, whole_rounds, repetition, last) for group in wholes]
        random.Random(repetition).shuffle(section)
        batches += section
    if not measured:
        return batches
    left = (
        dataclasses.replace(batch, probes=tuple(p for p in batch.probes if (p.key, batch.repetition) not in measured))
        for batch in batches
    )
    return [batch for batch in left if batch.probes]


def _rounds(maximum: int) -> Rounds:
    return Rounds(max(min(maximum, MIN_ROUNDS), maximum // 3), maximum)


def _groups(probes: Iterable[Probe]) -> Iterator[tuple[Probe, ...]]:
    """The probes of each batch: those that share models are never parted."""
    by_models: dict[tuple[Architecture, ...], list[Probe]] = {}
    for probe in probes:
        by_models.setdefault(probe.models, []).append(probe)
    order = list(by_models.values())
    random.Random(0).shuffle(order)
    group: list[Probe] = []
    for more in order:
        size_bytes = 4 * sum(a.parameters for a in {a for p in [*group, *more] for a in p.models})
        if group and (len(group) + len(more) > BATCH_PROBES or size_bytes > BATCH_BYTES):
            yield tuple(group)
            group = []
        group += more
    if group:
        yield tuple(group)
