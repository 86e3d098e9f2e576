"""Reference probes: what a slow moment of the machine adds, taken out again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from merino_edge.latency.measurement import SHARES, WHOLE, Measurement


def visits_by_key(lines: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Lines that measured the same, together, in the order of the first."""
    found: dict[str, list[Measurement]] = {}
    for m in lines:
        found.setdefault(m.key, []).append(m)
    return found


def usual_yardsticks_ms(measurements: Iterable[Measurement]) -> dict[str, float]:
    """What each kind took in the middle of all the measuring."""
    seen: dict[str, list[float]] = {}
    for m in measurements:
        for kind, ms in m.yardsticks.items():
            seen.setdefault(kind, []).append(ms)
    return {kind: statistics.median(values) for kind, values in seen.items()}


class Yardsticks:
    """How many times slower than usual the machine was, as far as yardsticks tell.

    A part is as slow as the yardstick of its kind. A whole model finds some of itself in the caches, and how much no
    one knows beforehand: of the shares that a cold yardstick can have in it (`SHARES`), the one counts by which the
    visits to the same models agree best.
    """

    def __init__(self, lines: Iterable[Measurement]) -> None:
        lines = list(lines)
        self.usual_ms = usual_yardsticks_ms(lines)
        wholes = (m for m in lines if m.what in WHOLE and m.mode == "decode" and len(m.yardsticks) > 1 and not m.failed)
        repeated = [visits for visits in visits_by_key(wholes).values() if len(visits) > 1]
        self.cold_share = min(SHARES, key=lambda share: self._scatter(repeated, share)) if repeated else SHARES[0]

    def slowness(self, m: Measurement) -> float:
        return self._slowness(m, self.cold_share)

    def weigh(self, ratios: Mapping[str, float]) -> float:
        """One figure of how many times slower each kind of yardstick was."""
        return _weighed(ratios, self.cold_share)

    def _slowness(self, m: Measurement, cold_share: float) -> float:
        return _weighed({kind: ms / self.usual_ms[kind] for kind, ms in m.yardsticks.items()}, cold_share)

    def _scatter(self, repeated: Iterable[Sequence[Measurement]], cold_share: float) -> float:
        """Mean difference of a visit from its model's others, as a ratio."""
        differences: list[float] = []
        for visits in repeated:
            times = [math.log(max(1e-9, statistics.median(m.samples)) / self._slowness(m, cold_share)) for m in visits]
            differences += [abs(time - statistics.median(times)) for time in times]
        return statistics.fmean(differences)


def _weighed(ratios: Mapping[str, float], cold_share: float) -> float:
    if len(ratios) < 2:
        return math.prod(ratios.values())
    shares = {kind: cold_share if kind == "decode cold" else 1 - cold_share for kind in ratios}
    return math.exp(sum(shares[kind] * math.log(ratio) for kind, ratio in ratios.items()))


def merge_visits(lines: Iterable[Measurement]) -> list[Measurement]:
    """One entry of all the times that something was measured, in the order of the first; failed if it failed once."""
    lines = list(lines)
    yardsticks = Yardsticks(lines)
    visits = visits_by_key(replace(m, slowness=yardsticks.slowness(m)) for m in lines)
    return [_merged(found, yardsticks.usual_ms) if len(found) > 1 else found[0] for found in visits.values()]


def _merged(visits: list[Measurement], usual_ms: Mapping[str, float]) -> Measurement:
    """With the machine's slowness taken out of every sample: the first visit may have found it slower than the last."""
    for m in visits:
        if m.failed:
            return m
    energies = [m.energy_mj for m in visits if m.energy_mj is not None]
    return replace(
        visits[0],
        samples=tuple(sample / m.slowness for m in visits for sample in m.samples),
        energy_mj=statistics.fmean(energies) if energies else None,
        yardsticks={kind: usual_ms[kind] for kind in visits[0].yardsticks},
        visit=0,
        slowness=1.0,
    )
