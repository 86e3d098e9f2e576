"""How far a latency table's sums are from whole models measured on the same device.

The models are drawn from the space and no entry was made from them. Errors are relative to what was measured,
in percent; Kendall's tau (tau-b) says whether the table ranks models as the device does. How far the repetitions to one
model are apart says what of an error is the machine's: no table follows a model that does not repeat itself.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Sequence
from typing import Any

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.latency.drift import DriftCorrection, repetitions_by_key
from merino_edge.latency.measurement import MODES, Measurement, Mode, What
from merino_edge.latency.step_time import StepTimeModel, fit
from merino_edge.latency.table import LatencyTable
from merino_edge.statistics import kendall_tau

INTERVAL = 0.9  # of the held-out models lie within the table's interval


def predictions(table: LatencyTable, mode: Mode) -> list[tuple[float, float]]:
    """(predicted ms, measured ms) of every whole model in the table that it can answer for."""
    found = []
    for m, a in _models(table, "model", mode):
        with contextlib.suppress(InputError):  # a shape in it could not be run
            found.append((table.model_ms(a, mode, m.length), m.median_ms))
    return found


def fit_step_time(table: LatencyTable) -> StepTimeModel | None:
    """How the table's decode sums become times, from its calibration models; None where it has no such model, and sums
    are times."""
    caches = {m.cache for m in table.measurements if m.mode == "decode" and m.what == "layer"}
    found = []
    for m, a in _models(table, "calibration", "decode"):
        with contextlib.suppress(InputError):
            found.append((table.sums(a, m.length), m.median_ms))
    return fit(found, warm="warm" in caches, cold="cold" in caches) if found else None


def _models(table: LatencyTable, what: What, mode: Mode) -> list[tuple[Measurement, Architecture]]:
    found = [m for m in table.measurements if m.what == what and m.mode == mode and not m.failed]
    return [(m, Architecture.from_dict(m.shape["architecture"])) for m in found]


def validate(table: LatencyTable) -> dict[str, dict[str, Any]]:
    """The figures of the table's validation line, for decode and prefill, and "visits_apart_percent"; none of a mode
    with no model to compare."""
    pairs = {mode: predictions(table, mode) for mode in MODES}
    return {
        mode: {**figures(found), "visits_apart_percent": repeatability_percent(table.lines, mode)} if found else {}
        for mode, found in pairs.items()
    }


def repeatability_percent(lines: Sequence[Measurement], mode: Mode) -> float | None:
    """Mean distance of a repetition to a whole model from the median of its repetitions, the machine's slowness taken out of
    each; None where no model was visited twice."""
    reference_ms = DriftCorrection(lines)
    models = (m for m in lines if m.what == "model" and m.mode == mode and not m.failed)
    apart: list[float] = []
    for repetitions in repetitions_by_key(models).values():
        if len(repetitions) > 1:
            times = [statistics.median(m.samples) / reference_ms.slowness(m) for m in repetitions]
            apart += [abs(ms / statistics.median(times) - 1) for ms in times]
    return 100 * statistics.fmean(apart) if apart else None


def figures(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """{"models", "mape_percent", "p95_percent" (nearest rank), "max_percent", "bias_percent", "kendall_tau",
    "low_percent", "high_percent"}: the last two, of what was predicted, bound nine of ten measured times."""
    signed = [100 * (predicted / measured - 1) for predicted, measured in pairs]
    beside = sorted(100 * (measured / predicted - 1) for predicted, measured in pairs)
    outside = math.floor((1 - INTERVAL) / 2 * len(pairs))  # on either side
    errors = sorted(map(abs, signed))
    return {
        "models": len(pairs),
        "mape_percent": statistics.fmean(errors),
        "p95_percent": errors[math.ceil(0.95 * len(errors)) - 1],
        "max_percent": errors[-1],
        "bias_percent": statistics.fmean(signed),
        "kendall_tau": kendall_tau(pairs),
        "low_percent": beside[outside],
        "high_percent": beside[-1 - outside],
    }
