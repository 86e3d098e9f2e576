"""Fuzz what merino-edge reads: artefacts that are changed in their structure and hashed anew, in processes with limits.

    python benchmarks/fuzz.py --loader bundle --executions 50000 --seed 1
    python benchmarks/fuzz.py --executions 2000                    every loader
    python benchmarks/fuzz.py --loader bundle --seed 1 --replay 4711

Right is success, or a refusal in one line. A finding is any other exception, or 5 s of the processor, or 20 s in all.
So are 650 MB more, a process that dies, and a file written outside. It is kept as a folder, without the changes that
it does not need. The same seed and number always give the same files. The loaders and their changes are in tests/fuzz.
"""

from __future__ import annotations

import argparse
import faulthandler
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT / "tests")  # in place of this folder, where a module `fuzz` would be this file
sys.path.insert(1, str(ROOT))
STUCK_SECONDS = 60  # without an execution ending: stuck in a library, where no alarm is heard
MOST_DEATHS = 40  # of the workers of one range
EXAMPLES = 2  # kept of each kind and place


@dataclass
class Row:
    """The outcome for one loader."""

    loader: str
    executions: int = 0
    refused: int = 0
    seconds: float = 0.0  # of one processor
    slowest_seconds: float = 0.0
    peak_mb: float = 0.0
    findings: dict[str, list[int]] = field(default_factory=dict)  # "kind at place": numbers

    def add(self, tally: dict[str, Any]) -> None:
        self.executions += tally["executions"]
        self.refused += tally["refused"]
        self.seconds += tally["seconds"]
        self.slowest_seconds = max(self.slowest_seconds, tally["slowest_seconds"])
        self.peak_mb = max(self.peak_mb, tally["peak_mb"])
        for name, numbers in tally["findings"].items():
            self.findings.setdefault(name, []).extend(numbers)


# --- a worker: a range of executions of one loader --------------------------------------------------


def work(options: argparse.Namespace) -> None:
    """Run a range of executions and print what it gave as one line of JSON. Its progress is a number in a file."""
    printed = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # what the loaders print
    errors = sys.stderr
    from fuzz.every_loader import LOADERS
    from fuzz.runner import Runner, Tally, save
    from fuzz.watch import Watch
    from fuzz.watch import peak_mb as watch_peak_mb

    scratch = Path(options.scratch)
    watch = Watch(scratch, options.seconds, options.memory_mb)
    tempfile.tempdir = str(scratch)
    runner, tally = Runner(LOADERS[options.worker], scratch, watch), Tally()
    faulthandler.enable(errors)
    progress = os.open(options.progress, os.O_WRONLY)
    began = time.process_time()
    with watch.limited():
        base_mb = watch_peak_mb()
        for number in range(options.first, options.first + options.executions):
            os.pwrite(progress, struct.pack("<q", number), 0)
            finding = runner.run(options.seed, number, tally)
            if finding is None or len(tally.findings[finding.kind, finding.place]) > EXAMPLES:
                continue
            changes = runner.minimise(options.seed, number, finding)
            where = re.sub(r"\W+", "-", f"{finding.kind}-{finding.place}")[:120]
            folder = Path(options.findings) / runner.loader.name / where / str(number)
            save(runner, changes, finding, folder, options.seed, number)
    # The largest that this process ever was, with Python and its libraries.
    peak_mb = max(tally.more_mb + base_mb, watch_peak_mb())
    document = {
        "executions": tally.executions,
        "refused": tally.refused,
        "seconds": time.process_time() - began,
        "slowest_seconds": tally.slowest_seconds,
        "slowest_number": tally.slowest_number,
        "peak_mb": peak_mb,
        "findings": {f"{kind} at {place}": numbers for (kind, place), numbers in tally.findings.items()},
    }
    print(json.dumps(document), file=printed, flush=True)
    os._exit(0)  # threads of a server may still wait


# --- the parent ------------------------------------------------------------------------------------


def run_range(loader: str, first: int, count: int, options: argparse.Namespace) -> Row:
    """Run the executions first to first + count in workers. After a death the next one goes on behind it."""
    row, deaths = Row(loader), 0
    while count > 0 and deaths < MOST_DEATHS:
        scratch = Path(tempfile.mkdtemp(prefix="merino-fuzz-", dir=options.memory_folder))
        progress, errors = scratch / "progress", scratch / "errors"
        progress.write_bytes(struct.pack("<q", first - 1))
        (scratch / "files").mkdir()
        command = [sys.executable, __file__, "--worker", loader, "--seed", str(options.seed), "--first", str(first)]
        command += ["--executions", str(count), "--scratch", str(scratch / "files"), "--progress", str(progress)]
        command += ["--findings", str(options.findings), "--seconds", str(options.seconds)]
        command += ["--memory-mb", str(options.memory_mb)]
        with open(errors, "wb") as stream:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, env=environment(scratch))
            printed = wait(process, progress)
        (reached,) = struct.unpack("<q", progress.read_bytes())
        told = errors.read_text(errors="replace")
        shutil.rmtree(scratch, ignore_errors=True)
        if printed:
            row.add(json.loads(printed))
            return row
        if reached < first:
            raise SystemExit(f"{loader} does not read its honest files:\n{told[-3000:]}")
        deaths += 1
        name = "Hang in a library" if process.returncode == -signal.SIGABRT and "Current thread" in told else "Death"
        row.findings.setdefault(f"{name} ({process.returncode}) at {last_place(told)}", []).append(reached)
        row.executions += reached - first + 1
        count -= reached - first + 1
        first = reached + 1
    return row


def environment(scratch: Path) -> dict[str, str]:
    """One thread, and no cache of the user's."""
    threads = dict.fromkeys(("OMP_NUM_THREADS", "RAYON_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    own = {
        "MALLOC_ARENA_MAX": "2",
        "XDG_CACHE_HOME": str(scratch / "files"),
        "TOKENIZERS_PARALLELISM": "false",
        "TMPDIR": str(scratch / "files"),
    }
    return {**os.environ, **threads, **own, "TOKENIZERS_PARALLELISM": "false", "ORT_DISABLE_TELEMETRY": "1"}


def wait(process: subprocess.Popen[bytes], progress: Path) -> bytes:
    """What the worker printed. A worker whose progress stands still is ended; it says where it was."""
    last, since = b"", time.monotonic()
    while True:
        try:
            printed, _ = process.communicate(timeout=2)
            return printed
        except subprocess.TimeoutExpired:
            now = progress.read_bytes()
            if now != last:
                last, since = now, time.monotonic()
            elif time.monotonic() - since > STUCK_SECONDS:
                process.send_signal(signal.SIGABRT)  # faulthandler writes the stack
                time.sleep(2)
                process.kill()


def last_place(told: str) -> str:
    """The innermost frame of ours in what faulthandler wrote; it writes the innermost first."""
    for path, line, function in re.findall(r'File "([^"]*)", line (\d+) in (\S+)', told):
        for room in ("merino_edge", "search", "runtime", "export", "jetson"):
            if f"/{room}/" in path:
                return f"{room}/{path.rpartition(f'/{room}/')[2]}:{line} {function}"
    return " ".join(told.split())[-200:] or "?"


def fuzz(loader: str, options: argparse.Namespace) -> Row:
    """All executions of a loader, in as many workers at a time as were asked for."""
    share = -(-options.executions // options.workers)
    starts = range(options.first, options.first + options.executions, share)
    with ThreadPoolExecutor(options.workers) as pool:
        parts = list(
            pool.map(
                lambda first: run_range(loader, first, min(share, options.first + options.executions - first), options),
                starts,
            )
        )
    row = Row(loader)
    for part in parts:
        row.add(vars(part))
    return row


def replay(loader: str, options: argparse.Namespace) -> None:
    """Repeat one execution and say how it ended, with its traceback."""
    from fuzz.every_loader import LOADERS
    from fuzz.runner import Runner
    from fuzz.watch import Watch

    with tempfile.TemporaryDirectory(dir=options.memory_folder) as scratch:
        tempfile.tempdir = scratch
        runner = Runner(LOADERS[loader], Path(scratch), Watch(Path(scratch), options.seconds, options.memory_mb))
        changes = runner.changes(options.seed, options.replay)
        for name, content in changes.items():
            print(f"{name}: {'removed' if content is None else f'{len(content)} bytes'}")
            if content is not None:
                (runner.folder / name).write_bytes(content)
        print(runner.loader.use(runner.folder))


def print_rows(rows: list[Row]) -> None:
    print("| loader | executions | refused % | findings | a second | slowest s | largest MB |")
    print("|---|---|---|---|---|---|---|")
    for row in rows:
        rate, refused = row.executions / max(row.seconds, 1e-9), 100 * row.refused / max(1, row.executions)
        print(
            f"| {row.loader} | {row.executions:,} | {refused:.0f} | {len(row.findings)} | {rate:,.0f} "
            f"| {row.slowest_seconds:.2f} | {row.peak_mb:.0f} |"
        )
    print(f"\n{sum(row.executions for row in rows):,} executions")
    for row in rows:
        for name, numbers in sorted(row.findings.items()):
            print(f"{row.loader}: {len(numbers)} x {name}, for example {numbers[:3]}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loader", action="append", help="a loader, or several; left out: all")
    parser.add_argument("--executions", type=int, default=1000, help="of each loader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="the number of the first execution")
    parser.add_argument("--workers", type=int, default=1, help="processes at a time")
    parser.add_argument("--seconds", type=float, default=5, help="that an execution may take")
    parser.add_argument("--memory-mb", type=float, default=650, help="that an execution may add to the process")
    parser.add_argument("--findings", type=Path, default=ROOT / "build" / "fuzz", help="folder for what was found")
    parser.add_argument("--json", type=Path, help="add each loader's figures to this file, a line each")
    parser.add_argument("--replay", type=int, help="repeat the execution of this number, in this process")
    parser.add_argument("--memory-folder", default="/dev/shm" if Path("/dev/shm").is_dir() else None)
    for name in ("--worker", "--scratch", "--progress"):
        parser.add_argument(name, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(options)
    if options.replay is not None:
        replay(options.loader[0], options)
        return
    rows = []
    names = options.loader
    if not names:
        from fuzz.every_loader import LOADERS

        names = list(LOADERS)
    for name in names:
        rows.append(fuzz(name, options))
        print_rows(rows[-1:])
        if options.json:
            with open(options.json, "a") as file:
                file.write(json.dumps({"seed": options.seed, **vars(rows[-1])}) + "\n")
    if len(rows) > 1:
        print_rows(rows)
    sys.exit(any(row.findings for row in rows))


if __name__ == "__main__":
    main()
