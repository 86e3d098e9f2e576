"""One line of a latency table: what one part of a model costs on one device, in time and in energy.

This module knows neither the sum over a model nor the file. `merino_edge.latency.table` lists the kinds of line and
how they sum to a model. A line is a JSON object:

    {"what": "layer", "mode": "decode", "length": 256, "ffn": "relu", "width": 64, "heads": 1, "kv_heads": 1,
     "ffn_width": 128, "cache": "cold", "unit": "ms", "median": 0.021, "interval": [0.020, 0.022],
     "spread_percent": 1.2, "unstable": false, "samples": [...], "yardsticks": {"decode cold": 0.31},
     "energy_mj": 0.08, "sha256": ...}

| field | means |
|---|---|
| what | `end` is the embedding and the head, `repeat` one more layer that shares its weights |
| length | of a decode step: the KV-cache positions that it reads; of a prefill: the tokens of the prompt |
| window | of a layer: the positions that it attends to; without the field all before it |
| cache | `cold`: the processor's caches were swept before each step; without the field steps ran in a loop |
| interval | the bootstrap interval of the median, 95 % |
| yardsticks | [ms] of the reference model in the same rounds, by kind of step: tells a slow machine from a slow part |
| visit | which repetition this is, from 0; without the field 0 |
| chosen_by | of a `model`: `found` by a search with this table, or `public` as its user asked; else drawn at random |
| transferred | true: not measured, but computed from another machine's table (merino_edge.latency.transfer) |
| energy_mj | of one step; without the field no power rail could be read |
| failed | why the shape could not be run; such a line has no samples |
"""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Literal, get_args

from merino_edge import artefact, forms, limits
from merino_edge.errors import ArtefactError
from merino_edge.forms import UnsetType
from merino_edge.latency.forms import Entry
from merino_edge.statistics import median_interval

MAX_HALF_WIDTH_PERCENT = 2.5  # an entry with a wider confidence interval is flagged unstable

Mode = Literal["decode", "prefill"]
What = Literal["layer", "repeat", "width_change", "end", "calibration", "model", "found", "public"]
Cache = Literal["warm", "cold"]
MODES: tuple[Mode, ...] = get_args(Mode)
# Kinds whose names in files are older than the ones in this code.
EMBEDDING_AND_HEAD: Final = "end"
SHARED_LAYER: Final = "repeat"

# The columns of each kind of line, beside what, mode and length.
COLUMNS: dict[str, tuple[str, ...]] = {
    "layer": ("ffn", "width", "heads", "kv_heads", "ffn_width"),
    SHARED_LAYER: ("ffn", "width", "heads", "kv_heads", "ffn_width"),
    "width_change": ("before", "after"),
    EMBEDDING_AND_HEAD: ("vocab_size", "embedding_width"),
    "calibration": ("architecture",),
    "model": ("architecture",),
    "found": ("architecture",),
    "public": ("architecture",),
}
WHOLE = ("calibration", "model", "found", "public")  # whole models: no sum uses them
# In a file these are models too, with "chosen_by". So versions that do not know them read the file.
CHOSEN: tuple[What, ...] = ("found", "public")
NOT_NUMBERS = ("ffn", "architecture")
OF_LAYERS = ("layer", SHARED_LAYER)

Point = tuple[float, ...]


def spread_percent(samples: Sequence[float]) -> float:
    """The robust coefficient of variation, 1.4826 * MAD / median, in percent."""
    median = statistics.median(samples)
    deviation = 1.4826 * statistics.median(abs(sample - median) for sample in samples)
    return 100 * deviation / median if median > 0 else (0.0 if deviation == 0 else math.inf)


def relative_half_width_percent(samples: Sequence[float]) -> float:
    """Half the width of the median's bootstrap interval, in percent of the median."""
    low, high = median_interval(samples)
    median = statistics.median(samples)
    return 50 * (high - low) / median if median > 0 else (0.0 if high == low else math.inf)


def layer_point(length: int, width: int, heads: int, kv_heads: int, ffn_width: int) -> Point:
    """A layer's coordinates on its grid: (length, width squared, FFN width / width, share of key-value heads).

    The width is squared because weights grow with its square. The share goes from 0 (one key-value head) to 1 (one for
    each query head). A single head has the share 1.
    """
    kv_share = (kv_heads - 1) / (heads - 1) if heads > 1 else 1.0
    return length, width**2, ffn_width / width, kv_share


@dataclass(frozen=True)
class Measurement:
    """One line. `shape` holds the columns of its kind, `samples` [ms] one value for each round."""

    what: What
    mode: Mode
    length: int
    shape: Mapping[str, Any]
    samples: tuple[float, ...]
    energy_mj: float | None = None
    cache: Cache = "warm"
    failed: str = ""  # why there are no samples
    reference_ms: Mapping[str, float] = field(default_factory=dict)  # of the reference model, by kind of step
    repetition: int = 0  # a profile measures whole models several times and writes a line each time
    slowness: float = field(default=1.0, compare=False)  # of the machine meanwhile (`DriftCorrection`)
    transferred: bool = False  # by another machine's table (merino_edge.latency.transfer), not measured

    @property
    def median_ms(self) -> float:
        """The median of the rounds, divided by the machine's slowness.

        A part too small for the clock can have a negative median. It counts as 0.
        """
        return max(0.0, statistics.median(self.samples)) / self.slowness

    @property
    def interval_ms(self) -> tuple[float, float]:
        """The bootstrap interval of the median, divided by the machine's slowness."""
        low, high = median_interval(self.samples)
        return low / self.slowness, high / self.slowness

    @property
    def unstable(self) -> bool:
        """Whether the median is uncertain because rounds differ too much or are too few."""
        return len(self.samples) > 1 and not relative_half_width_percent(self.samples) <= MAX_HALF_WIDTH_PERCENT

    @property
    def key(self) -> str:
        """The identity of what was measured: repetitions share it."""
        return entry_key(self.what, self.mode, self.length, self.shape, self.cache)

    @property
    def window(self) -> int:
        """The window of a layer; 0 where it has none."""
        return int(self.shape.get("window", 0))

    @property
    def point(self) -> Point:
        """The coordinates on the grid of its kind. Outside layers a decode step depends on no length."""
        s = self.shape
        length = () if self.mode == "decode" else (self.length,)
        if self.what == EMBEDDING_AND_HEAD:
            return *length, s["vocab_size"], s["embedding_width"]
        if self.what == "width_change":
            return *length, s["before"] * s["after"]
        return layer_point(self.length, s["width"], s["heads"], s["kv_heads"], s["ffn_width"])

    def to_line(self) -> dict[str, Any]:
        """The line's JSON object, without its checksum."""
        line = {"what": self.what, "mode": self.mode, "length": self.length, **self.shape}
        line |= {"what": "model", "chosen_by": self.what} if self.what in CHOSEN else {}
        line |= {"visit": self.repetition} if self.repetition else {}
        if self.cache == "cold":
            line["cache"] = self.cache
        line |= {"transferred": True} if self.transferred else {}
        if self.failed:
            return {**line, "failed": self.failed}
        spread = spread_percent(self.samples)
        line |= {
            "unit": "ms",
            "median": max(0.0, statistics.median(self.samples)),
            "interval": list(median_interval(self.samples)),
            "spread_percent": spread if math.isfinite(spread) else None,
            "unstable": self.unstable,
            "samples": list(self.samples),
        }
        line |= {"yardsticks": dict(self.reference_ms)} if self.reference_ms else {}
        return line if self.energy_mj is None else {**line, "energy_mj": self.energy_mj}

    @staticmethod
    def from_line(line: dict[str, Any], where: str, ffn: str | None = None) -> Measurement:
        """The measurement of a line. `ffn` is the FFN kind of a schema 1 table, whose layers do not name theirs.

        Raises ArtefactError where a column is missing, of another type, or out of bounds.
        """
        entry = forms.read(line, Entry, f"{where} is not a measurement", "measure again: merino-edge profile")
        what: Any = entry.what
        if entry.chosen_by is not None:
            what = entry.chosen_by if what == "model" and entry.chosen_by in CHOSEN else None
        line = line if ffn is None else {"ffn": ffn, **line}
        shape = {name: line.get(name) for name in COLUMNS.get(what, ())}
        shape |= {"window": line["window"]} if what in OF_LAYERS and "window" in line else {}
        numbers = [value for name, value in shape.items() if name not in NOT_NUMBERS]
        if not (
            shape
            and all(type(n) is int and 0 < n <= limits.MAX_POSITIONS for n in numbers)
            and isinstance(shape.get("ffn", ""), str)
            and isinstance(shape.get("architecture", {}), dict)
            and (entry.failed or (entry.samples and entry.unit == "ms"))
        ):
            raise ArtefactError(f"{where} is not a measurement", "measure again: merino-edge profile")
        return Measurement(
            what,
            entry.mode,
            entry.length,
            shape,
            () if entry.failed else entry.samples,
            energy_mj=entry.energy_mj,
            cache=entry.cache,
            failed=entry.failed,
            reference_ms={} if isinstance(entry.yardsticks, UnsetType) else entry.yardsticks,
            repetition=entry.visit,
            transferred=entry.transferred,
        )


def entry_key(what: str, mode: str, length: int, shape: Mapping[str, Any], cache: str) -> str:
    """The identity of an entry as canonical JSON."""
    return artefact.canonical_json([what, mode, length, dict(shape), cache])


# --- lines -----------------------------------------------------------------------------------------


def add_checksum(body: dict[str, Any]) -> str:
    """The line of `body` with its own sha256, so that one flipped bit is found."""
    return json.dumps({**body, "sha256": artefact.sha256_text(artefact.canonical_json(body))[:16]}, allow_nan=False)


def verify_checksum(line: str, where: str) -> dict[str, Any]:
    """The body of a line by `add_checksum`. Raises ArtefactError where the checksum does not match."""
    body = artefact.parse_json(line, where)
    claimed = body.pop("sha256", None) if isinstance(body, dict) else None
    if artefact.sha256_text(artefact.canonical_json(body))[:16] != claimed:
        raise ArtefactError(
            f"{where} does not match its own sha256", "it was altered; measure again: merino-edge profile"
        )
    return dict(body)
