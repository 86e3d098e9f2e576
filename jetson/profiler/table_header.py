"""The header of a latency table that a profile writes: what was measured, on which device, with what.

A table may be continued by a profile whose header differs only in what it covers.
"""

from __future__ import annotations

import dataclasses
import random
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any

from merino_edge import artefact
from merino_edge.errors import InputError
from merino_edge.forms import UNSET, Count, Form, Positions, UnsetType
from merino_edge.jetson.device import card as device
from merino_edge.jetson.profiler.backends import Backend
from merino_edge.jetson.profiler.contention import STEP_SHARE
from merino_edge.jetson.profiler.plan import Axes, Plan
from merino_edge.jetson.profiler.short_plan import origin
from merino_edge.jetson.profiler.timer import can_probe_contention
from merino_edge.latency.forms import Reference
from merino_edge.latency.table import LatencyTable, family
from merino_edge.latency.table_file import KIND, SCHEMA_VERSION

if TYPE_CHECKING:
    from merino_edge.jetson.profiler.profiler import Request

LONG_CONTEXT = 2**20  # longer than any bucket of a cache
# Header fields that may differ between a table and a profile that continues it.
MOMENT = {"tool_version", "created", "clock_mhz", "sha256"}
VARYING = {*MOMENT, "space", "minutes", "also", *(field.name for field in dataclasses.fields(Axes))}


class Begun(Form):
    """What a profile reads of the header of a table that it continues or follows; its axes are read by Axes."""

    quick: bool
    reference: Reference
    default_length: Positions
    cache_bytes: Count | UnsetType = UNSET
    company_bytes: Count | UnsetType = UNSET


def make_header(
    request: Request, plan: Plan, card: dict[str, Any], cache_bytes: int, eviction_head_bytes: int
) -> dict[str, Any]:
    """The header of a new table."""
    space = request.space
    fields = {
        "device": card,
        "backend": request.backend.name,
        "lowering": request.backend.lowering_at(request.precision),
        "precision": request.precision,
        "threads": request.threads,
        "family": family(space.architecture(space.sample(random.Random(0)))),
        **plan.grid,
        **_buckets(request.backend),
        "cache_bytes": cache_bytes,
        "company_bytes": eviction_head_bytes,
        "contention_share": STEP_SHARE if can_probe_contention(request.backend, request.threads) else 0.0,
        "minutes": request.minutes,
        "space": request.space_document,
        **({"also": list(request.also)} if request.also else {}),
        **({"transferred": origin(request.like, request.share)} if request.like else {}),
        "estimated": False,
        "clock_mhz": device.clock_mhz(),
        "libraries": request.backend.versions(),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    return artefact.add_envelope(KIND, fields, SCHEMA_VERSION)


def _buckets(backend: Backend) -> dict[str, int]:
    """How many cache positions a step reads: {"cache_buckets"}, or {} where it reads the positions in use."""
    few = 3  # no power of two
    capacity = backend.cache_capacity(few, LONG_CONTEXT)
    return {} if capacity == few else {"cache_buckets": 0 if capacity == LONG_CONTEXT else capacity}


def continued_header(table: LatencyTable, header: dict[str, Any]) -> dict[str, Any]:
    """The header of the continued table; its own where it covers nothing more. Raises InputError."""
    path = table.path
    if (source := table.header.get("transferred")) and "transferred" not in header:
        raise InputError(f"{path} is transferred from {source.get('from')}", "continue it with the same --like")
    for name in (name for name in header if name not in VARYING):  # in the header's order: causes come first
        if name == "device":
            changed = "; ".join(device.differences(table.header.get("device", {}), header["device"]))
            if changed:
                raise InputError(f"{path} was begun on another device: {changed}", "choose another --out")
        elif table.header.get(name) != header[name]:
            raise InputError(
                f"{path} was begun with another {name}", "continue it as it was begun, or choose another --out"
            )
    if all(table.header.get(name) == header[name] for name in set(header) - MOMENT - {"device", "minutes"}):
        return table.header
    return header
