"""Validation: how far a latency table's predictions are from held-out whole models measured on the same device.

The models are drawn from the space, and no entry was made from them. Errors are relative to the measured time, in
percent. Kendall's tau-b says whether the table ranks models as the device does. The distance between repetitions of one
model says which part of an error is the machine's. Models that a search found with the table are compared apart: an
optimum is picked preferably where the table errs low.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.latency.drift import DriftCorrection, repetitions_by_key
from merino_edge.latency.measurement import MODES, Measurement, Mode, What
from merino_edge.latency.step_time import StepTimeModel, fit
from merino_edge.latency.table import LatencyTable
from merino_edge.latency.verdict import judge
from merino_edge.statistics import kendall_tau

INTERVAL = 0.9  # the share of held-out models within the table's error bar
FEWEST_FOUND = 4  # fewer give no error bar of their own
# Student's t below which 95 % lie, for 3 to 30 degrees of freedom.
STUDENT_T = {3: 2.35, 4: 2.13, 5: 2.02, 6: 1.94, 7: 1.89, 8: 1.86, 9: 1.83, 11: 1.80, 14: 1.76, 19: 1.73, 30: 1.70}


def predictions(table: LatencyTable, mode: Mode, what: What = "model") -> list[tuple[float, float]]:
    """(predicted ms, measured ms) of every held-out model that the table can predict, or of the found models."""
    pairs = []
    for m, a in _models(table, what, mode):
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


def fitted(table: LatencyTable) -> LatencyTable:
    """The table with the step-time model that its calibration models give."""
    return table.with_step_time(fit_step_time(table))


def conclusion(
    path: Path, header: dict[str, Any], lines: list[Measurement], conditions: Sequence[dict[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The last lines of a table: the step-time model, the errors against whole models, and the verdict."""
    table = LatencyTable(path, header, lines, {}, "")
    step_time = fit_step_time(table)
    if step_time is not None:
        yield {"what": "faces", "decode": step_time.to_dict()}
    validation = validate(table.with_step_time(step_time))
    yield {"what": "validation", **validation, "verdict": judge(validation, conditions).to_dict()}


def _models(table: LatencyTable, what: What, mode: Mode) -> list[tuple[Measurement, Architecture]]:
    lines = [m for m in table.measurements if m.what == what and m.mode == mode and not m.failed]
    return [(m, Architecture.from_dict(m.shape["architecture"])) for m in lines]


def validate(table: LatencyTable) -> dict[str, dict[str, Any]]:
    """The body of the table's validation line, by mode: `error_figures`, "visits_apart_percent" and "found".

    "found" holds the errors on models that a search found, where there are some. A mode without a model to compare has
    {}.
    """
    validation: dict[str, dict[str, Any]] = {}
    for mode in MODES:
        validation[mode] = {}
        if drawn := predictions(table, mode):
            apart = repeatability_percent(table.lines, mode)
            validation[mode] = {**error_figures(drawn), "visits_apart_percent": apart}
            if len(found := predictions(table, mode, "found")) >= FEWEST_FOUND:
                validation[mode]["found"] = {**error_figures(found), **_next_bounds(found)}
    return validation


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


def _next_bounds(pairs: Sequence[tuple[float, float]]) -> dict[str, float | None]:
    """{"low_percent", "high_percent"}: bounds around a prediction in which nine of ten of the next models lie.

    The least and the largest of few errors hold less of what comes next: 8 of 10 models, if there were 10. So the
    bounds also hold the prediction interval of normally distributed log errors.
    """
    if min(predicted for predicted, _ in pairs) <= 0:
        return {"low_percent": None, "high_percent": None}
    logs = sorted(math.log(measured / predicted) for predicted, measured in pairs)
    outside = math.floor((1 - INTERVAL) / 2 * len(logs))
    t = STUDENT_T[max(df for df in STUDENT_T if df < len(logs))]
    mean, reach = statistics.fmean(logs), t * statistics.stdev(logs) * math.sqrt(1 + 1 / len(logs))
    low, high = min(logs[outside], mean - reach), max(logs[-1 - outside], mean + reach)
    return {"low_percent": 100 * math.expm1(low), "high_percent": 100 * math.expm1(high)}


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
