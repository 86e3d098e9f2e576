"""The steps of the demo. A step that was made from the same inputs is kept; one that was interrupted goes on.

`state.json` in the demo's folder has an entry for each step that began:

    "steps": {NAME: {"key": hash of everything that the step depends on,
                     "made": {file or folder: its hash}, "result": {...}, "seconds": 12.3, "other_load": 0.02}}

An entry without "made" is a step that did not end. `other_load` is the share of all cores that other programs used.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merino_edge.cli.child_verb import run_verb

if TYPE_CHECKING:
    from rich.console import Console

KIND = "demo_state"
STATE = "state.json"
Result = dict[str, Any]


class Steps:
    """Runs the steps of the demo in `folder`. `machine` is what a measured step depends on besides its inputs."""

    def __init__(self, folder: Path, machine: dict[str, Any], console: Console) -> None:
        from merino_edge import artefact
        from merino_edge.cli.demo_forms import State

        self.folder, self.machine, self.console = folder, machine, console
        self._interrupted = False
        self.records: dict[str, Result] = {}
        if (folder / STATE).exists():
            self.records = artefact.read_json(folder / STATE, KIND, form=State)["steps"]

    def done(self, name: str) -> bool:
        """Whether the step ended in an earlier run, from whatever inputs."""
        return "made" in self.records.get(name, {})

    def other_load(self, name: str) -> float | None:
        """The share of all cores that other programs used meanwhile."""
        share: float | None = self.records[name].get("other_load")
        return share

    def verb(
        self,
        name: str,
        verb: str,
        *arguments: Path,
        reads: Sequence[str] = (),
        made: Sequence[str],
        begun: Sequence[str] = (),
        measured: bool = False,
        **options: object,
    ) -> Result:
        """Run a verb of this program, and return what it prints as JSON.

        `options` as on the command line: `max_tokens=80` is `--max-tokens 80`, `raw=True` is `--raw`. `reads` and
        `made` name files and folders of the demo. If one of `begun` exists after an interruption, the verb goes on.
        """
        words = [verb, *map(str, arguments)]
        for option, value in options.items():
            words += [f"--{option.replace('_', '-')}", *([] if value is True else [str(value)])]

        def run() -> Result:
            return self._run(
                [*words, *(["--continue"] if any((self.folder / name).exists() for name in begun) else [])]
            )

        facts = {"words": [word.replace(str(self.folder), "") for word in words], **(self.machine if measured else {})}
        return self.own(name, run, reads=reads, made=made, facts=facts)

    def own(
        self,
        name: str,
        run: Callable[[], Result],
        *,
        reads: Sequence[str] = (),
        made: Sequence[str] = (),
        facts: dict[str, Any],
    ) -> Result:
        """Run a step, unless it was done with the same inputs."""
        from merino_edge import __version__, artefact
        from merino_edge.jetson.device.other_load import LoadMeter

        inputs = {path: _hash(self.folder / path) for path in reads}
        key = artefact.sha256_text(artefact.canonical_json({"tool": __version__, "inputs": inputs, **facts}))
        record = self.records.get(name, {})
        if record.get("key") == key and record.get("made") == {path: _hash(self.folder / path) for path in made}:
            self.console.print(f"{name}: kept", style="dim", highlight=False)
            return dict(record["result"])
        if record.get("key") != key or "made" in record:
            self._remove(made)
        self._write(name, {"key": key})
        meter, began = LoadMeter(()), time.monotonic()
        result = run()
        load = meter.load()
        ended = {
            "made": {path: _hash(self.folder / path) for path in made},
            "result": result,
            "seconds": round(time.monotonic() - began, 1),
            "other_load": None if load is None else round(load.of_all, 3),
        }
        self._write(name, {"key": key, **ended})
        if self._interrupted:
            raise KeyboardInterrupt
        return result

    def _remove(self, made: Sequence[str]) -> None:
        """Remove what an earlier run made from other inputs, or what an older version of the demo left."""
        from merino_edge import artefact

        for path in (self.folder / name for name in made):
            if path.is_dir() and artefact.is_artefact_folder(path):
                shutil.rmtree(path)
            elif path.is_file():
                path.unlink()

    def _write(self, name: str, record: Result) -> None:
        from merino_edge import artefact

        self.records[name] = record
        artefact.write_json(self.folder / STATE, KIND, {"steps": self.records})

    def _note_interrupt(self) -> None:
        self._interrupted = True

    def _run(self, words: list[str]) -> Result:
        self.console.print(f"\n[bold]$ merino-edge {' '.join(words)}[/bold]", soft_wrap=True, highlight=False)
        with tempfile.TemporaryFile("w+") as printed:
            run_verb([*words, "--json"], stdout=printed, on_interrupt=self._note_interrupt)
            printed.seek(0)
            document: Result = json.load(printed)
        return document


def _hash(path: Path) -> str | None:
    """The hash of a file, or of all files of a folder; None where there is nothing."""
    from merino_edge import artefact

    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return artefact.sha256_text(
            "".join(f"{file.relative_to(path)} {artefact.sha256_file(file)}\n" for file in files)
        )
    return artefact.sha256_file(path) if path.is_file() else None
