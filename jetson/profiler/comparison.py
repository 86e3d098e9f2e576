"""The comparison of two latency tables: how much faster one is, entry by entry, and whether they are comparable.

Only entries with the same shape, mode, length and cache state are compared. A ratio is the second table's median over
the first's. The reference model tells which part of it is the machine being slower that day. The entries' own bootstrap
intervals tell which differences are noise.
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
    """The comparison as a JSON object. Raises InputError where the tables share no entry.

        {"entries", "median_apart_percent", "apart", "different": [...],
         "kinds": {"layer decode": {"entries", "ratio": {"median", "low", "high"}, "median_apart_percent"}},
         "yardsticks": {kind: ratio}, "median_apart_from_yardsticks_percent"}

    "apart" counts the entries whose intervals do not overlap. "low" and "high" are quartiles. "yardsticks" holds how
    much slower the reference model was the second time. "median_apart_from_yardsticks_percent" is the difference after
    that correction, or null. "different" names other differences of the tables.
    """
    by_key = {m.key: m for m in first.measurements if not m.failed}
    pairs = [(by_key[m.key], m) for m in second.measurements if m.key in by_key and not m.failed]
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
        "kinds": {kind: _figures(group) for kind, group in sorted(kinds.items())},
        **_drift_corrected(first, second, pairs),
    }


def _drift_corrected(first: LatencyTable, second: LatencyTable, pairs: Pairs) -> dict[str, Any]:
    one_ms, other_ms = (usual_reference_ms(table.measurements) for table in (first, second))
    ratios = {kind: other_ms[kind] / one_ms[kind] for kind in sorted(one_ms.keys() & other_ms.keys())}
    if not ratios or _different(first, second):
        return {"yardsticks": ratios, "median_apart_from_yardsticks_percent": None}

    drift = DriftCorrection([*first.lines, *second.lines])

    def corrected(m: Measurement) -> Measurement:
        slower = drift.weigh({kind: ratios[kind] for kind in m.reference_ms if kind in ratios})
        return replace(m, slowness=m.slowness * slower)

    apart = _apart_percent([(one, corrected(other)) for one, other in pairs])
    return {"yardsticks": ratios, "median_apart_from_yardsticks_percent": apart}


def _figures(pairs: Pairs) -> dict[str, Any]:
    ratios = sorted(other.median_ms / one.median_ms for one, other in pairs)
    quartiles = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else ratios * 3
    ratio = {"median": statistics.median(ratios), "low": quartiles[0], "high": quartiles[2]}
    return {"entries": len(pairs), "ratio": ratio, "median_apart_percent": _apart_percent(pairs)}


def _apart_percent(pairs: Pairs) -> float:
    """The median difference in percent of the mean of the two, so that their order does not matter."""
    return statistics.median(
        200 * abs(other.median_ms - one.median_ms) / (other.median_ms + one.median_ms) for one, other in pairs
    )


def _separate(one: Measurement, other: Measurement) -> bool:
    """Whether the intervals of two entries do not overlap."""
    (low, high), (other_low, other_high) = one.interval_ms, other.interval_ms
    return high < other_low or other_high < low


def _different(first: LatencyTable, second: LatencyTable) -> list[str]:
    """The differences of machine and conditions, a line each."""
    lines = card.differences(*(table.header.get("device", {}) for table in (first, second)))
    for name in CONDITIONS:
        one, other = first.header.get(name), second.header.get(name)
        if one != other:
            lines.append(f"{name}: {one}, {other}")
    return lines
