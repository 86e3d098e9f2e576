"""The transfer between latency tables: a tenth of one table's entries and the whole other one, against held-out models.

    python benchmarks/table_transfer.py T1.jsonl T2.jsonl ... [--share 0.1] [--boards]

Takes every ordered pair of the tables. Of the second one 90 % of the entries are hidden and filled in from the first.
Predictions of the second table's held-out whole models are then compared with their measured times. Beside that stand
the error of the second table itself, with all its entries, and the machine's noise: how far repetitions of a model are
apart. --boards adds tables of an Orin Nano's power modes. They are simulated by a roofline, not measured.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import tempfile
from pathlib import Path
from typing import Any

from merino_edge.jetson.estimate.boards import board
from merino_edge.jetson.estimate.estimate import estimate
from merino_edge.jetson.estimate.roofline import Roofline, runtime
from merino_edge.jetson.profiler.validation import fitted, validate
from merino_edge.latency.measurement import MODES, WHOLE
from merino_edge.latency.table import LatencyTable
from merino_edge.latency.table_file import load_table
from merino_edge.latency.transfer import DEFAULT_SHARE, chosen_entries, entries, transfer
from merino_edge.search import space_file
from merino_edge.search.builtin_spaces import SPACES

BOARD, POWER_MODES = "orin-nano-8gb", ("7W", "15W", "25W", "MAXN_SUPER")
OURS = runtime("merino-edge")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="*", type=Path)
    parser.add_argument("--share", type=float, default=DEFAULT_SHARE)
    parser.add_argument("--boards", action="store_true")
    options = parser.parse_args()
    tables = [load_table(path) for path in options.tables]
    for one, other in itertools.permutations(tables, 2):
        print_pair(one, other, options.share)
    if options.boards:
        with tempfile.TemporaryDirectory() as folder:
            for one, other in itertools.permutations(simulated(Path(folder)), 2):
                print_pair(one, other, options.share)


def print_pair(one: LatencyTable, other: LatencyTable, share: float) -> None:
    figures = held_out(one, other, share)
    found = ", ".join(
        f"{mode} {figures[mode]['transferred']:.1f} % (all entries {figures[mode]['whole']:.1f} %, "
        f"noise {figures[mode]['noise']})"
        for mode in MODES
    )
    print(
        f"{name(one)} -> {name(other)}: {figures['measured']} of {figures['entries']} entries, the others "
        f"{figures['entry']:.1f} % off in the median; held-out models: {found}",
        flush=True,
    )


def held_out(one: LatencyTable, other: LatencyTable, share: float) -> dict[str, Any]:
    keys = {m.key for m in chosen_entries(one, share)}
    kept = [m for m in entries(other) if m.key in keys]
    filled = transfer(one, kept)
    truth = {m.key: m.median_ms for m in entries(other) if m.median_ms > 0}
    off = [100 * abs(m.median_ms / truth[m.key] - 1) for m in filled if m.key in truth]
    models = [m for m in other.measurements if m.what in WHOLE and m.what != "calibration"]
    tables = {
        "transferred": LatencyTable(other.path, other.header, [*kept, *filled, *models], {}, ""),
        "whole": LatencyTable(other.path, other.header, other.measurements, {}, ""),
    }
    errors = {key: validate(fitted(table)) for key, table in tables.items()}
    figures: dict[str, Any] = {
        "measured": len(kept),
        "entries": len(kept) + len(filled),
        "entry": statistics.median(off),
    }
    for mode in MODES:
        apart = other.validation[mode].get("visits_apart_percent")
        figures[mode] = {key: found[mode]["mape_percent"] for key, found in errors.items()}
        figures[mode]["noise"] = "none" if apart is None else f"{apart:.1f} %"
    return figures


def simulated(folder: Path) -> list[LatencyTable]:
    """Estimated tables of one board's power modes."""
    found = board(BOARD)
    document = space_file.to_dict(SPACES["paper"])
    return [
        estimate(
            folder / f"{BOARD}-{mode}.jsonl", SPACES["paper"], document, "int4", Roofline(found, found.mode(mode), OURS)
        )
        for mode in POWER_MODES
    ]


def name(table: LatencyTable) -> str:
    return f"{table.path.stem}{' (simulated)' if table.estimated else ''}"


if __name__ == "__main__":
    main()
