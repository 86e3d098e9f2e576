"""Measures a latency table on this machine: times a plan's probes batch by batch and writes the table as it goes.

Every finished batch is appended and flushed, so whatever ends a profile, what was measured so far stays and the table
can be resumed; one that measured nothing leaves no file. The last line holds the validation against whole models. Drift
between batches is not corrected. What is timed stands in `probe`, how in `stopwatch`.
"""

from __future__ import annotations

import dataclasses
import os
import random
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from merino_edge import artefact
from merino_edge.counts import MATRIX_BYTES
from merino_edge.errors import InputError, OutputError
from merino_edge.jetson import device
from merino_edge.jetson.probe import Axes, Plan, Probe, Space, make_plan
from merino_edge.jetson.stopwatch import BURST_SECONDS, Stopwatch
from merino_edge.jetson.validation import validate
from merino_edge.latency_table import KIND, SCHEMA_VERSION, LatencyTable, family
from merino_edge.measurement import MODES, Measurement, seal

BACKEND = "onnxruntime-cpu"
LIBRARIES = ("numpy", "onnxruntime", "onnx-ir")
BATCH_PROBES = 12
BATCH_BYTES = 2**30  # of float32 weights; engines need about twice as much
ROUNDS, QUICK_ROUNDS = 9, 5
# Header fields in which a table and what continues it may differ: when it was made, and what it covers.
MOMENT = {"tool_version", "created", "clock_mhz", "sha256"}
VARYING = {*MOMENT, "space", *(field.name for field in dataclasses.fields(Axes))}

Note = Callable[[int, int], None]  # (probes done, probes in all)


def profile(
    path: Path,
    space: Space,
    space_document: dict[str, Any],
    precision: str,
    threads: int,
    quick: bool,
    resume: bool = False,
    note: Note = lambda done, total: None,
    lengths: Sequence[int] | None = None,
) -> LatencyTable:
    """Measure `space` into `path` and return the finished table. `space_document` goes into its header. With `resume`
    a table is finished, and extended by what `space` and `lengths` need beyond it.

    Raises OutputError where `path` exists and is not resumed or cannot be written, InputError where it was
    begun otherwise, ArtefactError where it is altered.
    """
    table = LatencyTable.load(path, unfinished=True) if resume and path.exists() else None
    plan = make_plan(space, precision, quick, lengths, table.header if table else None)
    header = _header(space, space_document, plan, precision, threads)
    if table:
        header = _continued(table, header)
        measured = table.measurements
    else:
        measured = _begun(path, header)
    known = {m.key for m in measured}
    pending = [
        p for p in plan.probes if not known.issuperset(Measurement(p.what, m, p.length, p.shape, ()).key for m in MODES)
    ]
    stopwatch = Stopwatch(precision, threads, header["swept_bytes"])
    try:
        with artefact.writing(path), open(path, "a", encoding="utf-8") as file:

            def append(lines: Iterable[dict[str, Any]]) -> None:
                file.writelines(seal(line) + "\n" for line in lines)
                file.flush()
                os.fsync(file.fileno())

            done = len(plan.probes) - len(pending)
            note(done, len(plan.probes))
            for batch in batches(pending):
                fresh = [m for m in stopwatch.measure(batch, QUICK_ROUNDS if quick else ROUNDS) if m.key not in known]
                measured += fresh  # first: from here on an interruption must leave the file
                append(m.to_line() for m in fresh)
                done += len(batch)
                note(done, len(plan.probes))
            append([{"what": "validation", **validate(LatencyTable(path, header, measured, {}, ""))}])
    finally:
        if not measured:
            path.unlink(missing_ok=True)
    return LatencyTable.load(path)


def estimate_seconds(plan: Plan, precision: str, threads: int, quick: bool) -> float:
    """Roughly how long the plan takes, from timing one round of its largest layer here."""
    largest = max((p for p in plan.probes if p.what == "layer"), key=_work)
    begun = time.perf_counter()
    Stopwatch(precision, threads, 0).measure([largest], 1)
    spent = time.perf_counter() - begun
    rounds = 1.3 * (QUICK_ROUNDS if quick else ROUNDS)  # about a third is measured twice
    least = 4 * BURST_SECONDS  # two models, two modes
    return rounds * sum(least + max(0.0, spent - least) * min(1.0, _work(p) / _work(largest)) for p in plan.probes)


def _work(probe: Probe) -> float:
    return float(probe.models[-1].parameters * probe.length)


def batches(probes: Iterable[Probe]) -> Iterator[list[Probe]]:
    """Neighbouring probes whose models fit in memory together."""
    batch: list[Probe] = []
    for probe in probes:
        size_bytes = 4 * sum(a.parameters for p in [*batch, probe] for a in p.models)
        if batch and (len(batch) == BATCH_PROBES or size_bytes > BATCH_BYTES):
            yield batch
            batch = []
        batch.append(probe)
    if batch:
        yield batch


# --- the file --------------------------------------------------------------------------------------


def _header(space: Space, space_document: dict[str, Any], plan: Plan, precision: str, threads: int) -> dict[str, Any]:
    card = device.device_card()
    heads = [model.vocab_size * model.embedding_width * MATRIX_BYTES[precision] for model in space.models]
    head_bytes = round(statistics.median(heads))
    fields = {
        "device": card,
        "backend": BACKEND,
        "precision": precision,
        "threads": threads,
        "family": family(space.architecture(space.sample(random.Random(0)))),
        **plan.grid,
        "swept_bytes": min(head_bytes, 2 * device.last_level_cache_bytes(card) or head_bytes),
        "space": space_document,
        "estimated": False,
        "clock_mhz": device.clock_mhz(),
        "libraries": {name: version(name) for name in LIBRARIES},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return artefact.stamp(KIND, fields, SCHEMA_VERSION)


def _begun(path: Path, header: dict[str, Any]) -> list[Measurement]:
    """A new file that holds the header; no measurements."""
    if path.exists():
        raise OutputError(f"{path} exists", "finish it with --continue, or choose another --out")
    artefact.write_text(path, artefact.canonical_json(header) + "\n")
    return []


def _continued(table: LatencyTable, header: dict[str, Any]) -> dict[str, Any]:
    """Rewrite the file with what it holds under a header of what it will cover; a last line cut short and a former
    validation are taken out of it."""
    path = table.path
    header = artefact.stamp(
        KIND, {**_unstamped(header), "swept_bytes": table.header.get("swept_bytes")}, SCHEMA_VERSION
    )
    for name in sorted(set(header) - VARYING):
        if table.header.get(name) != header[name]:
            raise InputError(
                f"{path} was begun with another {name}", "continue it as it was begun, or choose another --out"
            )
    if all(table.header.get(name) == header[name] for name in set(header) - MOMENT):
        header = table.header  # nothing more to cover
    lines = [artefact.canonical_json(header), *(seal(m.to_line()) for m in table.measurements)]
    artefact.write_text(path, "\n".join(lines) + "\n")
    return header


def _unstamped(document: dict[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in document.items() if k not in ("kind", "schema_version", "tool_version", "sha256")}
