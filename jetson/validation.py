"""How far a latency table's sums are from whole models measured on the same device.

The models are drawn from the space and no entry was made from them. Errors are relative to what was measured,
in percent; Kendall's tau (tau-b) says whether the table ranks models as the device does.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from merino_edge.architecture import Architecture
from merino_edge.latency_table import LatencyTable
from merino_edge.measurement import MODES, Mode


def predictions(table: LatencyTable, mode: Mode) -> list[tuple[float, float]]:
    """(predicted ms, measured ms) of every whole model in the table."""
    models = [m for m in table.measurements if m.what == "model" and m.mode == mode]
    built = [(m, Architecture.from_dict(m.shape["architecture"])) for m in models]
    return [(table.model_ms(a, mode, m.length), m.median_ms) for m, a in built]


def validate(table: LatencyTable) -> dict[str, dict[str, Any]]:
    """The figures of the table's validation line, for decode and prefill."""
    return {mode: figures(predictions(table, mode)) for mode in MODES}


def figures(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """{"models", "mape_percent", "p95_percent" (nearest rank), "max_percent", "bias_percent", "kendall_tau"}"""
    signed = [100 * (predicted / measured - 1) for predicted, measured in pairs]
    errors = sorted(map(abs, signed))
    return {
        "models": len(pairs),
        "mape_percent": statistics.fmean(errors),
        "p95_percent": errors[math.ceil(0.95 * len(errors)) - 1],
        "max_percent": errors[-1],
        "bias_percent": statistics.fmean(signed),
        "kendall_tau": kendall_tau(pairs),
    }


def kendall_tau(pairs: Sequence[tuple[float, float]]) -> float | None:
    """Kendall's tau-b of two rankings; None where either is all ties."""
    concordance, untied = 0, [0, 0]
    for (x1, y1), (x2, y2) in combinations(pairs, 2):
        x_order, y_order = (x1 > x2) - (x1 < x2), (y1 > y2) - (y1 < y2)
        concordance += x_order * y_order
        untied[0] += x_order != 0
        untied[1] += y_order != 0
    return concordance / math.sqrt(math.prod(untied)) if all(untied) else None
