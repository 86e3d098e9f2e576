"""A second table of the same board at another precision, for models whose blocks have precisions of their own.

The first table is of the precision that everything else has: it gives embedding, head, projections and the step-time
model. A block at another precision takes its entries and its bytes from the table of that precision. So the step-time
model sees what it sees for any model: warm and cold entries and bytes, each summed over the parts.
"""

from __future__ import annotations

from dataclasses import replace

from merino_edge.errors import InputError
from merino_edge.latency.table import LatencyTable

# Fields of the header in which the two must be alike, and those of the device in it.
ALIKE = ("backend", "threads", "family", "cache_buckets", "estimated")
DEVICE = ("name", "power_mode")


def beside(first: LatencyTable, table: LatencyTable) -> LatencyTable:
    """`table` by the step-time model of `first`. Raises InputError where the two are not of one board and program."""
    for fields, (a, b) in ((ALIKE, (first.header, table.header)), (DEVICE, (_device(first), _device(table)))):
        for name in fields:
            if a.get(name) != b.get(name):
                raise InputError(
                    f"{table.path} has {name} {b.get(name)}, {first.path} has {a.get(name)}",
                    f"measure both alike: merino-edge profile --precision {table.precision} --out {table.path}",
                )
    return replace(table, step_time=first.step_time)


def _device(table: LatencyTable) -> dict[str, object]:
    return dict(table.header.get("device", {}))
