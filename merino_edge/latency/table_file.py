"""The latency table as a file, and as part of a search result.

Artefact `NAME.jsonl`, kind "latency_table", schema 3. Each line is a JSON object; lines are only appended:

    {"kind": "latency_table", "schema_version": 3, "tool_version": ..., "device": {...}, "backend": "onnxruntime-cpu",
     "precision": "fp32", "threads": 1, "family": {"head_dim": 64, ...}, "default_length": 256, "lowering": "ort",
     "reference": {"ffn": "relu", "ratio": 1, "decode": 256, "prefill": 256}, "estimated": false, ..., "sha256": ...}
    {"what": "conditions", "moment": "before", "clock_mhz": {...}, ...}
    {"what": "layer", "mode": "decode", "length": 256, ...}      (merino_edge.latency.measurement)
    ...
    {"what": "faces", "decode": {...}, "sha256": ...}            (the step-time model)
    {"what": "validation", "decode": {"mape_percent": ..., ..., "found": {...}}, "prefill": {...},
     "verdict": {"word": "good", "reasons": []}, "sha256": ...}

Older schemas are read. Schema 2 has no cold entries and one length for all. Schema 1 has one FFN kind, in its header.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from merino_edge import artefact, forms, limits, wrong_kind
from merino_edge.errors import ArtefactError
from merino_edge.forms import Form
from merino_edge.latency.forms import Compact, Conditions, FacesLine, Header, Validation
from merino_edge.latency.measurement import MODES, WHOLE, Measurement, verify_checksum
from merino_edge.latency.step_time import StepTimeModel
from merino_edge.latency.table import FAMILY, LATER_FAMILY, LatencyTable
from merino_edge.latency.verdict import Verdict

KIND = "latency_table"
SCHEMA_VERSION = 3

# The header's fields that a search needs, and those that say which length on a grid a step has.
REQUIRED_FIELDS = ("family", "precision", "default_length", "estimated")
LENGTH_FIELDS = ("reference", "cache_buckets")
LINES: dict[str, type[Form]] = {"validation": Validation, "conditions": Conditions, "faces": FacesLine}
MEASURE_AGAIN = "measure again: merino-edge profile"

# --- the file --------------------------------------------------------------------------------------


def load_table(path: Path | str, *, unfinished: bool = False) -> LatencyTable:
    """Read and verify a table. Raises ArtefactError naming the line.

    `unfinished` also accepts a table that a profile left before its end, without a last line that was cut short.
    """
    path = Path(path)
    wrong_kind.require(path, KIND)
    text = artefact.read_text(path, limits.MAX_TABLE_BYTES)
    lines = text.split("\n")
    if lines[-1] == "":
        lines.pop()
    elif unfinished:
        lines.pop()  # the write was interrupted
    else:
        raise ArtefactError(f"{path} is cut short in line {len(lines)}", f"finish it: {_continue(path)}")
    if not lines:
        raise ArtefactError(f"{path} is empty", "measure it: merino-edge profile")
    header = artefact.check_header(artefact.parse_json(lines[0], f"{path} line 1"), KIND, SCHEMA_VERSION, str(path))
    forms.check(header, Header, f"{path} line 1", MEASURE_AGAIN)
    _check_family(header, f"{path} line 1")
    measurements: dict[tuple[str, int], Measurement] = {}
    validation: dict[str, Any] = {}
    verdict: Verdict | None = None
    step_time: StepTimeModel | None = None
    conditions: list[dict[str, Any]] = []
    samples = 0
    for number, line in enumerate(lines[1:], 2):
        where = f"{path} line {number}"
        body = verify_checksum(line, where)
        what = body.get("what")
        if isinstance(what, str) and what in LINES:
            forms.check(body, LINES[what], where, MEASURE_AGAIN)
        if what == "validation":
            validation = {key: body[key] for key in MODES if key in body}
            verdict = _verdict(body)
        elif what == "conditions":
            conditions.append(body)
        elif what == "faces":
            step_time = StepTimeModel.from_dict(body["decode"])
        else:
            measurement = Measurement.from_line(body, where, header["family"].get("ffn"))
            if (samples := samples + len(measurement.samples)) > limits.MAX_SAMPLES:
                raise ArtefactError(f"{path} has more than {limits.MAX_SAMPLES} samples", "see merino_edge/limits.py")
            if measurements.setdefault((measurement.key, measurement.repetition), measurement) is not measurement:
                raise ArtefactError(
                    f"{where} measures the same as a line before it", "measure again: merino-edge profile"
                )
    sha256 = artefact.sha256_text(text)
    table = LatencyTable(path, header, list(measurements.values()), validation, sha256, step_time, conditions, verdict)
    if not unfinished and not table.finished:
        raise ArtefactError(f"{path} is unfinished", f"finish it: {_continue(path)}")
    return table


def _continue(path: Path) -> str:
    return f"merino-edge profile --continue --out {path}"


def _check_family(header: dict[str, Any], where: str) -> None:
    if unknown := header["family"].keys() - {*FAMILY, *LATER_FAMILY, "ffn", "kv_group"}:
        raise ArtefactError(f"{where}: family has an unknown {min(unknown)}", MEASURE_AGAIN)


# --- inside another artefact -----------------------------------------------------------------------


def to_compact(table: LatencyTable) -> dict[str, Any]:
    """The part of the table that a search needs, without samples: enough to repeat the search."""
    entries = [
        [m.what, m.mode, m.length, dict(m.shape), m.median_ms, m.energy_mj, m.cache]
        for m in table.measurements
        if m.what not in WHOLE and not m.failed
    ]
    assert table.step_time is not None
    return {
        "name": table.path.name,
        "sha256": table.sha256,
        "header": {
            name: table.header[name]
            for name in (*REQUIRED_FIELDS, *LENGTH_FIELDS, "device", "transferred")
            if name in table.header
        },
        "faces": table.step_time.to_dict(),
        "validation": table.validation,
        "verdict": table.verdict and table.verdict.to_dict(),
        "entries": entries,
    }


def from_compact(value: Any, where: str) -> LatencyTable:
    """The table of `to_compact`'s form. Raises ArtefactError where `value` does not have it."""
    forms.check(value, Compact, f"{where} holds no latency table", "search again with --table")
    lines = []
    for number, (what, mode, length, shape, ms, *rest) in enumerate(value["entries"]):
        if not isinstance(shape, dict):
            raise ArtefactError(f"{where}: table entry {number} is not a measurement", "search again with --table")
        more = {"energy_mj": rest[0] if rest else None, "cache": rest[1] if len(rest) > 1 else "warm"}
        lines.append({**shape, "what": what, "mode": mode, "length": length, "unit": "ms", "samples": [ms], **more})
    header = dict(value["header"])
    _check_family(header, f"{where}: table")
    measured = [Measurement.from_line(line, f"{where}: table entry {i}") for i, line in enumerate(lines)]
    step_time = StepTimeModel.from_dict(value["faces"]) if "faces" in value else None
    validation, verdict = dict(value.get("validation", {})), _verdict(value)
    return LatencyTable(Path(value["name"]), header, measured, validation, value["sha256"], step_time, verdict=verdict)


def _verdict(body: dict[str, Any]) -> Verdict | None:
    """The verdict of a validation or a compact table; None where a version wrote it that gave none."""
    return Verdict.from_dict(body["verdict"]) if body.get("verdict") else None
