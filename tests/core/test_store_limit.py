"""The limit of the engine store: what was used least recently is removed, and never what is in use or just written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from merino_edge.engine_store import add_stored, store_folder
from merino_edge.errors import InputError
from merino_edge.store_limit import VARIABLE, hold, limit_bytes, mark_used, remove_least_used

MB = 1_000_000
ENTRY = {"library": "tensorrt", "version": "10.3.0", "capability": "SM87"}


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Engines of 1 MB each: four of bundles, where the first was used last, and two of profiles."""
    monkeypatch.setenv("MERINO_ENGINES", str(tmp_path))
    monkeypatch.setenv(VARIABLE, "0.004")
    (tmp_path / "profile").mkdir()
    for age, name in enumerate(("new.engine", "old.engine")):
        (tmp_path / "profile" / name).write_bytes(bytes(MB))
        os.utime(tmp_path / "profile" / name, (1e9 - age, 1e9 - age))
    for number in range(4):
        built = add_stored(store_folder(), str(number) * 64, bytes(MB), ENTRY)
        os.utime(built.path, (1e6 + number, 1e6 + number))
    mark_used(plan(tmp_path, 0))
    return tmp_path


def plan(store: Path, number: int) -> Path:
    (path,) = store.glob(f"{str(number) * 16}-*.plan")
    return path


def left(store: Path) -> list[str]:
    """The first characters of the engines and of their entries."""
    entries = {path.name[:1] for path in store.glob("*.json")}
    plans = {path.name[:1] for path in store.glob("*.plan")}
    assert entries == plans
    return sorted(plans | {path.name for path in store.glob("profile/*")})


def test_within_the_limit_nothing_is_removed(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for limit in ("0.006", "0", ""):  # 0 is no limit; unset is the usual one
        monkeypatch.setenv(VARIABLE, limit)
        assert remove_least_used(store, []) == "" and len(left(store)) == 6


def test_engines_of_profiles_go_first_then_those_used_least_recently(
    store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = remove_least_used(store, [])
    assert left(store) == ["0", "1", "2", "3"]
    assert line == f"the engine store is limited to 0.004 GB ({VARIABLE}): removed old.engine, new.engine"
    monkeypatch.setenv(VARIABLE, "0.002")
    removed = [plan(store, 1).name, plan(store, 2).name]
    assert remove_least_used(store, []).endswith(f"removed {', '.join(removed)}")
    assert left(store) == ["0", "3"]  # 0 is the oldest file, but was used


def test_a_profile_removes_none_of_a_bundle(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0.001")
    assert remove_least_used(store, [store / "profile" / "old.engine"], of_bundles=False).endswith("removed new.engine")
    assert left(store) == ["0", "1", "2", "3", "old.engine"]


def test_what_was_just_written_stays_however_large_it_is(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0.001")
    remove_least_used(store, [plan(store, 2), plan(store, 1)])
    assert left(store) == ["1", "2"]
    remove_least_used(store, [])
    assert left(store) == ["1"]  # the last of those that were kept counts as used last


def test_what_a_process_has_open_stays(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "0.001")
    code = (
        "import sys; from pathlib import Path; from merino_edge.store_limit import hold\n"
        "file = hold(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(plan(store, 1))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdin
        process.stdout.readline()
        with hold(plan(store, 2)):  # several may hold one, and this process may be the one that removes
            os.utime(plan(store, 1), (1, 1))  # the oldest
            assert remove_least_used(store, [])
        assert left(store) == ["1", "2"]
        process.stdin.close()
    remove_least_used(store, [])
    assert left(store) == ["2"]


@pytest.mark.parametrize("text", ["much", "-1", "nan", "inf", "8 GB"])
def test_a_limit_that_is_no_number_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(VARIABLE, text)
    with pytest.raises(InputError, match=f"{VARIABLE} is {text!r}; give a number of GB; 0 is no limit"):
        limit_bytes()
