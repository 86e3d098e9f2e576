"""Claims: what may be replaced, and that one process at a time writes an output."""

from __future__ import annotations

import fcntl
import multiprocessing
import os
import signal
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from merino_edge import artefact, output
from merino_edge.errors import OutputError


def folder(path: Path, marker: str, kind: str) -> Path:
    artefact.write_json(path / marker, kind, {})
    return path


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PATIENCE_S", 0.0)


def claimed(path: Path, kind: str, **options: bool) -> None:
    with output.claim(path, kind, **options):
        pass


def test_what_may_be_replaced(tmp_path: Path) -> None:
    checkpoint = folder(tmp_path / "ck", "training.json", "checkpoint")
    bundle = folder(tmp_path / "b", "manifest.json", "bundle")
    with pytest.raises(OutputError, match="ck is a checkpoint already; add --force"):
        claimed(checkpoint, "checkpoint", force=False)
    claimed(checkpoint, "checkpoint", force=True)
    claimed(checkpoint, "checkpoint", resumes=True)
    for force in (True, False):
        with pytest.raises(OutputError, match="is a checkpoint, which a bundle never replaces"):
            claimed(checkpoint, "bundle", force=force)
    claimed(bundle, "bundle", force=False)
    claimed(tmp_path / "new", "bundle", force=False)
    with pytest.raises(OutputError, match=r"b/deep/x is inside .*/b, a bundle"):
        claimed(bundle / "deep" / "x", "checkpoint")
    folder(checkpoint / "state", "state.json", "training-state")
    with pytest.raises(OutputError, match="unfinished training; add --continue"):
        claimed(checkpoint, "checkpoint", force=False)
    assert sorted(os.listdir(tmp_path)) == ["b", "ck"]


def test_studies_and_demos_hold_outputs_of_other_verbs(tmp_path: Path) -> None:
    folder(tmp_path / "demo", "state.json", "demo_state")
    (tmp_path / "demo" / "letter.txt").touch()
    claimed(tmp_path / "demo" / "ck", "checkpoint", force=False)
    claimed(tmp_path / "demo", "demo_state", resumes=True)
    with pytest.raises(OutputError, match="is the folder of a demo"):
        claimed(tmp_path / "demo", "study", resumes=True)


def hold(path: Path, pipe: Connection) -> None:
    with output.lock(path):
        pipe.send(os.getpid())
        pipe.recv()


def test_the_second_process_is_refused_and_told_which_is_first(tmp_path: Path) -> None:
    out = tmp_path / "made" / "out"
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=hold, args=(out, there))
    process.start()
    try:
        pid = here.recv()
        with pytest.raises(OutputError, match=f"out is being written by process {pid}"), output.lock(out):
            pass
    finally:
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    assert (out.parent / ".out.lock").exists()
    with output.lock(out), output.lock(out):  # of a dead process; and the same process claims again
        pass
    assert os.listdir(out.parent) == []


def test_a_folder_that_was_made_for_nothing_goes(tmp_path: Path) -> None:
    claimed(tmp_path / "a" / "b" / "out", "bundle")
    assert os.listdir(tmp_path) == []


def test_the_lock_is_on_the_file_that_has_the_name(tmp_path: Path) -> None:
    """Whoever waited for a file that its holder removed takes the next one."""
    with open(tmp_path / ".out.lock", "w") as stale:
        fcntl.flock(stale, fcntl.LOCK_EX)
        os.unlink(stale.name)
        with output.lock(tmp_path / "out"):
            assert (tmp_path / ".out.lock").exists()
    assert os.listdir(tmp_path) == []


def test_leftovers_within_a_folder_go(tmp_path: Path) -> None:
    out = folder(tmp_path / "ck", "training.json", "checkpoint")
    (out / "state").mkdir()
    dead = [tmp_path / ".ck.999999-1-00000000-abcdef.new", out / "state" / ".step-5.999999-1-00000000-abcdef.new"]
    for path in dead:
        path.touch()
    claimed(out, "checkpoint", resumes=True)
    assert not any(path.exists() for path in dead)


def test_a_signal_between_the_file_and_the_lock_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls, real = [], fcntl.flock

    def struck(*words: int) -> None:
        calls.append(words)
        if len(calls) == 1:
            raise KeyboardInterrupt
        real(*words)

    monkeypatch.setattr("merino_edge.output.fcntl.flock", struck)
    with pytest.raises(KeyboardInterrupt), output.lock(tmp_path / "out"):
        pass
    assert calls and list(tmp_path.iterdir()) == []
    with output.lock(tmp_path / "out"):
        output._remove_unheld(tmp_path / "out")  # it is held
        assert output.lock_file(tmp_path / "out").exists()
