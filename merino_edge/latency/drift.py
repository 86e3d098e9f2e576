"""Drift correction: it divides measurements by how slow the machine was while they were taken.

The profiler times a small reference model beside every batch. Its time, over its median of the whole profile, says how
slow the machine was. This module knows no clock and no file.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from merino_edge.latency.measurement import WHOLE, Measurement

# Shares of the cold reference model in a whole model that are tried. The first is taken where nothing tells.
COLD_SHARES = (0.5, 0.0, 0.25, 0.75, 1.0)


def repetitions_by_key(lines: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Lines grouped by what they measured, in the order of the first."""
    groups: dict[str, list[Measurement]] = {}
    for m in lines:
        groups.setdefault(m.key, []).append(m)
    return groups


def usual_reference_ms(measurements: Iterable[Measurement]) -> dict[str, float]:
    """The median time [ms] of the reference model over a profile, by kind of step."""
    seen: dict[str, list[float]] = {}
    for m in measurements:
        for kind, ms in m.reference_ms.items():
            seen.setdefault(kind, []).append(ms)
    return {kind: statistics.median(values) for kind, values in seen.items()}


class DriftCorrection:
    """How many times slower than usual the machine was, by the reference model's times.

    A part is as slow as the reference model in steps of its kind. A whole model finds an unknown share of its weights
    in the processor's caches. So every share of COLD_SHARES is tried, and the one counts by which the repetitions of
    the same models agree best.
    """

    def __init__(self, lines: Iterable[Measurement]) -> None:
        lines = list(lines)
        self.usual_ms = usual_reference_ms(lines)
        wholes = (
            m for m in lines if m.what in WHOLE and m.mode == "decode" and len(m.reference_ms) > 1 and not m.failed
        )
        repeated = [group for group in repetitions_by_key(wholes).values() if len(group) > 1]
        self.cold_share = COLD_SHARES[0]
        if repeated:
            self.cold_share = min(COLD_SHARES, key=lambda share: self._scatter(repeated, share))

    def slowness(self, m: Measurement) -> float:
        """How many times slower than usual the machine was while `m` was measured."""
        return self._slowness(m, self.cold_share)

    def weigh(self, ratios: Mapping[str, float]) -> float:
        """One slowness of the reference model's `ratios` to its usual time, by kind of step."""
        return _weighed(ratios, self.cold_share)

    def _slowness(self, m: Measurement, cold_share: float) -> float:
        return _weighed({kind: ms / self.usual_ms[kind] for kind, ms in m.reference_ms.items()}, cold_share)

    def _scatter(self, repeated: Iterable[Sequence[Measurement]], cold_share: float) -> float:
        """The mean absolute difference of log times from the median of their model."""
        differences: list[float] = []
        for group in repeated:
            logs = [math.log(max(1e-9, statistics.median(m.samples)) / self._slowness(m, cold_share)) for m in group]
            differences += [abs(log - statistics.median(logs)) for log in logs]
        return statistics.fmean(differences)


def _weighed(ratios: Mapping[str, float], cold_share: float) -> float:
    if len(ratios) < 2:
        return math.prod(ratios.values())
    shares = {kind: cold_share if kind == "decode cold" else 1 - cold_share for kind in ratios}
    return math.exp(sum(shares[kind] * math.log(ratio) for kind, ratio in ratios.items()))


def merge_repetitions(lines: Iterable[Measurement]) -> list[Measurement]:
    """One drift-corrected entry for each thing measured, in the order of the first repetitions.

    An entry has failed if one of its repetitions failed.
    """
    lines = list(lines)
    drift = DriftCorrection(lines)
    groups = repetitions_by_key(replace(m, slowness=drift.slowness(m)) for m in lines)
    return [_merged(group, drift.usual_ms) if len(group) > 1 else group[0] for group in groups.values()]


def _merged(repetitions: list[Measurement], usual_ms: Mapping[str, float]) -> Measurement:
    """One entry of all samples, each divided by the slowness of its own repetition."""
    for m in repetitions:
        if m.failed:
            return m
    energies = [m.energy_mj for m in repetitions if m.energy_mj is not None]
    return replace(
        repetitions[0],
        samples=tuple(sample / m.slowness for m in repetitions for sample in m.samples),
        energy_mj=statistics.fmean(energies) if energies else None,
        reference_ms={kind: usual_ms[kind] for kind in repetitions[0].reference_ms},
        repetition=0,
        slowness=1.0,
    )
