"""Two latency tables side by side: how much faster one is, entry by entry, and whether they may be compared at all.

Only entries of the same shape, mode, length and state of the caches count. A ratio is the second table's median over
the first's; how much of it is the machine being slower that day, the reference_ms tell; what is noise and what is not
follows from the entries' own bootstrap intervals.
"""

from __future__ import annotations

import statistics
from dataclasses import replace
from typing import Any

from merino_edge.errors import InputError
from merino_edge.jetson.device import card
from merino_edge.latency.drift import DriftCorrection, usual_reference_ms
from merino_edge.latency.measurement import Measurement
from merino_edge.latency.table import LatencyTable

Pairs = list[tuple[Measurement, Measurement]]

CONDITIONS = ("backend", "precision", "threads", "contention_share", "libraries", "estimated")


def compare(first: LatencyTable, second: LatencyTable) -> dict[str, Any]:
    """{"entries", "median_apart_percent" (median over entries of how far apart the two are), "apart": entries whose
    intervals do not overlap, "different": [what else differs], "kinds": {"layer decode": {"entries", "ratio":
    {"median", "low", "high" (quartiles)}, "median_apart_percent"}}, "yardsticks": {kind: how much slower the machine
    itself was the second time}, "median_apart_from_yardsticks_percent": what is left when that is taken out, or null}.
    Raises InputError where they share no entry."""
    known = {m.key: m for m in first.measurements if not m.failed}
    pairs = [(known[m.key], m) for m in second.measurements if m.key in known and not m.failed]
    pairs = [(one, other) for one, other in pairs if one.median_ms > 0 and other.median_ms > 0]
    if not pairs:
        raise InputError(
            f"{first.path} and {second.path} share no entry", "profile both with the same --space, --lengths, --minutes"
        )
    kinds: dict[str, Pairs] = {}
    for one, other in pairs:
        kinds.setdefault(f"{one.what} {one.mode}{' cold' if one.cache == 'cold' else ''}", []).append((one, other))
    return {
        "entries": len(pairs),
        "median_apart_percent": _apart_percent(pairs),
        "apart": sum(_separate(one, other) for one, other in pairs),
        "different": _different(first, second),
        "kinds": {kind: _figures(found) for kind, found in sorted(kinds.items())},
        **_beside_yardsticks(first, second, pairs),
    }


def _beside_yardsticks(first: LatencyTable, second: LatencyTable, pairs: Pairs) -> dict[str, Any]:
    mine, theirs = (usual_reference_ms(table.measurements) for table in (first, second))
    ratios = {kind: theirs[kind] / mine[kind] for kind in sorted(mine.keys() & theirs.keys())}
    if not ratios or _different(first, second):
        return {"yardsticks": ratios, "median_apart_from_yardsticks_percent": None}

    reference_ms = DriftCorrection([*first.lines, *second.lines])

    def evened(m: Measurement) -> Measurement:
        slower = reference_ms.weigh({kind: ratios[kind] for kind in m.reference_ms if kind in ratios})
        return replace(m, slowness=m.slowness * slower)

    found = _apart_percent([(one, evened(other)) for one, other in pairs])
    return {"yardsticks": ratios, "median_apart_from_yardsticks_percent": found}


def _figures(pairs: Pairs) -> dict[str, Any]:
    ratios = sorted(other.median_ms / one.median_ms for one, other in pairs)
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    ratio = {"median": statistics.median(ratios), "low": quartiles[0], "high": quartiles[2]}
    return {"entries": len(pairs), "ratio": ratio, "median_apart_percent": _apart_percent(pairs)}


def _apart_percent(pairs: Pairs) -> float:
    """The difference as a share of the mean of the two, so that it does not matter which comes first."""
    return statistics.median(
        200 * abs(other.median_ms - one.median_ms) / (other.median_ms + one.median_ms) for one, other in pairs
    )


def _separate(one: Measurement, other: Measurement) -> bool:
    (low, high), (other_low, other_high) = one.interval_ms, other.interval_ms
    return high < other_low or other_high < low


def _different(first: LatencyTable, second: LatencyTable) -> list[str]:
    found = card.differences(first.header["device"], second.header["device"])
    for name in CONDITIONS:
        mine, theirs = first.header.get(name), second.header.get(name)
        if mine != theirs:
            found.append(f"{name}: {mine}, {theirs}")
    return found
