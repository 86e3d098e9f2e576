"""Estimated latency tables: the plan of a profile, with the roofline of a board in place of a clock.

The table has the entries that `merino-edge profile` would measure there, one sample each. Its validation line compares
the sums with the roofline's own whole models. That says how additive the estimate is, not how far it is from the board.
So the error bar is the range of errors against published speeds (`merino_edge.jetson.estimate.published_speeds`). The
same arguments give the same file. There is no energy: only the power of one rail of one board is published.
"""

from __future__ import annotations

import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from merino_edge import artefact
from merino_edge.errors import OutputError
from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.estimate.published_speeds import checked_by, unfitted_errors_percent
from merino_edge.jetson.estimate.roofline import ASSUMED_CPU_MHZ, Roofline
from merino_edge.jetson.profiler.plan import make_plan
from merino_edge.jetson.profiler.probe import Probe, Space
from merino_edge.jetson.profiler.validation import validate
from merino_edge.latency.measurement import MODES, Measurement, Mode, add_checksum
from merino_edge.latency.table import LatencyTable, family
from merino_edge.latency.table_file import KIND, SCHEMA_VERSION, load_table

BACKEND = "roofline"


def estimate(
    path: Path,
    space: Space,
    space_document: dict[str, Any],
    precision: str,
    roofline: Roofline,
    *,
    quick: bool = False,
    lengths: Sequence[int] | None = None,
) -> LatencyTable:
    """Write the table of `space` to `path` and return it.

    Raises OutputError where `path` exists or cannot be written, InputError where the space or precision cannot be
    planned.
    """
    if path.exists():
        raise OutputError(f"{path} exists", "choose another --out")
    plan = make_plan(space, precision, quick=quick, lengths=lengths)
    fields = {
        "device": card(roofline),
        "backend": BACKEND,
        "runtime": roofline.runtime.name,
        "runtime_basis": roofline.runtime.basis,
        "precision": precision,
        **({"target": roofline.target} if roofline.target else {}),
        "family": family(space.architecture(space.sample(random.Random(0)))),
        **plan.grid,
        "space": space_document,
        "estimated": True,
        "unverified": list(roofline.unverified),
        "sources": list(roofline.board.sources),
        "checked_by": checked_by(roofline.runtime.name, roofline.board.name),
        "validated_against": "the roofline's own whole models, not a board",
    }
    header = artefact.add_envelope(KIND, fields, SCHEMA_VERSION)
    measured = [_entry(probe, precision, roofline) for probe in plan.probes]
    validation = validate(LatencyTable(path, header, measured, {}, ""))
    for mode in MODES:
        validation[mode] |= _published(roofline, mode)
    lines = [artefact.canonical_json(header), *(add_checksum(m.to_line()) for m in measured)]
    artefact.write_text(path, "\n".join([*lines, add_checksum({"what": "validation", **validation})]) + "\n")
    return load_table(path)


def _entry(probe: Probe, precision: str, roofline: Roofline) -> Measurement:
    times_ms = [roofline.model_ms(a, probe.mode, probe.length, precision) for a in probe.models]
    return Measurement(probe.what, probe.mode, probe.length, probe.shape, (probe.cost(times_ms),), cache=probe.cache)


def _published(roofline: Roofline, mode: Mode) -> dict[str, Any]:
    """The errors of such estimates against published speeds, and their largest on either side as the error bar."""
    errors = unfitted_errors_percent(roofline.runtime.name, mode)
    if not errors:
        return {"published_models": 0, "low_percent": None, "high_percent": None}
    return {
        "published_models": len(errors),
        "published_mape_percent": statistics.fmean(map(abs, errors)),
        "low_percent": min(-abs(errors[0]), errors[0]),
        "high_percent": max(abs(errors[-1]), errors[-1]),
    }


def card(roofline: Roofline) -> dict[str, Any]:
    """The device card of the roofline's board: what its data says, everything else unknown."""
    board, mode = roofline.board, roofline.power_mode
    unknown = device_card(os.devnull)  # of a machine without any file
    fields = {
        "name": f"{board.title} (estimated)",
        "module": board.module,
        "power_mode": mode.name,
        "gpu": {
            "sm_count": mode.sm_count,
            "max_mhz": mode.gpu_mhz,
            "l2_bytes": board.l2_bytes or "unknown",
            "compute_capability": board.compute_capability,
            "fp16_tflops": board.fp16_tflops(mode),
        },
        "bandwidth_gb_s": board.bandwidth_gb_s(mode),
        "emc_mhz": mode.emc_mhz,
        "cpu_mhz": mode.cpu_mhz or f"unknown, {ASSUMED_CPU_MHZ:g} taken",
        "cores": mode.cpu_cores or "unknown",
        "memory_bytes": board.memory_bytes or "unknown",
    }
    return {**unknown, **fields}
