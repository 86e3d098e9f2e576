"""Every loader refuses what was changed in one line: a bounded number of executions of each, the same in every run."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

pytest.importorskip("torch")

from fuzz.every_loader import LOADERS
from fuzz.runner import Runner, Tally
from fuzz.watch import Watch

EXECUTIONS, SECONDS = 250, 1.0


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    return Watch(tmp_path_factory.mktemp("fuzz"))


@pytest.mark.parametrize("name", LOADERS)
def test_a_changed_artefact_is_read_or_refused_in_one_line(name: str, watch: Watch) -> None:
    runner, tally, until = Runner(LOADERS[name], Path(watch.folder), watch), Tally(), time.monotonic() + SECONDS
    with watch.limited():
        for number in range(EXECUTIONS):
            runner.run(0, number, tally)
            if time.monotonic() > until:
                break
    assert tally.findings == {}, f"see: python benchmarks/fuzz.py --loader {name} --replay NUMBER"
    assert tally.refused > tally.executions / 20 or not runner.loader.refuses, (
        "the changes reach nothing that is checked"
    )
