"""Ctrl-C, termination, and two runs at once: one line, nothing half-written, and `--continue` continues."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.stranger import profile, run, train
from merino_edge import bundle, checkpoint, output
from merino_edge.checkpoint import Checkpoint
from merino_edge.latency.table_file import load_table


def interrupted(
    command: list[object], when: Callable[[], bool], number: signal.Signals = signal.SIGINT
) -> tuple[int, str, str]:
    """Start `command` and signal it as soon as `when()` is true. Returns exit code, stdout and stderr."""
    process = subprocess.Popen(list(map(str, command)), stdout=-1, stderr=-1, text=True)
    try:
        while not when():
            assert process.poll() is None, process.communicate()
            time.sleep(0.001)
        process.send_signal(number)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert "Traceback" not in err
    return process.returncode, out, err


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_export_leaves_nothing(good: Path, tmp_path: Path, merino: tuple[str, ...], number: signal.Signals) -> None:
    command = [*merino, "export", good / "checkpoint", "--out", tmp_path / "bundle"]
    stopped = interrupted(command, lambda: any(tmp_path.iterdir()), number)  # its temporary folder exists
    assert stopped == (130, "", "merino-edge: interrupted\n") and not list(tmp_path.iterdir())


def test_search_leaves_nothing(tmp_path: Path, merino: tuple[str, ...]) -> None:
    began = time.monotonic()
    evolution = ("--solver", "evolution", "--iterations", 10**9)
    command = [*merino, "search", *evolution, "--out", tmp_path / "a.json"]
    stopped = interrupted(command, lambda: time.monotonic() - began > 2)
    assert stopped == (130, "", "merino-edge: interrupted\n") and not list(tmp_path.iterdir())


def test_profile_goes_on(good: Path, tmp_path: Path, merino: tuple[str, ...]) -> None:
    table = tmp_path / "table.jsonl"
    code, out, err = interrupted(
        [*merino, *profile(good / "space.json", table)],
        lambda: table.exists() and '"samples"' in table.read_text(),  # a batch is measured
    )
    assert (code, out) == (130, "") and f"merino-edge profile --continue --out {table}" in err
    assert err.endswith("merino-edge: interrupted\n")
    begun = load_table(table, unfinished=True).lines
    assert begun and [path.name for path in tmp_path.iterdir()] == ["table.jsonl"]
    assert run("profile", "--continue", "--exit-zero", "--out", table) == 0
    assert load_table(table).lines[: len(begun)] == begun


LONGER = ("--steps", 150, "--save-every", 5)


@pytest.fixture(scope="module")
def uninterrupted(good: Path, tmp_path_factory: pytest.TempPathFactory) -> Checkpoint:
    out = tmp_path_factory.mktemp("uninterrupted") / "checkpoint"
    assert run(*train(good / "a.json", good, out, *LONGER)) == 0
    return checkpoint.load(out)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_train_goes_on(
    good: Path, uninterrupted: Checkpoint, tmp_path: Path, merino: tuple[str, ...], number: signal.Signals
) -> None:
    out = tmp_path / "checkpoint"
    command = train(good / "a.json", good, out, *LONGER)
    code, stdout, err = interrupted([*merino, *command], lambda: (out / "training.json").exists(), number)
    assert (code, stdout) == (130, "") and "stopped after step" in err and "--continue" in err
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"] and (out / "state/state.json").exists()
    assert run(*command, "--continue") == 0
    assert checkpoint.load(out).training["step"] == 150 and not (out / "state").exists()
    resumed, whole = checkpoint.load(out).weights, uninterrupted.weights
    assert all((resumed[name] == whole[name]).all() for name in whole)


def test_before_the_first_save_training_leaves_nothing(good: Path, tmp_path: Path, merino: tuple[str, ...]) -> None:
    command = [*merino, *train(good / "a.json", good, tmp_path / "checkpoint")]
    stopped = interrupted(command, lambda: any(tmp_path.iterdir()), signal.SIGTERM)
    assert stopped[0] == 130 and stopped[2].endswith("merino-edge: interrupted\n") and not list(tmp_path.iterdir())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_libraries_are_imported_is_one_line(number: signal.Signals) -> None:
    """The import of typer waits for the signal, which comes while it runs."""
    program = (
        "import os, signal, sys, builtins\n"
        "real = builtins.__import__\n"
        "def imports(name, *rest):\n"
        f"    if name == 'typer': os.kill(os.getpid(), {int(number)})\n"
        "    return real(name, *rest)\n"
        "from merino_edge.__main__ import run\n"
        "builtins.__import__ = imports\n"
        "run()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "merino-edge: interrupted\n")


def test_nohup_is_obeyed(merino: tuple[str, ...]) -> None:
    program = "import signal, sys; signal.signal(signal.SIGHUP, signal.SIG_IGN); sys.argv[1:] = ['targets']\n"
    program += "from merino_edge.__main__ import run\n"
    program += "try: run()\nexcept SystemExit: print(signal.getsignal(signal.SIGHUP) is signal.SIG_IGN)"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, text=True).stdout.endswith("True\n")


def test_two_exports_to_one_place(good: Path, tmp_path: Path, merino: tuple[str, ...]) -> None:
    """The second is refused at once, in a line that names the first process."""
    out = tmp_path / "bundle"
    command = [str(word) for word in (*merino, "export", good / "checkpoint", "--out", out)]
    with output.lock(out):
        done = subprocess.run(command, capture_output=True, text=True)
    assert (
        done.returncode == 6 and f"{out} is being written by process {os.getpid()}; wait until it ends" in done.stderr
    )
    assert subprocess.run(command, capture_output=True).returncode == 0
    assert bundle.load(out) and list(tmp_path.iterdir()) == [out]
