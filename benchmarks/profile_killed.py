"""Kill a profile at random moments (kill -9), finish it with --continue, and check that nothing is lost or torn.

    python benchmarks/profile_killed.py [--times 20] [--seed 0] [--space demo]

After every kill each line that is complete must carry its own hash; in the end the table must load, leave nothing to
measure, and hold no entry twice and every entry that a kill had left.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from merino_edge.latency.table_file import load_table

SECONDS = (0.5, 40.0)  # from the start of a run: from before its first entry on
COMMAND = [sys.executable, "-m", "merino_edge", "profile", "--quick", "--exit-zero"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--space", default="demo")
    options = parser.parse_args()
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        path, kills, kept = Path(folder) / "table.jsonl", 0, set[str]()
        while kills < options.times:
            process = subprocess.Popen(
                _command(path, options.space), stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
            seconds = rng.uniform(*SECONDS)
            try:
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                kills += 1
            else:
                if process.returncode:
                    raise SystemExit(f"a profile ended with {process.returncode}")
                path.unlink()  # it was finished: begin again
                kept.clear()
                continue
            kept |= _check(path, kept)
            torn = path.exists() and not path.read_bytes().endswith(b"\n")
            print(f"killed {kills} after {seconds:.1f} s: {len(kept)} entries kept{', a line torn' * torn}", flush=True)
        started = time.perf_counter()
        subprocess.run(_command(path, options.space), check=True, stdout=subprocess.DEVNULL)
        table = load_table(path)
        keys = [f"{m.key} {m.repetition}" for m in table.lines]
        finished, seconds = path.read_bytes(), time.perf_counter() - started
        subprocess.run(_command(path, options.space), check=True, stdout=subprocess.DEVNULL)
        assert len(keys) == len(set(keys)), "an entry stands twice"
        assert kept <= set(keys), "an entry was lost"
        assert path.read_bytes() == finished, "something was left to measure"
        print(
            f"{kills} kills, the rest in {seconds:.0f} s: {len(keys)} entries, none twice, none lost, nothing left to"
            f" measure; validated against {table.validation['decode']['models']} models"
        )


def _command(path: Path, space: str) -> list[str]:
    return [*COMMAND, "--out", str(path), "--continue", *([] if path.exists() else ["--space", space])]


def _check(path: Path, before: set[str]) -> set[str]:
    """The entries that the file holds now."""
    if not path.exists():
        assert not before, "the table is gone"
        return set()
    keys = {f"{m.key} {m.repetition}" for m in load_table(path, unfinished=True).lines}
    assert before <= keys, "an entry was lost"
    return keys


if __name__ == "__main__":
    main()
