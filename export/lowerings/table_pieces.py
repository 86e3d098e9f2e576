"""Tables in pieces: groups of rows, each a tensor of its own, where a target refuses large allocations."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import onnx_ir as ir
from onnx_ir.tape import Tape


def row_ranges(rows: int, table_bytes: int, most_bytes: int | None) -> list[tuple[int, int]]:
    """(first, end) of pieces of a table, about as large as each other and of at most `most_bytes` each."""
    count = 1 if most_bytes is None else math.ceil(table_bytes / most_bytes)
    size = math.ceil(rows / count)
    return [(first, min(first + size, rows)) for first in range(0, rows, size)]


def look_up(
    tape: Tape,
    shape: Callable[..., ir.Value],
    pieces: Sequence[ir.Value],
    ranges: Sequence[tuple[int, int]],
    rows: ir.Value,
) -> ir.Value:
    """The rows int64 [1, T] of a table [V, E] in `pieces`: [1, T, E]. `shape` writes a constant int64 [1].

    Every piece is looked up, at its first row where it lacks the row, and the one that has it is kept.
    """
    found: ir.Value | None = None
    for piece, (first, end) in zip(pieces, ranges, strict=True):
        below, zero = tape.op("Less", [rows, shape(first)]), shape(0)
        local = tape.op("Where", [below, zero, tape.op("Sub", [rows, shape(first)])])
        local = tape.op("Where", [tape.op("Less", [local, shape(end - first)]), local, zero])
        here = tape.op("Gather", [piece, local])  # [1, T, E]
        found = here if found is None else tape.op("Where", [tape.op("Unsqueeze", [below, shape(-1)]), found, here])
    assert found is not None
    return found
