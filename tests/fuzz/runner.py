"""Runs executions of one loader in this process. An execution is a number: the same number changes the same things."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path

from fuzz.draft import Files, Loader, draft
from fuzz.watch import Finding, Outcome, Watch

MEMORY_FOLDER = Path("/dev/shm")


@dataclass
class Tally:
    """What a row of executions gave."""

    executions: int = 0
    refused: int = 0
    slowest_seconds: float = 0.0
    slowest_number: int = -1
    more_mb: float = 0.0
    findings: dict[tuple[str, str], list[int]] = field(default_factory=dict)  # by kind and place: numbers

    def add(self, number: int, outcome: Outcome) -> None:
        self.executions += 1
        self.refused += outcome.refused
        self.more_mb = max(self.more_mb, outcome.more_mb)
        if outcome.seconds > self.slowest_seconds:
            self.slowest_seconds, self.slowest_number = outcome.seconds, number
        if outcome.finding is not None:
            self.findings.setdefault((outcome.finding.kind, outcome.finding.place), []).append(number)


class Runner:
    """A loader's honest files in a folder, of which each execution changes some and puts them back."""

    def __init__(self, loader: Loader, scratch: Path, watch: Watch) -> None:
        """Raises what the loader raises on its honest files: they must be read."""
        self.loader, self.watch = loader, watch
        self.folder = scratch / loader.name
        self.honest: Files = loader.make()
        self.lay_out()
        loader.use(self.folder)
        self.lay_out()
        self._names = self._present()

    def lay_out(self) -> None:
        """Write the honest files anew."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        for name, content in self.honest.items():
            path = self.folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)

    def _present(self, folder: str | None = None, above: str = "") -> set[str]:
        """All files and folders below the folder."""
        names = set()
        with os.scandir(folder or self.folder) as entries:
            for entry in entries:
                names.add(above + entry.name)
                if entry.is_dir(follow_symlinks=False):
                    names |= self._present(entry.path, f"{above}{entry.name}/")
        return names

    def changes(self, seed: int, number: int, skip: frozenset[int] = frozenset()) -> dict[str, bytes | None]:
        """What the execution changes."""
        return draft(self.loader, self.honest, f"{self.loader.name}.{seed}.{number}", skip)

    def execute(self, changes: dict[str, bytes | None]) -> Outcome:
        """Change the files, use them, and put them back."""
        for name, content in changes.items():
            if content is None:
                (self.folder / name).unlink()
            else:
                (self.folder / name).write_bytes(content)
        outcome = self.watch.run(self.loader.use, self.folder)
        if self.loader.writes or self._present() != self._names:
            self.lay_out()
        else:
            for name in changes:
                (self.folder / name).write_bytes(self.honest[name])
        return outcome

    def run(self, seed: int, number: int, tally: Tally) -> Finding | None:
        """One execution by its number."""
        outcome = self.execute(self.changes(seed, number))
        tally.add(number, outcome)
        return outcome.finding

    def minimise(self, seed: int, number: int, finding: Finding) -> dict[str, bytes | None]:
        """The changes of the execution without those steps that the finding does not need."""
        skip: frozenset[int] = frozenset()
        for step in range(5):
            tried = skip | {step}
            outcome = self.execute(self.changes(seed, number, tried))
            if outcome.finding is not None and (outcome.finding.kind, outcome.finding.place) == (
                finding.kind,
                finding.place,
            ):
                skip = tried
        return self.changes(seed, number, skip)


def save(runner: Runner, changes: dict[str, bytes | None], finding: Finding, to: Path, seed: int, number: int) -> None:
    """Keep a finding as a folder that the loader can be pointed at, with a line that says why."""
    shutil.rmtree(to, ignore_errors=True)
    for name, honest in runner.honest.items():
        content = changes.get(name, honest)
        if content is not None:
            (to / "files" / name).parent.mkdir(parents=True, exist_ok=True)
            (to / "files" / name).write_bytes(content)
    changed = ", ".join(changes) or "nothing"
    again = f"python benchmarks/fuzz.py --loader {runner.loader.name} --seed {seed} --replay {number}"
    line = f"{finding.kind} at {finding.place}: {finding.detail}\nchanged: {changed}\nagain: {again}\n"
    (to / "why.txt").write_text(line)
