"""Validation: how far a latency table's predictions are from held-out whole models measured on the same device.

The models are drawn from the space, and no entry was made from them. Errors are relative to the measured time, in
percent. Kendall's tau-b says whether the table ranks models as the device does. The distance between repetitions of one
model says which part of an error is the machine's.
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

INTERVAL = 0.9  # the share of held-out models within the table's error bar


def predictions(table: LatencyTable, mode: Mode) -> list[tuple[float, float]]:
    """(predicted ms, measured ms) of every held-out model that the table can predict."""
    pairs = []
    for m, a in _models(table, "model", mode):
        with contextlib.suppress(InputError):  # a shape in it could not be run
            pairs.append((table.model_ms(a, mode, m.length), m.median_ms))
    return pairs


def fit_step_time(table: LatencyTable) -> StepTimeModel | None:
    """The step-time model fitted to the table's calibration models; None where it has none."""
    caches = {m.cache for m in table.measurements if m.mode == "decode" and m.what == "layer"}
    models = []
    for m, a in _models(table, "calibration", "decode"):
        with contextlib.suppress(InputError):
            models.append((table.sums(a, m.length), m.median_ms))
    return fit(models, warm="warm" in caches, cold="cold" in caches) if models else None


def _models(table: LatencyTable, what: What, mode: Mode) -> list[tuple[Measurement, Architecture]]:
    lines = [m for m in table.measurements if m.what == what and m.mode == mode and not m.failed]
    return [(m, Architecture.from_dict(m.shape["architecture"])) for m in lines]


def validate(table: LatencyTable) -> dict[str, dict[str, Any]]:
    """The body of the table's validation line, by mode: `error_figures` and "visits_apart_percent".

    A mode without a model to compare has {}.
    """
    pairs = {mode: predictions(table, mode) for mode in MODES}
    return {
        mode: {**error_figures(found), "visits_apart_percent": repeatability_percent(table.lines, mode)}
        if found
        else {}
        for mode, found in pairs.items()
    }


def repeatability_percent(lines: Sequence[Measurement], mode: Mode) -> float | None:
    """The mean distance of a drift-corrected repetition from the median of its model's repetitions.

    None where no model was measured twice.
    """
    drift = DriftCorrection(lines)
    models = (m for m in lines if m.what == "model" and m.mode == mode and not m.failed)
    apart: list[float] = []
    for repetitions in repetitions_by_key(models).values():
        if len(repetitions) > 1:
            times = [statistics.median(m.samples) / drift.slowness(m) for m in repetitions]
            apart += [abs(ms / statistics.median(times) - 1) for ms in times]
    return 100 * statistics.fmean(apart) if apart else None


def error_figures(pairs: Sequence[tuple[float, float]]) -> dict[str, Any]:
    """The errors of pairs (predicted, measured) as a JSON object.

        {"models", "mape_percent", "p95_percent", "max_percent", "bias_percent", "kendall_tau", "low_percent",
         "high_percent"}

    "p95_percent" is the nearest rank. "low_percent" and "high_percent" bound nine of ten measured times around the
    prediction; they are None where predictions of 0 or less leave no such bound.
    """
    signed = [100 * (predicted / measured - 1) for predicted, measured in pairs]
    # On a very busy machine a prediction can be 0 or less, and then no share of it bounds the measured time.
    beside = sorted(100 * (measured / predicted - 1) if predicted > 0 else math.inf for predicted, measured in pairs)
    outside = math.floor((1 - INTERVAL) / 2 * len(pairs))  # on either side
    low, high = beside[outside], beside[-1 - outside]
    bounded = math.isfinite(low) and math.isfinite(high)
    errors = sorted(map(abs, signed))
    return {
        "models": len(pairs),
        "mape_percent": statistics.fmean(errors),
        "p95_percent": errors[math.ceil(0.95 * len(errors)) - 1],
        "max_percent": errors[-1],
        "bias_percent": statistics.fmean(signed),
        "kendall_tau": kendall_tau(pairs),
        "low_percent": low if bounded else None,
        "high_percent": high if bounded else None,
    }
