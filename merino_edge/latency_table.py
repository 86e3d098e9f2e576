"""A latency table: what the parts of a model cost on one device, as measured. Sums to whole models.

Artefact `NAME.jsonl`, kind "latency_table", schema 2, one JSON object a line, append-only:

    {"kind": "latency_table", "schema_version": 2, "tool_version": ..., "device": {...}, "backend": "onnxruntime-cpu",
     "precision": "fp32", "threads": 2, "family": {"head_dim": 64, ...}, "default_length": 256,
     "cold_cache": true, "estimated": false, "libraries": {...}, "created": ..., "plan": [...], "sha256": ...}
    {"what": "layer", "mode": "decode", "length": 256, ...}      (merino_edge.measurement)
    ...
    {"what": "validation", "decode": {"mape_percent": ..., ...}, "prefill": {...}, "sha256": ...}

| what | costs | measured over |
|---|---|---|
| layer | one more layer that has its own weights | FFN kind, length, width, ffn_width / width, kv_heads |
| repeat | one more layer of a block that shares its weights | the same |
| width_change | a projection between two widths | length, before * after |
| end | what a step costs however deep: overhead, embedding, final norm, head | length, vocab_size, embedding_width |
| model | a whole model that no other line was made from: checks the sum, is not part of it | - |

`mode` decode is one token at the last position of a cache of `length`; prefill is `length` tokens into an empty cache.
Between measured points cost is interpolated; outside them it is refused. Every answer is a multiple of 2^-30 ms (a
picosecond) or mJ, so that sums are exact in any order: a search that adds parts compares with a budget exactly what
the whole model's sum would. Schema 1 had one FFN kind a table, in its header; it is still read. The table knows no
clock and no device: `merino_edge.jetson.profiler` measures.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from merino_edge import artefact, limits
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError, InputError
from merino_edge.grid import Grid
from merino_edge.measurement import MODES, Measurement, Mode, Point, layer_point, unseal

KIND = "latency_table"
SCHEMA_VERSION = 2
RESOLUTION = 2.0**-30  # of every answer, in ms or mJ

Unit = Literal["ms", "mj"]
# What a layer of the table holds constant beside its shape.
FAMILY = (
    "head_dim",
    "tied_head",
    "norm",
    "norm_placement",
    "positions",
    "rotary_dim",
    "bias",
    "parallel_residual",
)
# The axes of each grid, as people call them.
_LAYER_AXES = ("length", "width", "ffn_width / width", "key-value heads")
AXES = {
    "layer": _LAYER_AXES,
    "repeat": _LAYER_AXES,
    "width_change": ("length", "before * after"),
    "end": ("length", "vocab_size", "embedding_width"),
}


class Step(NamedTuple):
    """What is asked for: time or energy of a decode step at a cache length, or of a prompt's prefill."""

    mode: Mode
    length: int
    unit: Unit = "ms"


def family(a: Architecture) -> dict[str, Any]:
    """What a table holds constant: which nodes, beside the FFN's, a layer of `a` has."""
    return {name: getattr(a, name) for name in FAMILY}


@dataclass
class LatencyTable:
    """A loaded table."""

    path: Path
    header: dict[str, Any]
    measurements: list[Measurement]
    validation: dict[str, Any]  # {} while the table is unfinished
    sha256: str
    _grids: dict[tuple[str, ...], Grid] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        points: dict[tuple[str, ...], dict[Point, float]] = {}
        for m in self.measurements:
            if m.what != "model":
                key = (m.what, m.mode, m.shape.get("ffn", ""))
                points.setdefault(("ms", *key), {})[m.point] = m.median_ms
                if m.energy_mj is not None:
                    points.setdefault(("mj", *key), {})[m.point] = m.energy_mj
        # Of a layer with a single head no key-value heads can be taken away: it stands for every share of them.
        shares = {m.point[-1] for m in self.measurements if m.shape.get("heads", 1) > 1}
        for m in self.measurements:
            if m.shape.get("heads") == 1:
                for unit in ("ms", "mj"):
                    grid = points.get((unit, m.what, m.mode, m.shape["ffn"]), {})
                    if m.point in grid:
                        grid.update({(*m.point[:-1], share): grid[m.point] for share in shares})
        grids = {key: Grid(values) for key, values in points.items()}
        # Energy may be read for some entries only; then there is none.
        self._grids = {key: grid for key, grid in grids.items() if key[0] == "ms" or grid.complete}

    @property
    def estimated(self) -> bool:
        return bool(self.header["estimated"])

    @property
    def precision(self) -> str:
        return str(self.header["precision"])

    @property
    def default_length(self) -> int:
        return int(self.header["default_length"])

    @property
    def unstable(self) -> list[Measurement]:
        return [m for m in self.measurements if m.unstable]

    # --- costs: in the unit of the step ---

    def layer_cost(self, a: Architecture, block: Block, step: Step, what: str = "layer") -> float:
        """One layer of `block`'s shape; `what` "repeat": one more that shares its weights. Raises InputError."""
        point = layer_point(step.length, block.width, block.heads, block.kv_heads, block.ffn_width)
        return self._cost(what, a.ffn, step, point)

    def block_cost(self, a: Architecture, block: Block, step: Step) -> float:
        """All layers of `block`. Raises InputError."""
        first = self.layer_cost(a, block, step)
        if block.shared and block.layers > 1:
            return first + (block.layers - 1) * self.layer_cost(a, block, step, "repeat")
        return block.layers * first

    def width_change_cost(self, before: int, after: int, step: Step) -> float:
        """The projection between two widths; nothing when they are equal. Raises InputError."""
        return 0.0 if before == after else self._cost("width_change", "", step, (step.length, before * after))

    def end_cost(self, a: Architecture, step: Step) -> float:
        """What a step costs however deep `a` is, the projections at either end included. Raises InputError."""
        width, first, last = a.embedding_width, a.blocks[0].width, a.blocks[-1].width
        cost = self._cost("end", "", step, (step.length, a.vocab_size, width))
        # only the last position reaches the head, in prefill too
        out = step._replace(mode="decode")
        return cost + self.width_change_cost(width, first, step) + self.width_change_cost(last, width, out)

    def model_cost(self, a: Architecture, step: Step) -> float:
        """A whole model: its ends, blocks and width changes. Raises InputError."""
        self.check_family(a)
        neighbours = itertools.pairwise(block.width for block in a.blocks)
        changes = sum(self.width_change_cost(before, after, step) for before, after in neighbours)
        return self.end_cost(a, step) + changes + sum(self.block_cost(a, block, step) for block in a.blocks)

    def model_ms(self, a: Architecture, mode: Mode, length: int | None = None) -> float:
        """`model_cost` in milliseconds, at the table's default length if none is given."""
        return self.model_cost(a, Step(mode, self.default_length if length is None else length))

    def check_family(self, a: Architecture) -> None:
        """Raise InputError when the table was measured with another kind of layer than `a`'s."""
        mine = self.header["family"]
        for name in FAMILY:
            if getattr(a, name) != mine[name]:
                raise InputError(f"{self.path} was measured with {name} {mine[name]}, not {getattr(a, name)}", AGAIN)

    def _cost(self, what: str, ffn: str, step: Step, point: Point) -> float:
        if gaps := self.gaps(what, ffn, step, [point]):
            raise InputError(f"{self.path} does not cover {gaps[0]}", AGAIN)
        return round(self._grids[step.unit, what, step.mode, ffn].at(point) / RESOLUTION) * RESOLUTION

    def gaps(self, what: str, ffn: str, step: Step, points: Sequence[Point]) -> list[str]:
        """What the table lacks to answer for all `points` of one grid: a line for each axis, [] where nothing."""
        name = f"{step.mode} of {what}{f' ({ffn})' if ffn else ''}"
        grid = self._grids.get((step.unit, what, step.mode, ffn))
        if grid is None:
            return [f"{'energy of ' if step.unit == 'mj' else ''}{name} (no measurement)"]
        found = []
        for axis in sorted({axis for point in points for axis in grid.outside(point)}):
            needed, measured = sorted(point[axis] for point in points), grid.axes[axis]
            label = AXES[what][axis]
            if label == "key-value heads":
                # the axis runs from one head to all of them
                found.append(f"{name}: {'fewer' if measured[0] > 0 else 'as many'} key-value heads than query heads")
                continue
            spelled = [_span(math.sqrt(x) if label == "width" else x for x in xs) for xs in (needed, measured)]
            found.append(f"{name}: {label} {spelled[0]} (measured {spelled[1]})")
        return found

    def axes(self, what: str, step: Step, ffn: str = "") -> list[list[float]]:
        """The values measured on each axis of a grid (AXES). Raises InputError where there is none."""
        grid = self._grids.get((step.unit, what, step.mode, ffn))
        if grid is None:
            raise InputError(f"{self.path} has no {what} in {step.mode}", AGAIN)
        return grid.axes

    def ffns(self, step: Step) -> list[str]:
        """The FFN kinds that layers were measured with."""
        return sorted(
            ffn for unit, what, mode, ffn in self._grids if (unit, what, mode) == (step.unit, "layer", step.mode)
        )

    # --- as part of another artefact ---

    def to_compact(self) -> dict[str, Any]:
        """What a search needs of the table, without samples and validation: enough to repeat the search."""
        header = {name: self.header[name] for name in (*_NEEDED, "device") if name in self.header}
        entries = [
            [m.what, m.mode, m.length, dict(m.shape), m.median_ms, *([] if m.energy_mj is None else [m.energy_mj])]
            for m in self.measurements
            if m.what != "model"
        ]
        return {"name": self.path.name, "sha256": self.sha256, "header": header, "entries": entries}

    @staticmethod
    def from_compact(value: Any, where: str) -> LatencyTable:
        """From `to_compact`'s form. Raises ArtefactError."""
        try:
            path, header, sha256 = Path(value["name"]), dict(value["header"]), str(value["sha256"])
            lines = [
                {"what": what, "mode": mode, "length": length, **shape, "unit": "ms", "samples": [ms],
                 "energy_mj": rest[0] if rest else None}
                for what, mode, length, shape, ms, *rest in value["entries"]
            ]  # fmt: skip
        except (KeyError, TypeError, ValueError):
            raise ArtefactError(f"{where} holds no latency table", "search again with --table") from None
        _check_header_fields(header, f"{where}: table")
        measured = [Measurement.from_line(line, f"{where}: table entry {i}") for i, line in enumerate(lines)]
        return LatencyTable(path, header, measured, {}, sha256)

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
        _check_header_fields(header, f"{path} line 1")
        measurements: dict[str, Measurement] = {}
        validation: dict[str, Any] = {}
        for number, line in enumerate(lines[1:], 2):
            where = f"{path} line {number}"
            body = unseal(line, where)
            if body.get("what") == "validation":
                validation = {key: body[key] for key in MODES if key in body}
                continue
            measurement = Measurement.from_line(body, where, header["family"].get("ffn"))
            if measurements.setdefault(measurement.key, measurement) is not measurement:
                raise ArtefactError(
                    f"{where} measures the same as a line before it", "measure again: merino-edge profile"
                )
        table = LatencyTable(path, header, list(measurements.values()), validation, artefact.sha256_text(text))
        if not unfinished and not (validation and all(grid.complete for grid in table._grids.values())):
            raise ArtefactError(f"{path} is unfinished", f"finish it: {_continue(path)}")
        return table


AGAIN = "measure it: merino-edge profile --space SPACE --out T.jsonl"
_NEEDED = ("family", "precision", "default_length", "estimated")


def _continue(path: Path) -> str:
    return f"merino-edge profile --continue --out {path}"


def _span(values: Any) -> str:
    low, *_, high = (*(ordered := sorted(values)), ordered[-1])
    return f"{low:g}" if low == high else f"{low:g} to {high:g}"


def _check_header_fields(header: dict[str, Any], where: str) -> None:
    mine = header.get("family")
    ok = isinstance(mine, dict) and set(FAMILY) <= set(mine) <= {*FAMILY, "ffn", "kv_group"}
    ok = ok and isinstance((mine or {}).get("ffn", ""), str) and isinstance(header.get("precision"), str)
    ok = ok and type(header.get("default_length")) is int and isinstance(header.get("estimated"), bool)
    if not ok:
        raise ArtefactError(f"{where} lacks fields that every table has", "measure again: merino-edge profile")
