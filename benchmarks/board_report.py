"""One file about a Jetson, to send back: what works on it, how fast models run, and how far predictions are off.

    python benchmarks/board_report.py report --dry-run      # the steps and their minutes
    python benchmarks/board_report.py report                # writes report/board-report.json at the end

It takes an hour or two on a board, most of it TensorRT's compiling. The steps are `doctor`, a quick profile, and five
models at two precisions: tokens/s, tokens/J, and both predictions beside them. After Ctrl-C or a loss of power, run it
again: finished steps stay, and failed ones are tried again. It asks for nothing that needs root. So it measures in the
power mode that is set. Set another one and run it again: the file then has both.

Before it writes, it prints what is in the file. Names of the user and the machine, serial numbers and network
addresses are taken out.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import board_models
import child_process
from without_names import Names

from merino_edge import artefact, tensorrt_library
from merino_edge.errors import ArtefactError, MerinoError
from merino_edge.jetson.device.card import device_card
from merino_edge.jetson.device.nvpmodel import current_mode, power_modes
from merino_edge.jetson.doctor.features import GPU, LIBRARIES, ONNX_RUNTIME
from merino_edge.latency.table_file import load_table

REPORT, STEP = "board-report.json", "board_step"
BACKENDS = {tensorrt_library.TENSORRT: "tensorrt", tensorrt_library.RTX: "tensorrt-rtx"}
ON_CPU = "onnxruntime-cpu"
ROOT = Path("/")
DOCTOR, PROFILE = "doctor", "profile"
MODELS_FOLDER = Path(__file__).with_name("board_models.py")
# Minutes of a step with TensorRT, which compiles, and without; and the hours after which a step is given up.
MINUTES = {DOCTOR: (2, 1), PROFILE: (50, 4), "model": (5, 1)}
MOST_HOURS = {DOCTOR: 0.5, PROFILE: 6.0, "model": 1.0}
CONTENTS = (
    "the board: module, JetPack, power modes, clocks, temperatures, memory, versions of packages (doctor)",
    "a latency table of small models, as `profile` writes it",
    "tokens/s, tokens/J, memory and clocks of each model, and how far both predictions are off",
    "the seconds of each step, and the last lines of what failed",
)


class Step(NamedTuple):
    """A part of the report. `command` prints one JSON object."""

    name: str
    kind: str  # doctor, profile or model
    command: tuple[str | Path, ...]


class Report:
    """The steps in the power mode that is set now, and the folder that keeps what is finished."""

    def __init__(self, folder: Path, backend: str = "", *, tiny: bool = False, root: Path = ROOT) -> None:
        """`root`: where the file system of the board stands."""
        self.folder, self.tiny, self.root = folder / ("tiny" if tiny else "kept"), tiny, root
        mode = current_mode(root)
        self.mode = mode.name if mode else "unknown"
        self._backend = backend

    @property
    def backend(self) -> str:
        """The backend that was asked for; else the fastest that works, by the doctor if it was asked already."""
        found = self.result(DOCTOR)
        if self._backend:
            return self._backend
        if found is None:
            with contextlib.suppress(MerinoError):
                return BACKENDS[tensorrt_library.installed()]
            return ON_CPU
        features = found["features"]
        for library, name in LIBRARIES.items():
            if features[GPU]["on"] and features[name]["on"]:
                return BACKENDS[library]
        return "onnxruntime-cuda" if features[ONNX_RUNTIME]["on"] else ON_CPU

    @property
    def space(self) -> Path:
        """The file of the tiny space."""
        return self.folder / "space.json"

    def _table(self, mode: str, backend: str) -> Path:
        return self.folder / "tables" / f"{_file_name(mode)}-{backend}.jsonl"

    def steps(self) -> Iterator[Step]:
        """All steps in their order. Each is made when the one before it is finished."""
        verb = (sys.executable, "-m", "merino_edge")
        yield Step(DOCTOR, DOCTOR, (*verb, "doctor", "--json"))
        space, minutes = ("edge", "2") if not self.tiny else (str(self.space), "0.01")
        precision = board_models.PRECISIONS[0]
        table = self._table(self.mode, self.backend)
        options = ("--space", space, "--minutes", minutes, "--precision", precision, "--backend", self.backend)
        options += ("--continue", "--exit-zero")  # a bad table is evidence too
        yield Step(PROFILE, PROFILE, (*verb, "profile", *options, "--out", table, "--json"))
        fewer = ("--repetitions", "2", "--energy-seconds", "0.1") if self.tiny else ()
        for model in board_models.TINY_MODELS if self.tiny else board_models.MODELS:
            for form in board_models.PRECISIONS:
                command = (sys.executable, MODELS_FOLDER, model, form, "--backend", self.backend, *fewer)
                yield Step(f"{model} {form}", "model", command)

    def path_of(self, name: str) -> Path:
        """Where a step of this mode is kept."""
        return self.folder / "steps" / _file_name(self.mode) / f"{_file_name(name)}.json"

    def result(self, name: str, command: Sequence[str | Path] = ()) -> dict[str, Any] | None:
        """What a finished step printed; None where it failed, is damaged, or was another command."""
        with contextlib.suppress(ArtefactError):
            found = artefact.read_json(self.path_of(name), STEP)
            if found["result"] is not None and (not command or found["command"] == [str(word) for word in command[1:]]):
                return dict(found["result"])
        return None

    def run(self, step: Step) -> bool:
        """Run a step and keep its result, or why it failed."""
        began = time.monotonic()
        result, failed = _run(step.command, 3600 * MOST_HOURS[step.kind])
        kept = {
            "step": step.name,
            "mode": self.mode,
            "command": [str(word) for word in step.command[1:]],
            "backend": self.backend if step.kind != DOCTOR else "",
            "seconds": round(time.monotonic() - began, 1),
            "result": result,
            "failed": failed,
        }
        artefact.write_json(self.path_of(step.name), STEP, kept)
        return result is not None

    def contents(self) -> dict[str, Any]:
        """Everything that is finished, of each power mode, with the predictions."""
        modes = power_modes(self.root)
        listed = [{"id": mode.id, "name": mode.name, "gpu_cap": mode.gpu_cap} for mode in modes.values()]
        found: dict[str, Any] = {
            "contents": CONTENTS,
            "power_modes": {"set": self.mode, "all": listed, "note": "setting one needs root, so none was set"},
            "device": device_card(self.root),
            "modes": {},
        }
        for folder in sorted((self.folder / "steps").iterdir()):
            for path in sorted(folder.glob("*.json")):
                with contextlib.suppress(ArtefactError):  # damaged, in a mode that is not set now
                    step = artefact.remove_envelope(artefact.read_json(path, STEP))
                    found["modes"].setdefault(step["mode"], {})[step["step"]] = self._with_predictions(step)
        return found

    def _with_predictions(self, step: dict[str, Any]) -> dict[str, Any]:
        path = self._table(step["mode"], step["backend"])
        if step["step"] == PROFILE and path.is_file():
            step["table"] = path.read_text().splitlines()
        if step["result"] is None or step["step"] in (DOCTOR, PROFILE):
            return step
        with contextlib.suppress(MerinoError):
            table = load_table(path) if path.is_file() else None
            card = device_card(self.root)
            step["predictions"] = board_models.predictions(step["result"], card, step["mode"], table)
        return step


def _run(command: Sequence[str | Path], seconds: float) -> tuple[dict[str, Any] | None, str]:
    """What `command` prints, and "" or why it failed. Its progress goes to the terminal."""
    printed: list[str] = []
    last: deque[str] = deque(maxlen=8)
    with child_process.started(command, stderr=subprocess.PIPE) as process:
        assert process.stdout and process.stderr
        reader = threading.Thread(target=lambda: printed.append(process.stdout.read()), daemon=True)  # type: ignore[union-attr]
        clock = threading.Timer(seconds, child_process.end, [process])
        reader.start()
        clock.start()
        try:
            for row in process.stderr:
                last.append(row.strip())
                print(f"    {row.rstrip()}", file=sys.stderr, flush=True)
            code = process.wait()
        finally:
            clock.cancel()
    reader.join()
    with contextlib.suppress(ValueError, IndexError):
        if code == 0:
            return dict(json.loads(printed[0])), ""
    return None, f"{child_process.exit_text(code)}: {' | '.join(filter(None, last))}"


def _file_name(text: str) -> str:
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


def print_plan(report: Report) -> None:
    """The steps, and about how many minutes each takes."""
    total = 0
    for step in report.steps():
        done = report.result(step.name, step.command) is not None
        minutes = 0 if done else MINUTES[step.kind][0 if report.backend.startswith("tensorrt") else 1]
        total += minutes
        print(f"{'done' if done else f'{minutes:3} min'}  {step.name}")
    print(f"about {total} min in power mode {report.mode}, on {report.backend}; others need root: sudo nvpmodel -m N")


def print_results(document: dict[str, Any]) -> None:
    """A line for each model: what was measured, and the error of each prediction of a decode step."""
    for mode, steps in document["modes"].items():
        for name, step in steps.items():
            if step["result"] is None:
                print(f"{mode}  {name:<20} failed: {step['failed'][:120]}")
            elif name not in (DOCTOR, PROFILE):
                print(f"{mode}  {name:<20} {_measured(step)}")


def _measured(step: dict[str, Any]) -> str:
    speeds = {test["kind"]: test["tokens_per_second"] for test in step["result"]["tests"]}
    energy = step["result"]["energy"]
    parts = [f"{speeds['decode']:8.1f} tokens/s", f"prompt {speeds['prefill']:8.0f} tokens/s"]
    parts.append(f"{energy['tokens_per_joule']:6.1f} tokens/J" if energy else "no power sensor")
    for source, found in step.get("predictions", {}).items():
        error = found["decode"].get("error_percent")
        parts.append(f"{source} {'-' if error is None else f'{error:+.0f} %'}")
    return ", ".join(parts)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder to write; it keeps what is finished")
    parser.add_argument("--backend", default="", help="as in `merino-edge profile` [default: the fastest that works]")
    parser.add_argument("--dry-run", action="store_true", help="only print the steps and their minutes")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to try the report itself in a minute")
    options = parser.parse_args()
    report = Report(options.folder, options.backend, tiny=options.tiny)
    if options.dry_run:
        print_plan(report)
        return
    if options.tiny:
        artefact.write_text(report.space, json.dumps(board_models.TINY_SPACE))
    for number, step in enumerate(report.steps(), 1):
        if report.result(step.name, step.command) is not None:
            print(f"{number:2}  {step.name}: done before")
            continue
        print(f"{number:2}  {step.name}", flush=True)
        if not report.run(step):
            print("    failed; the report goes on, and says why")
    document = Names.of_this_machine(options.folder).removed_from(report.contents())
    print_results(document)
    path = options.folder / REPORT
    print(f"\n{path} will hold:", *(f"  {line}" for line in CONTENTS), sep="\n")
    print("not in it: names of the user and the machine, serial numbers, network addresses", flush=True)
    artefact.write_json(path, "board_report", document)
    print(f"wrote {path}, {path.stat().st_size / 1e6:.1f} MB: please send this one file")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        print("\ninterrupted; run the same command to go on", file=sys.stderr)
        sys.exit(130)
    except MerinoError as refusal:
        print(refusal, file=sys.stderr)
        sys.exit(refusal.exit_code)
