"""Transfer: the table of a machine on which a tenth of the entries were measured, by a full table of another one.

The two machines differ by a factor that changes slowly: with the kind of entry, with its size, with the length. The
logarithm of that factor is taken for a Gaussian process. Its covariance is a sum. All entries share a constant, and so
do those of a mode and of a kind. Lines over size and length are added, and a smooth rest among entries of a kind that
are alike. Each part's size is a constant below, chosen before any pair of tables was looked at.

Entries to measure are chosen one by one: always the one that leaves the least uncertainty over the whole table. The
choice needs no measurement on the new machine. Calibration models are entries too, so the step-time model is fitted to
all of them. Held-out models are never transferred. This module knows no clock and no file.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import replace

import numpy as np
from numpy.typing import NDArray

from merino_edge.errors import InputError
from merino_edge.latency.measurement import Measurement, relative_half_width_percent
from merino_edge.latency.table import LatencyTable

DEFAULT_SHARE = 0.1
FEWEST = 8  # entries that are measured at least: fewer cannot tell the kinds apart
ENTRY_KINDS = ("layer", "repeat", "width_change", "end", "calibration")

# Standard deviations of the parts of the log factor.
EVERYWHERE, BY_MODE, BY_KIND, BY_CACHE, BY_FFN = 2.0, 0.7, 0.3, 0.3, 0.1
PER_SIZE, PER_LENGTH, PER_RATIO = 0.15, 0.1, 0.05  # for each unit of a natural logarithm, within a mode
PER_KIND_SIZE = 0.1  # the same within a kind
REST, REACH = 0.08, 1.0  # the smooth rest within a kind, and how far apart in logarithms entries are alike
NOISE = 0.02  # of a measurement whose samples say nothing
# Added to it: the one that is likeliest by what was measured. Samples of one moment agree better than the machine does.
FURTHER_NOISE = (0.0, 0.05, 0.1, 0.2, 0.4)
WEIGHTS = {"width_change": 0.3}  # how much an entry's uncertainty counts, beside 1: it is a small part of a model

Floats = NDArray[np.float64]


def entries(table: LatencyTable) -> list[Measurement]:
    """What can be transferred: the parts, and the calibration models."""
    return [m for m in table.measurements if m.what in ENTRY_KINDS and not m.failed]


def chosen_entries(table: LatencyTable, share: float = DEFAULT_SHARE) -> list[Measurement]:
    """The entries of a full table to measure on another machine, the most informative first."""
    source = [m for m in entries(table) if m.median_ms > 0]
    if len(source) < FEWEST:
        raise InputError(f"{table.path} has only {len(source)} entries to transfer", "give the table of a full profile")
    covariance = _covariance(source, source)
    weights = np.array([WEIGHTS.get(m.what, 1.0) for m in source])
    chosen: list[int] = []
    for _ in range(min(len(source), max(FEWEST, round(share * len(entries(table)))))):
        variance = np.diag(covariance)
        gain = (weights[:, None] * covariance**2).sum(0) / (variance + NOISE**2)
        gain[chosen] = -1.0
        best = int(gain.argmax())
        chosen.append(best)
        covariance = covariance - np.outer(covariance[:, best], covariance[best]) / (variance[best] + NOISE**2)
    return [source[index] for index in chosen]


def transfer(table: LatencyTable, measured: Iterable[Measurement]) -> list[Measurement]:
    """The entries of the full `table` that are not in `measured`, as they would be on the machine of `measured`.

    A shape that this machine could not run has no time there.
    Raises InputError where the two share no entry, or none of a mode that the table has.
    """
    here = [m for m in measured if m.what in ENTRY_KINDS and not m.transferred]
    known, failed = {m.key: m for m in here if not m.failed}, {m.key for m in here if m.failed}
    source = entries(table)
    pairs = [(m, known[m.key]) for m in source if m.key in known]
    pairs = [(one, other) for one, other in pairs if one.median_ms > 0 and other.median_ms > 0]
    for mode in sorted({m.mode for m in source} - {one.mode for one, _ in pairs}):
        raise InputError(
            f"{table.path} and what was measured share no entry in {mode}",
            "measure it as the table says: merino-edge profile --like TABLE",
        )
    observed = [one for one, _ in pairs]
    log_ratios = np.array([math.log(other.median_ms / one.median_ms) for one, other in pairs])
    noise = np.array([_noise(other) ** 2 + (_noise(one) ** 2 - NOISE**2) for one, other in pairs])
    wanted = [m for m in source if m.key not in known and m.key not in failed]
    alike, across = _covariance(observed, observed), _covariance(wanted, observed)
    tried = [alike + np.diag(noise + further**2) for further in FURTHER_NOISE]
    among = max(tried, key=lambda covariance: _log_likelihood(covariance, log_ratios))
    factors = np.exp(across @ np.linalg.solve(among, log_ratios))
    return [
        replace(m, samples=(m.median_ms * factor,), energy_mj=None, reference_ms={}, slowness=1.0, transferred=True)
        for m, factor in zip(wanted, factors.tolist(), strict=True)
    ]


def _log_likelihood(covariance: Floats, values: Floats) -> float:
    """Of `values` that are normally distributed, but for a constant."""
    return -0.5 * float(values @ np.linalg.solve(covariance, values) + np.linalg.slogdet(covariance)[1])


def _noise(m: Measurement) -> float:
    """The standard deviation of the logarithm of a median."""
    half_width = relative_half_width_percent(m.samples) / 100 if len(m.samples) > 2 else 0.0
    return math.hypot(NOISE, min(1.0, half_width / 1.96))


def _covariance(rows: Sequence[Measurement], columns: Sequence[Measurement]) -> Floats:
    """The covariance [R, C] of the log factors of entries."""
    (row_kinds, row_logs), (column_kinds, column_logs) = _features(rows), _features(columns)

    def same(*fields: int) -> Floats:
        equal = [row_kinds[:, None, field] == column_kinds[None, :, field] for field in fields]
        return np.asarray(np.logical_and.reduce(equal), np.float64)

    size, length, ratio = (np.multiply.outer(row_logs[:, i], column_logs[:, i]) for i in range(3))
    apart = np.square(row_logs[:, None] - column_logs[None]).sum(-1)
    mode, cache, kind = same(1), same(1, 2), same(0, 1, 2)
    by_mode = BY_MODE**2 + PER_SIZE**2 * size + PER_LENGTH**2 * length + PER_RATIO**2 * ratio
    by_kind = BY_KIND**2 + PER_KIND_SIZE**2 * size + REST**2 * np.exp(-apart / (2 * REACH**2))
    return np.asarray(EVERYWHERE**2 + mode * by_mode + BY_CACHE**2 * cache + kind * by_kind + BY_FFN**2 * same(1, 3))


def _features(lines: Sequence[Measurement]) -> tuple[NDArray[np.str_], Floats]:
    """What entries are [N, 4] (kind, mode, cache, FFN), and logarithms [N, 3] of size, length and FFN ratio.

    The size is the time on the other machine. It is taken from the middle of a usual range, so that a line over sizes
    says little about the middle.
    """
    kinds = [(m.what, m.mode, m.cache, str(m.shape.get("ffn", ""))) for m in lines]
    logs = []
    for m in lines:
        size = m.median_ms / (m.length if m.mode == "prefill" else 1)
        ratio = m.shape["ffn_width"] / m.shape["width"] if "ffn_width" in m.shape else 1.0
        logs.append((math.log(max(size, 1e-6)) + 3.0, math.log(m.length / 256), math.log(ratio)))
    return np.array(kinds).reshape(-1, 4), np.array(logs, np.float64).reshape(-1, 3)
