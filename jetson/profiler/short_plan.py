"""The short plan of a profile that follows a full table of another machine: a share of its entries, and whole models.

Everything else is transferred (merino_edge.latency.transfer). Held-out whole models are measured as in any profile, so
the table's errors are those of this machine.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from merino_edge.errors import InputError
from merino_edge.jetson.profiler.plan import HELD_OUT, QUICK_HELD_OUT, Plan
from merino_edge.latency.measurement import MODES
from merino_edge.latency.table import LatencyTable
from merino_edge.latency.transfer import chosen_entries, entries


def short_plan(plan: Plan, like: LatencyTable, share: float, *, quick: bool) -> Plan:
    """The probes of `plan` that are chosen of the table `like`, and held-out models: few if `quick`.

    Raises InputError where the plan has none of the chosen entries.
    """
    chosen = {m.key for m in chosen_entries(like, share)}
    parts = [p for p in plan.probes if p.key in chosen]
    if not parts:
        raise InputError(f"{like.path} shares no entry with what can be measured here", "profile without --like")
    models = [p for p in plan.probes if p.what == "model"][: len(MODES) * (QUICK_HELD_OUT if quick else HELD_OUT)]
    public = [p for p in plan.probes if p.what == "public"]
    return dataclasses.replace(plan, quick=quick, probes=(*parts, *models, *public))


def origin(like: LatencyTable, share: float) -> dict[str, Any]:
    """What the header of the new table says of the full one."""
    device = like.header.get("device", {}).get("name", "unknown")
    return {
        "from": like.path.name,
        "sha256": like.sha256,
        "device": device,
        "precision": like.precision,
        "threads": like.header.get("threads"),
        "estimated": like.estimated,
        "measured": len(chosen_entries(like, share)),
        "entries": len(entries(like)),
    }
