"""Reference probes: what a slow moment of the machine adds, taken out again."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

from merino_edge.latency.measurement import SHARES, WHOLE, Measurement


def repetitions_by_key(lines: Iterable[Measurement]) -> dict[str, list[Measurement]]:
    """Lines that measured the same, together, in the order of the first."""
    found: dict[str, list[Measurement]] = {}
    for m in lines:
        found.setdefault(m.key, []).append(m)
    return found


def usual_reference_ms(measurements: Iterable[Measurement]) -> dict[str, float]:
    """What each kind took in the middle of all the measuring."""
    seen: dict[str, list[float]] = {}
    for m in measurements:
        for kind, ms in m.reference_ms.items():
            seen.setdefault(kind, []).append(ms)
    return {kind: statistics.median(values) for kind, values in seen.items()}


class DriftCorrection:
    """How many times slower than usual the machine was, as far as reference_ms tell.

    A part is as slow as the reference_model of its kind. A whole model finds some of itself in the caches, and how much no
    one knows beforehand: of the shares that a cold reference_model can have in it (`SHARES`), the one counts by which the
    repetitions to the same models agree best.
    """

    def __init__(self, lines: Iterable[Measurement]) -> None:
        lines = list(lines)
        self.usual_ms = usual_reference_ms(lines)
        wholes = (m for m in lines if m.what in WHOLE and m.mode == "decode" and len(m.reference_ms) > 1 and not m.failed)
        repeated = [repetitions for repetitions in repetitions_by_key(wholes).values() if len(repetitions) > 1]
        self.cold_share = min(SHARES, key=lambda share: self._scatter(repeated, share)) if repeated else SHARES[0]

    def slowness(self, m: Measurement) -> float:
        return self._slowness(m, self.cold_share)

    def weigh(self, ratios: Mapping[str, float]) -> float:
        """One figure of how many times slower each kind of reference_model was."""
        return _weighed(ratios, self.cold_share)

    def _slowness(self, m: Measurement, cold_share: float) -> float:
        return _weighed({kind: ms / self.usual_ms[kind] for kind, ms in m.reference_ms.items()}, cold_share)

    def _scatter(self, repeated: Iterable[Sequence[Measurement]], cold_share: float) -> float:
        """Mean difference of a repetition from its model's others, as a ratio."""
        differences: list[float] = []
        for repetitions in repeated:
            times = [math.log(max(1e-9, statistics.median(m.samples)) / self._slowness(m, cold_share)) for m in repetitions]
            differences += [abs(time - statistics.median(times)) for time in times]
        return statistics.fmean(differences)


def _weighed(ratios: Mapping[str, float], cold_share: float) -> float:
    if len(ratios) < 2:
        return math.prod(ratios.values())
    shares = {kind: cold_share if kind == "decode cold" else 1 - cold_share for kind in ratios}
    return math.exp(sum(shares[kind] * math.log(ratio) for kind, ratio in ratios.items()))


def merge_repetitions(lines: Iterable[Measurement]) -> list[Measurement]:
    """One entry of all the times that something was measured, in the order of the first; failed if it failed once."""
    lines = list(lines)
    reference_ms = DriftCorrection(lines)
    repetitions = repetitions_by_key(replace(m, slowness=reference_ms.slowness(m)) for m in lines)
    return [_merged(found, reference_ms.usual_ms) if len(found) > 1 else found[0] for found in repetitions.values()]


def _merged(repetitions: list[Measurement], usual_ms: Mapping[str, float]) -> Measurement:
    """With the machine's slowness taken out of every sample: the first repetition may have found it slower than the last."""
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
