"""Writes: all or nothing, both names exist at every moment, and what dead processes left goes."""

from __future__ import annotations

import contextlib
import errno
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from merino_edge import atomic
from merino_edge.errors import OutputError

BUNDLE = '{"kind": "bundle"}'


def fill(folder: Path, text: str) -> None:
    (folder / "manifest.json").write_text(BUNDLE)
    (folder / "text").write_text(text)


def made(path: Path, text: str) -> Path:
    with atomic.new_folder(path, "bundle") as new:
        fill(new, text)
    return path


@pytest.fixture(params=["exchange", "two renames"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "two renames":
        monkeypatch.setattr(atomic.ctypes, "CDLL", lambda *_, **__: object())
    return str(request.param)


@pytest.mark.usefixtures("way")
def test_a_folder_is_replaced_at_the_end(tmp_path: Path) -> None:
    out = made(tmp_path / "out", "old")
    with atomic.new_folder(out, "bundle") as new:
        fill(new, "new")
        assert (out / "text").read_text() == "old"
    assert (out / "text").read_text() == "new" and list(tmp_path.iterdir()) == [out]
    with pytest.raises(TypeError), atomic.new_folder(out, "bundle") as new:
        fill(new, None)  # type: ignore[arg-type]  # the marker is written by then
    assert (out / "text").read_text() == "new" and list(tmp_path.iterdir()) == [out]


def test_the_output_is_there_at_every_moment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, seen = made(tmp_path / "out", "old"), []
    rename = os.rename

    def watched(old: Path, new: Path) -> None:
        seen.append(out.exists())
        rename(old, new)
        seen.append(out.exists())

    monkeypatch.setattr(os, "rename", watched)
    made(out, "new")
    assert seen and all(seen[1:])


def test_a_link_to_a_folder_stays_one(tmp_path: Path) -> None:
    made(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    made(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "real" / "text").read_text() == "new"


def killed(work: Callable[[Path], None], path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=work, args=(path,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL


def die(path: Path) -> None:
    with atomic.new_folder(path, "bundle") as new:
        fill(new, "half")
        os.kill(os.getpid(), signal.SIGKILL)


def die_between_renames(path: Path) -> None:
    atomic.ctypes.CDLL = lambda *_, **__: object()  # type: ignore[assignment,misc]
    rename, calls = os.rename, []

    def kill_at_third(old: Path, new: Path) -> None:
        calls.append(1)
        if len(calls) == 3:  # new to path, path to old, then: new to path
            os.kill(os.getpid(), signal.SIGKILL)
        rename(old, new)

    os.rename = kill_at_third  # type: ignore[assignment]
    made(path, "new")


def test_the_next_run_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    out = made(tmp_path / "out", "old")
    killed(die, out)
    assert len(list(tmp_path.iterdir())) == 2 and (out / "text").read_text() == "old"
    made(out, "new")
    assert list(tmp_path.iterdir()) == [out] and (out / "text").read_text() == "new"


def use_almost_all_handles(path: Path) -> None:
    """Remove `path` while one handle is left."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
    held = []
    with contextlib.suppress(OSError):
        while True:
            held.append(open(os.devnull))  # noqa: SIM115
    held.pop().close()
    atomic.remove(path)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_folder_goes_with_one_handle_that_is_left(tmp_path: Path) -> None:
    for folder in ("gone", "gone/within"):
        (tmp_path / folder).mkdir()
        fill(tmp_path / folder, "text")
    (tmp_path / "gone" / "link").symlink_to(made(tmp_path / "kept", "text"))
    killed(use_almost_all_handles, tmp_path / "gone")
    assert list(tmp_path.iterdir()) == [tmp_path / "kept"]
    assert (tmp_path / "kept" / "text").read_text() == "text"


def test_without_an_exchange_the_old_folder_comes_back(tmp_path: Path) -> None:
    out = made(tmp_path / "out", "old")
    killed(die_between_renames, out)
    assert not out.exists()
    atomic.sweep(tmp_path, "out")
    assert (out / "text").read_text() == "old"
    atomic.sweep(tmp_path)
    assert list(tmp_path.iterdir()) == [out]


def test_what_a_living_process_writes_stays(tmp_path: Path) -> None:
    mine = atomic.hidden_name(tmp_path / "out")
    mine.mkdir()
    elsewhere = tmp_path / ".out.1-1-00000000-abcdef.new"
    elsewhere.mkdir()
    atomic.sweep(tmp_path)
    assert mine.exists() and elsewhere.exists()
    atomic.sweep(tmp_path, held=True)  # no other machine or container writes what this process has locked
    assert mine.exists() and not elsewhere.exists()


def test_a_file_of_another_kind_is_never_replaced(tmp_path: Path) -> None:
    table = tmp_path / "table.jsonl"
    atomic.write_bytes(table, b'{"estimated":false,"kind":"latency_table"}\n{}\n')
    for data in (b'{"kind": "architecture"}', b"\x89PNG", b"text"):
        with pytest.raises(OutputError, match="is a latency table"):
            atomic.write_bytes(table, data)
    atomic.write_bytes(table, b'{"kind":"latency_table"}\n')
    assert os.listdir(tmp_path) == ["table.jsonl"]


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    atomic.write_bytes(tmp_path / "a", b"old")
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OutputError, match="No space left"):
        atomic.write_bytes(tmp_path / "a", b"new")
    assert (tmp_path / "a").read_bytes() == b"old" and os.listdir(tmp_path) == ["a"]
    monkeypatch.undo()
    long = tmp_path / ("n" * 250)
    atomic.write_bytes(long, b"x")
    assert long.read_bytes() == b"x"
