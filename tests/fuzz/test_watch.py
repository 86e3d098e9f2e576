"""The fuzzer finds what it looks for: loaders that fail in each way are told from one that refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from fuzz.draft import Draft, Loader, sign_file
from fuzz.json_changes import canonical, encode, sha256
from fuzz.runner import Runner, Tally, save
from fuzz.watch import Watch

from merino_edge.errors import ArtefactError

HONEST = {"kind": "thing", "schema_version": 1, "tool_version": "1", "size": 3, "names": ["a", "b"]}


def _loader(use: Callable[[Path], object]) -> Loader:
    def seal(made: Draft) -> None:
        sign_file(made, "x.json")

    honest = {**HONEST, "sha256": sha256(canonical(HONEST) or b"")}
    return Loader("thing", lambda: {"x.json": encode(honest)}, use, seal=seal)


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    return Watch(tmp_path_factory.mktemp("watch"), seconds=0.3, memory_mb=700)


def _kinds(use: Callable[[Path], object], watch: Watch, executions: int = 60) -> set[str]:
    runner, tally = Runner(_loader(use), Path(watch.folder), watch), Tally()
    with watch.limited():
        for number in range(executions):
            runner.run(0, number, tally)
    return {kind for kind, _ in tally.findings}


def _size(folder: Path) -> object:
    return json.loads((folder / "x.json").read_text()).get("size")


def test_a_refusal_is_no_finding_and_hashes_hide_nothing(watch: Watch) -> None:
    reached = []

    def use(folder: Path) -> None:
        try:
            document = json.loads((folder / "x.json").read_bytes())
            stated = document.pop("sha256")
            if sha256(canonical(document) or b"") == stated:
                reached.append(document)
        except (ValueError, RecursionError, AttributeError, KeyError, TypeError):
            document = None
        if document != HONEST:
            raise ArtefactError("this is another thing", "make it again")

    assert _kinds(use, watch) == set()
    assert len([document for document in reached if document.get("size") != 3]) > 5  # behind the hash


def test_an_untyped_error_is_found(watch: Watch) -> None:
    assert "TypeError" in _kinds(lambda folder: _size(folder) + 1, watch)  # type: ignore[operator]


def test_a_long_line_is_found(watch: Watch) -> None:
    def use(folder: Path) -> None:
        if _size(folder) != 3:
            raise ArtefactError("this is another size", "x" * 10_000)

    assert _kinds(use, watch) >= {"LongLine"}


def test_a_hang_is_found(watch: Watch) -> None:
    def use(folder: Path) -> None:
        while _size(folder) != 3:
            pass

    assert _kinds(use, watch, 12) >= {"Hang"}


def test_memory_is_found(watch: Watch) -> None:
    def use(folder: Path) -> None:
        if _size(folder) != 3:
            np.ones(2**31, np.uint8)

    assert _kinds(use, watch, 20) & {"Memory", "MemoryError", "_ArrayMemoryError"}


def test_a_file_outside_is_found(watch: Watch, tmp_path: Path) -> None:
    def use(folder: Path) -> None:
        if _size(folder) != 3:
            (tmp_path / "outside").write_text("x")

    assert "WroteOutside" in _kinds(use, watch)


def test_the_same_number_changes_the_same(watch: Watch) -> None:
    runner = Runner(_loader(_size), Path(watch.folder), watch)
    first = [runner.changes(1, number) for number in range(40)]
    assert first == [runner.changes(1, number) for number in range(40)]
    assert first != [runner.changes(2, number) for number in range(40)]


def test_a_finding_is_kept_without_the_changes_that_it_does_not_need(watch: Watch, tmp_path: Path) -> None:
    runner, tally = Runner(_loader(lambda folder: _size(folder) + 1), Path(watch.folder), watch), Tally()  # type: ignore[operator]
    with watch.limited():
        number = next(n for n in range(100) if (found := runner.run(0, n, tally)) and found.kind == "TypeError")
        finding = runner.run(0, number, tally)
        assert finding is not None
        changes = runner.minimise(0, number, finding)
        assert runner.execute(changes).finding == finding
    save(runner, changes, finding, tmp_path / "kept", 0, number)
    assert "TypeError" in (tmp_path / "kept/why.txt").read_text() and (tmp_path / "kept/files/x.json").is_file()
