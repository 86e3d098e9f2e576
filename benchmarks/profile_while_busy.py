"""Profiles beside busy programs: how far off the tables are, and that none that is bad is called good.

    python benchmarks/profile_while_busy.py [--tries 20] [--minutes 2] [--burners 1,2] [--threads 1,2] [--reference T]

Each try runs `merino-edge profile` while --burners other programs never rest: half of them only count, the others walk
through memory. Its exit code and verdict are compared with its errors. With --reference, a table of the same space that
was measured while nothing else ran, predictions are also compared with that table's whole models: a table that agrees
with itself may still describe a busy machine. A try is bad if any of its errors is above 15 % and it was not refused.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from merino_edge.architecture import Architecture
from merino_edge.errors import UnfitTableError
from merino_edge.latency.measurement import MODES
from merino_edge.latency.table import LatencyTable
from merino_edge.latency.table_file import load_table

COUNTS = "while True: pass"
WALKS = "import numpy as np\nmemory = np.ones(2**24)\nwhile True: memory.sum()"
LIMIT_PERCENT = 15.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tries", type=int, default=20)
    parser.add_argument("--minutes", type=float, default=2.0)
    parser.add_argument("--burners", default="1,2")
    parser.add_argument("--threads", default="1,2")
    parser.add_argument("--space", default="demo")
    parser.add_argument("--precision", default="int4")
    parser.add_argument("--reference", type=Path)
    options = parser.parse_args()
    quiet = load_table(options.reference) if options.reference else None
    ways = itertools.cycle(itertools.product(options.burners.split(","), options.threads.split(",")))
    wrong, called = 0, dict.fromkeys(("good", "usable", "do not use"), 0)
    with tempfile.TemporaryDirectory() as folder:
        for number, (burners, threads) in zip(range(options.tries), ways, strict=False):
            path = Path(folder) / f"{number}.jsonl"
            command = [sys.executable, "-m", "merino_edge", "profile", "--space", options.space, "--threads", threads]
            command += ["--minutes", str(options.minutes), "--precision", options.precision, "--json"]
            others = [burner(number + i) for i in range(int(burners))]
            try:
                done = subprocess.run([*command, "--out", path], capture_output=True)
            finally:
                for other in others:
                    other.kill()
                    other.wait()
            verdict = json.loads(done.stdout)["verdict"]
            table = load_table(path)
            errors = {mode: table.validation[mode].get("mape_percent", 0.0) for mode in MODES}
            beside = {mode: against(table, quiet, mode) for mode in MODES} if quiet else {}
            refused = done.returncode == UnfitTableError.exit_code
            bad = max(errors.values()) > LIMIT_PERCENT
            wrong += refused != (verdict["word"] == "do not use") or (bad and not refused)
            wrong += verdict["word"] == "good" and max(beside.values(), default=0.0) > LIMIT_PERCENT
            called[verdict["word"]] += 1
            shown = ", ".join(f"{mode} {error:.1f} %" for mode, error in errors.items())
            shown += "".join(f", {mode} against the quiet table {error:.1f} %" for mode, error in beside.items())
            print(
                f"try {number}: {burners} busy, {threads} threads: {verdict['word']}, exit {done.returncode}; {shown}; "
                f"{'; '.join(verdict['reasons'])}",
                flush=True,
            )
    print(f"{options.tries} tries on {os.cpu_count()} cores: {called}; {wrong} bad ones that were not refused")


def burner(number: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", WALKS if number % 2 else COUNTS])


def against(table: LatencyTable, quiet: LatencyTable, mode: str) -> float:
    """The mean error of the table's predictions of the whole models that were measured for `quiet`."""
    lines = (m for m in quiet.measurements if m.what == "model" and m.mode == mode and not m.failed)
    return statistics.fmean(
        100 * abs(table.model_ms(Architecture.from_dict(m.shape["architecture"]), m.mode, m.length) / m.median_ms - 1)
        for m in lines
    )


if __name__ == "__main__":
    main()
