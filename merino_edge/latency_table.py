"""A latency table: what the parts of a model cost on one device, as measured. Sums to whole models.

Artefact `NAME.jsonl`, kind "latency_table", schema 1, one JSON object a line, append-only:

    {"kind": "latency_table", "schema_version": 1, "tool_version": ..., "device": {...}, "backend": "onnxruntime-cpu",
     "precision": "fp32", "threads": 2, "family": {"head_dim": 64, "ffn": "relu", ...}, "default_length": 256,
     "cold_cache": true, "estimated": false, "libraries": {...}, "created": ..., "plan": [...], "sha256": ...}
    {"what": "layer", "mode": "decode", "length": 256, "width": 64, "heads": 1, "kv_heads": 1, "ffn_width": 128,
     "unit": "ms", "median": 0.021, "spread_percent": 1.2, "unstable": false, "samples": [...], "sha256": ...}
    ...
    {"what": "validation", "decode": {"mape_percent": ..., ...}, "prefill": {...}, "sha256": ...}

| what | costs | measured over |
|---|---|---|
| layer | one more layer that has its own weights | length, width, ffn_width / width |
| repeat | one more layer of a block that shares its weights | the same |
| width_change | a projection between two widths | length, before * after |
| end | what a step costs however deep: overhead, embedding, final norm, head | length, vocab_size, embedding_width |
| model | a whole model that no other line was made from: checks the sum, is not part of it | - |

`mode` decode is one token at the last position of a cache of `length`; prefill is `length` tokens into an empty cache.
Between measured points cost is interpolated linearly (in width squared, since weights grow so); outside
them it is refused. The table knows no clock and no device: `merino_edge.jetson.profiler` measures.
"""

from __future__ import annotations

import bisect
import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from merino_edge import artefact, limits
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError, InputError

KIND = "latency_table"
SCHEMA_VERSION = 1
MAX_SPREAD_PERCENT = 2.5  # an entry that varies more between rounds is flagged unstable

Mode = Literal["decode", "prefill"]
What = Literal["layer", "repeat", "width_change", "end", "model"]
MODES: tuple[Mode, ...] = get_args(Mode)

# The columns of each kind of line, beside what, mode and length.
COLUMNS: dict[str, tuple[str, ...]] = {
    "layer": ("width", "heads", "kv_heads", "ffn_width"),
    "repeat": ("width", "heads", "kv_heads", "ffn_width"),
    "width_change": ("before", "after"),
    "end": ("vocab_size", "embedding_width"),
    "model": ("architecture",),
}
# The axes its cost is interpolated over, beside length.
AXES = {"layer": ("width", "ffn_width / width"), "width_change": ("before * after",), "end": COLUMNS["end"]}
AXES["repeat"] = AXES["layer"]
FAMILY = (
    "head_dim",
    "tied_head",
    "norm",
    "norm_placement",
    "ffn",
    "positions",
    "rotary_dim",
    "bias",
    "parallel_residual",
)


def family(a: Architecture) -> dict[str, Any]:
    """What a table holds constant: which nodes a layer of `a` has, and how many query heads per key-value head."""
    groups = {block.heads // block.kv_heads for block in a.blocks}
    if len(groups) != 1:
        raise InputError("blocks differ in query heads per key-value head", "a latency table covers one such ratio")
    return {**{name: getattr(a, name) for name in FAMILY}, "kv_group": groups.pop()}


def spread_percent(samples: Sequence[float]) -> float:
    """Robust coefficient of variation in percent: 1.4826 * MAD / median."""
    median = statistics.median(samples)
    deviation = 1.4826 * statistics.median(abs(sample - median) for sample in samples)
    return 100 * deviation / median if median > 0 else (0.0 if deviation == 0 else math.inf)


@dataclass(frozen=True)
class Measurement:
    """One line. `shape` holds the columns of its kind; `samples` [ms], one per round of measuring."""

    what: What
    mode: Mode
    length: int
    shape: Mapping[str, Any]
    samples: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        """The median round. A part too small for the clock can come out below zero, and then counts as free."""
        return max(0.0, statistics.median(self.samples))

    @property
    def unstable(self) -> bool:
        return len(self.samples) > 1 and not spread_percent(self.samples) <= MAX_SPREAD_PERCENT

    @property
    def key(self) -> str:
        """What makes two lines the same measurement."""
        return artefact.canonical_json([self.what, self.mode, self.length, dict(self.shape)])

    @property
    def coordinates(self) -> tuple[float, ...]:
        """Where on its kind's grid it stands: length, then the axes."""
        s = self.shape
        if self.what == "end":
            return self.length, s["vocab_size"], s["embedding_width"]
        if self.what == "width_change":
            return self.length, s["before"] * s["after"]
        return self.length, s["width"] ** 2, s["ffn_width"] / s["width"]

    def to_line(self) -> dict[str, Any]:
        spread = spread_percent(self.samples)
        return {
            "what": self.what,
            "mode": self.mode,
            "length": self.length,
            **self.shape,
            "unit": "ms",
            "median": self.median_ms,
            "spread_percent": spread if math.isfinite(spread) else None,
            "unstable": self.unstable,
            "samples": list(self.samples),
        }

    @staticmethod
    def from_line(line: dict[str, Any], where: str) -> Measurement:
        """Raises ArtefactError when a column is missing, of another type, or out of bounds."""
        try:
            what, mode, length, samples = line["what"], line["mode"], line["length"], line["samples"]
            shape = {name: line[name] for name in COLUMNS[what]}
            if mode not in MODES or line["unit"] != "ms" or not samples:
                raise ValueError
            samples = tuple(float(sample) for sample in samples)
            numbers = [length, *(value for name, value in shape.items() if name != "architecture")]
            if not all(type(n) is int and 0 < n <= limits.MAX_POSITIONS for n in numbers):
                raise ValueError
        except (KeyError, TypeError, ValueError):
            raise ArtefactError(f"{where} is not a measurement", "measure again: merino-edge profile") from None
        return Measurement(what, mode, length, shape, samples)


class _Grid:
    """Measured costs on a rectangular grid, multilinear in between."""

    def __init__(self, points: Mapping[tuple[float, ...], float]) -> None:
        self.points = points
        self.axes = [sorted(set(axis)) for axis in zip(*points, strict=True)]
        self.complete = len(points) == math.prod(map(len, self.axes))

    def outside(self, point: Sequence[float]) -> int | None:
        """The first axis on which `point` lies outside the grid, or None."""
        inside = (axis[0] <= x <= axis[-1] for axis, x in zip(self.axes, point, strict=True))
        return next((index for index, ok in enumerate(inside) if not ok), None)

    def at(self, point: Sequence[float]) -> float:
        corners: list[tuple[float, tuple[float, ...]]] = [(1.0, ())]
        for axis, x in zip(self.axes, point, strict=True):
            index = bisect.bisect_left(axis, x)
            high = axis[index]
            low = high if high == x else axis[index - 1]
            t = 1.0 if high == low else (x - low) / (high - low)
            ends = [(t, high)] if t == 1.0 else [(1 - t, low), (t, high)]
            corners = [(w * part, (*at, value)) for w, at in corners for part, value in ends]
        return sum(weight * self.points[corner] for weight, corner in corners)


@dataclass
class LatencyTable:
    """A loaded table. All costs in milliseconds; `length` defaults to the header's `default_length`."""

    path: Path
    header: dict[str, Any]
    measurements: list[Measurement]
    validation: dict[str, Any]  # {} while the table is unfinished
    sha256: str
    _grids: dict[tuple[str, str], _Grid] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        points: dict[tuple[str, str], dict[tuple[float, ...], float]] = {}
        for m in self.measurements:
            if m.what != "model":
                points.setdefault((m.what, m.mode), {})[m.coordinates] = m.median_ms
        self._grids = {key: _Grid(values) for key, values in points.items()}

    @property
    def estimated(self) -> bool:
        return bool(self.header["estimated"])

    @property
    def precision(self) -> str:
        return str(self.header["precision"])

    @property
    def unstable(self) -> list[Measurement]:
        return [m for m in self.measurements if m.unstable]

    # --- costs ---

    def block_ms(self, a: Architecture, block: Block, mode: str, length: int | None = None) -> float:
        """All layers of `block`, which may be any block of `a`'s family. Raises InputError."""
        self.check_family(a, block)
        at = (block.width**2, block.ffn_width / block.width)
        shown = f"a layer of width {block.width} and ffn_width {block.ffn_width}"
        if block.shared and block.layers > 1:
            further = (block.layers - 1) * self._cost("repeat", mode, length, at, f"{shown} that repeats its weights")
            return self._cost("layer", mode, length, at, shown) + further
        return block.layers * self._cost("layer", mode, length, at, shown)

    def width_change_ms(self, before: int, after: int, mode: str, length: int | None = None) -> float:
        """The projection between two widths; nothing when they are equal. Raises InputError."""
        if before == after:
            return 0.0
        return self._cost(
            "width_change", mode, length, (before * after,), f"a projection from width {before} to {after}"
        )

    def end_ms(self, a: Architecture, mode: str, length: int | None = None) -> float:
        """What a step costs however deep `a` is, the projections at either end included. Raises InputError."""
        self.check_family(a, a.blocks[0])
        shown = f"a head of {a.vocab_size} tokens and embedding_width {a.embedding_width}"
        cost = self._cost("end", mode, length, (a.vocab_size, a.embedding_width), shown)
        cost += self.width_change_ms(a.embedding_width, a.blocks[0].width, mode, length)
        # only the last position reaches the head, in prefill too
        return cost + self.width_change_ms(a.blocks[-1].width, a.embedding_width, "decode", length)

    def model_ms(self, a: Architecture, mode: str, length: int | None = None) -> float:
        """A whole model: its ends, blocks and width changes. Raises InputError."""
        neighbours = itertools.pairwise(block.width for block in a.blocks)
        changes = sum(self.width_change_ms(before, after, mode, length) for before, after in neighbours)
        return self.end_ms(a, mode, length) + changes + sum(self.block_ms(a, b, mode, length) for b in a.blocks)

    def check_family(self, a: Architecture, block: Block) -> None:
        """Raise InputError when the table was measured with another kind of layer than `a`'s."""
        mine = self.header["family"]
        for name in FAMILY:
            if getattr(a, name) != mine[name]:
                raise InputError(f"{self.path} was measured with {name} {mine[name]}, not {getattr(a, name)}", _AGAIN)
        if block.heads != mine["kv_group"] * block.kv_heads:
            raise InputError(f"{self.path} was measured with {mine['kv_group']} query heads per key-value head", _AGAIN)

    def _cost(self, what: str, mode: str, length: int | None, at: tuple[float, ...], shown: str) -> float:
        grid = self._grids.get((what, mode))
        if mode not in MODES or grid is None:
            raise InputError(f"{self.path} has no {mode} measurement for {shown}", _AGAIN)
        length = self.header["default_length"] if length is None else length
        point = (length, *at)
        axis = grid.outside(point)
        if axis is not None:
            low, high = grid.axes[axis][0], grid.axes[axis][-1]
            name = ("length", *AXES[what])[axis]
            if name == "width":
                low, high = math.isqrt(int(low)), math.isqrt(int(high))
            raise InputError(
                f"{shown} at length {length} is outside {self.path}: it covers {name} {low:g} to {high:g}", _AGAIN
            )
        return grid.at(point)

    # --- reading ---

    @staticmethod
    def load(path: Path | str, unfinished: bool = False) -> LatencyTable:
        """Read and verify a table. With `unfinished`, one that a profile left before its end is
        accepted too, a last line cut short left out. Raises ArtefactError naming the line."""
        path = Path(path)
        text = artefact.read_text(path, limits.MAX_TABLE_BYTES)
        lines = text.split("\n")
        if lines[-1] == "":
            lines.pop()
        elif unfinished:
            lines.pop()  # cut while it was written
        else:
            raise ArtefactError(f"{path} is cut short in line {len(lines)}", f"finish it: {_continue(path)}")
        if not lines:
            raise ArtefactError(f"{path} is empty", "measure it: merino-edge profile")
        header = artefact.check_header(artefact.parse_json(lines[0], f"{path} line 1"), KIND, SCHEMA_VERSION, str(path))
        _check_header_fields(header, path)
        measurements: dict[str, Measurement] = {}
        validation: dict[str, Any] = {}
        for number, line in enumerate(lines[1:], 2):
            where = f"{path} line {number}"
            body = _unseal(line, where)
            if body.get("what") == "validation":
                validation = {key: body[key] for key in MODES if key in body}
                continue
            measurement = Measurement.from_line(body, where)
            if measurements.setdefault(measurement.key, measurement) is not measurement:
                raise ArtefactError(
                    f"{where} measures the same as a line before it", "measure again: merino-edge profile"
                )
        table = LatencyTable(path, header, list(measurements.values()), validation, artefact.sha256_text(text))
        if not unfinished and not (validation and all(grid.complete for grid in table._grids.values())):
            raise ArtefactError(f"{path} is unfinished", f"finish it: {_continue(path)}")
        return table


_AGAIN = "measure a table for it: merino-edge profile --space SPACE --out T.jsonl"


def _continue(path: Path) -> str:
    return f"merino-edge profile --continue --out {path}"


def _check_header_fields(header: dict[str, Any], path: Path) -> None:
    mine = header.get("family")
    ok = isinstance(mine, dict) and set(mine) == {*FAMILY, "kv_group"} and type(mine["kv_group"]) is int
    ok = ok and isinstance(header.get("precision"), str)
    ok = ok and type(header.get("default_length")) is int and isinstance(header.get("estimated"), bool)
    if not ok:
        raise ArtefactError(f"{path} line 1 lacks fields that every table has", "measure again: merino-edge profile")


# --- lines -----------------------------------------------------------------------------------------


def seal(body: dict[str, Any]) -> str:
    """A line with its own hash, so that one flipped bit is found."""
    return json.dumps({**body, "sha256": artefact.sha256_text(artefact.canonical_json(body))[:16]}, allow_nan=False)


def _unseal(line: str, where: str) -> dict[str, Any]:
    body = artefact.parse_json(line, where)
    claimed = body.pop("sha256", None) if isinstance(body, dict) else None
    if artefact.sha256_text(artefact.canonical_json(body))[:16] != claimed:
        raise ArtefactError(
            f"{where} does not match its own sha256", "it was altered; measure again: merino-edge profile"
        )
    return dict(body)
