"""One line of a latency table: what one part of a model costs on one device, in time and, where it was read, energy.

    {"what": "layer", "mode": "decode", "length": 256, "ffn": "relu", "width": 64, "heads": 1, "kv_heads": 1,
     "ffn_width": 128, "cache": "cold", "unit": "ms", "median": 0.021, "interval": [0.020, 0.022],
     "spread_percent": 1.2, "unstable": false, "samples": [...], "yardsticks": {"decode cold": 0.31},
     "energy_mj": 0.08, "sha256": ...}

`length` of a decode step counts the places of the cache that it reads, of a prefill the prompt's tokens. `cache` says
that the processor's caches were swept before each step; left out, the step ran in a loop. `interval` is a bootstrap
interval of the median. `yardsticks` [ms] are what fixed small models took beside it, by kind of step, so that a machine
that was slower just then can be told from a slower part. `energy_mj` is left out where no power rail could be read. A
shape that could not be run has `"failed": REASON` and no samples. Which kinds of line there are, and how they sum to a
model, stands in `merino_edge.latency_table`; this module knows neither the sum nor the file.
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, get_args

import numpy as np

from merino_edge import artefact, limits
from merino_edge.errors import ArtefactError

MAX_DOUBT_PERCENT = 2.5  # an entry whose median is known less well is flagged unstable
RESAMPLES = 400  # of a bootstrap
CONFIDENCE = 0.95
SHARES = (0.5, 0.0, 0.25, 0.75, 1.0)  # of the cold yardstick in a whole model; the first where nothing tells

Mode = Literal["decode", "prefill"]
What = Literal["layer", "repeat", "width_change", "end", "calibration", "model"]
Cache = Literal["warm", "cold"]
MODES: tuple[Mode, ...] = get_args(Mode)

# The columns of each kind of line, beside what, mode and length.
COLUMNS: dict[str, tuple[str, ...]] = {
    "layer": ("ffn", "width", "heads", "kv_heads", "ffn_width"),
    "repeat": ("ffn", "width", "heads", "kv_heads", "ffn_width"),
    "width_change": ("before", "after"),
    "end": ("vocab_size", "embedding_width"),
    "calibration": ("architecture",),
    "model": ("architecture",),
}
WHOLE = ("calibration", "model")  # whole models, no part of any sum
NOT_NUMBERS = ("ffn", "architecture")

Point = tuple[float, ...]


def spread_percent(samples: Sequence[float]) -> float:
    """Robust coefficient of variation in percent: 1.4826 * MAD / median."""
    median = statistics.median(samples)
    deviation = 1.4826 * statistics.median(abs(sample - median) for sample in samples)
    return 100 * deviation / median if median > 0 else (0.0 if deviation == 0 else math.inf)


def bootstrap_interval(samples: Sequence[float]) -> tuple[float, float]:
    """Between which bounds the median lies with CONFIDENCE, by resampling; the same for the same samples."""
    drawn = np.random.default_rng(0).integers(len(samples), size=(RESAMPLES, len(samples)))
    medians = np.median(np.asarray(samples)[drawn], axis=1)
    low, high = np.quantile(medians, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
    return float(low), float(high)


def doubt_percent(samples: Sequence[float]) -> float:
    """Half of `bootstrap_interval`, in percent of the median."""
    low, high = bootstrap_interval(samples)
    median = statistics.median(samples)
    return 50 * (high - low) / median if median > 0 else (0.0 if high == low else math.inf)


def layer_point(length: int, width: int, heads: int, kv_heads: int, ffn_width: int) -> Point:
    """Where a layer stands on its grid: length, width squared (weights grow so), FFN width over width, and how far
    its key-value heads go from one (0) to one per query head (1), which a single head counts as."""
    kv_share = (kv_heads - 1) / (heads - 1) if heads > 1 else 1.0
    return length, width**2, ffn_width / width, kv_share


@dataclass(frozen=True)
class Measurement:
    """One line. `shape` holds the columns of its kind; `samples` [ms], one per round of measuring."""

    what: What
    mode: Mode
    length: int
    shape: Mapping[str, Any]
    samples: tuple[float, ...]
    energy_mj: float | None = None
    cache: Cache = "warm"
    failed: str = ""  # why there are no samples
    yardsticks: Mapping[str, float] = field(default_factory=dict)  # [ms], by kind of step
    visit: int = 0  # whole models are measured several times over a profile, each time a line
    slowness: float = field(default=1.0, compare=False)  # of the machine while it was measured (`Yardsticks`)

    @property
    def median_ms(self) -> float:
        """The median round, the machine's slowness taken out. A part too small for the clock can come out below zero,
        and then counts as free."""
        return max(0.0, statistics.median(self.samples)) / self.slowness

    @property
    def interval_ms(self) -> tuple[float, float]:
        """Of the median."""
        low, high = bootstrap_interval(self.samples)
        return low / self.slowness, high / self.slowness

    @property
    def unstable(self) -> bool:
        """Whether rounds differ too much, or are too few, for the median to be trusted."""
        return len(self.samples) > 1 and not doubt_percent(self.samples) <= MAX_DOUBT_PERCENT

    @property
    def key(self) -> str:
        """What makes two lines the same measurement."""
        return entry_key(self.what, self.mode, self.length, self.shape, self.cache)

    @property
    def point(self) -> Point:
        """Where on its kind's grid it stands. What a decode step costs outside its layers depends on no length."""
        s = self.shape
        length = () if self.mode == "decode" else (self.length,)
        if self.what == "end":
            return *length, s["vocab_size"], s["embedding_width"]
        if self.what == "width_change":
            return *length, s["before"] * s["after"]
        return layer_point(self.length, s["width"], s["heads"], s["kv_heads"], s["ffn_width"])

    def to_line(self) -> dict[str, Any]:
        line = {"what": self.what, "mode": self.mode, "length": self.length, **self.shape}
        line |= {"visit": self.visit} if self.visit else {}
        if self.cache == "cold":
            line["cache"] = self.cache
        if self.failed:
            return {**line, "failed": self.failed}
        spread = spread_percent(self.samples)
        line |= {
            "unit": "ms",
            "median": max(0.0, statistics.median(self.samples)),
            "interval": list(bootstrap_interval(self.samples)),
            "spread_percent": spread if math.isfinite(spread) else None,
            "unstable": self.unstable,
            "samples": list(self.samples),
        }
        line |= {"yardsticks": dict(self.yardsticks)} if self.yardsticks else {}
        return line if self.energy_mj is None else {**line, "energy_mj": self.energy_mj}

    @staticmethod
    def from_line(line: dict[str, Any], where: str, ffn: str | None = None) -> Measurement:
        """`ffn`: of tables whose layers do not say theirs (schema 1). Raises ArtefactError when a column is missing,
        of another type, or out of bounds."""
        try:
            what, mode, length, failed = line["what"], line["mode"], line["length"], line.get("failed", "")
            visit = line.get("visit", 0)
            line = line if ffn is None else {"ffn": ffn, **line}
            shape = {name: line[name] for name in COLUMNS[what]}
            cache, energy_mj = line.get("cache", "warm"), line.get("energy_mj")
            samples = () if failed else tuple(float(sample) for sample in line["samples"])
            yardsticks = {str(kind): float(ms) for kind, ms in line.get("yardsticks", {}).items()}
            numbers = [length, *(value for name, value in shape.items() if name not in NOT_NUMBERS)]
            if not (
                mode in MODES
                and cache in get_args(Cache)
                and isinstance(failed, str)
                and type(visit) is int
                and (failed or (samples and line["unit"] == "ms"))
                and isinstance(shape.get("ffn", ""), str)
                and all(type(n) is int and 0 < n <= limits.MAX_POSITIONS for n in numbers)
                and all(map(math.isfinite, samples))
                and all(0 < ms < math.inf for ms in yardsticks.values())
                and (energy_mj is None or 0 <= float(energy_mj) < math.inf)
            ):
                raise ValueError
        except (AttributeError, KeyError, TypeError, ValueError):
            raise ArtefactError(f"{where} is not a measurement", "measure again: merino-edge profile") from None
        return Measurement(what, mode, length, shape, samples, energy_mj, cache, failed, yardsticks, visit)


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


def entry_key(what: str, mode: str, length: int, shape: Mapping[str, Any], cache: str) -> str:
    """What two lines that measure the same have in common."""
    return artefact.canonical_json([what, mode, length, dict(shape), cache])


# --- lines -----------------------------------------------------------------------------------------


def seal(body: dict[str, Any]) -> str:
    """A line with its own hash, so that one flipped bit is found."""
    return json.dumps({**body, "sha256": artefact.sha256_text(artefact.canonical_json(body))[:16]}, allow_nan=False)


def unseal(line: str, where: str) -> dict[str, Any]:
    """What `seal` closed. Raises ArtefactError."""
    body = artefact.parse_json(line, where)
    claimed = body.pop("sha256", None) if isinstance(body, dict) else None
    if artefact.sha256_text(artefact.canonical_json(body))[:16] != claimed:
        raise ArtefactError(
            f"{where} does not match its own sha256", "it was altered; measure again: merino-edge profile"
        )
    return dict(body)
