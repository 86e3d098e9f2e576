"""Ctrl-C, termination, and two runs at once: one line, nothing half-written, and `--continue` continues."""

from __future__ import annotations

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.stranger import profile, run, train
from merino_edge import bundle, checkpoint
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
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


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_train_goes_on(good: Path, tmp_path: Path, merino: tuple[str, ...], number: signal.Signals) -> None:
    out = tmp_path / "checkpoint"
    command = train(good / "a.json", good, out, "--steps", 150, "--save-every", 5)
    code, stdout, err = interrupted([*merino, *command], lambda: (out / "training.json").exists(), number)
    assert (code, stdout) == (130, "") and ("--continue" in err or number == signal.SIGTERM)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"] and (out / "state/state.json").exists()
    assert run(*command, "--continue") == 0
    assert checkpoint.load(out).training["step"] == 150 and not (out / "state").exists()
    assert run(*train(good / "a.json", good, tmp_path / "whole", "--steps", 150, "--save-every", 5)) == 0
    resumed, whole = (checkpoint.load(path).weights for path in (out, tmp_path / "whole"))
    assert all((resumed[name] == whole[name]).all() for name in whole)


def test_before_the_first_save_training_leaves_nothing(good: Path, tmp_path: Path, merino: tuple[str, ...]) -> None:
    command = [*merino, *train(good / "a.json", good, tmp_path / "checkpoint")]
    stopped = interrupted(command, lambda: any(tmp_path.iterdir()), signal.SIGTERM)
    assert stopped[0] == 130 and stopped[2].endswith("merino-edge: interrupted\n") and not list(tmp_path.iterdir())


def test_two_exports_to_one_place(good: Path, tmp_path: Path, merino: tuple[str, ...]) -> None:
    """Each run succeeds or is refused, and the bundle at the end is complete."""
    out = tmp_path / "bundle"
    commands = [[*merino, "export", good / "checkpoint", "--out", out, "--precision", p] for p in ("fp32", "fp16")]
    both = [subprocess.Popen(list(map(str, c)), stdout=-1, stderr=-1, text=True) for c in commands]
    errors = [process.communicate(timeout=120)[1] for process in both]
    codes = [process.returncode for process in both]
    assert 0 in codes and set(codes) <= {0, 6} and not any("Traceback" in error for error in errors)
    assert bundle.load(out).precision in ("fp32", "fp16") and list(tmp_path.iterdir()) == [out]
