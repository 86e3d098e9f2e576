"""Every field of every JSON artefact may hold anything, or be missing, and the loader still answers in one line.

An attack found a lone surrogate, 1e999, many brackets, or a list for a text to fail in single places. Here all places
are tried.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("torch")

from fuzz.draft import JSON, LINES, Draft
from fuzz.every_loader import LOADERS
from fuzz.json_changes import Raw, put
from fuzz.runner import Runner, Tally
from fuzz.watch import Watch

HARSH = (None, "\ud800", "[/]", "", -1, 0, 10**30, 5e-324, Raw("1e999"), Raw("9" * 5000), [], {}, [[]], {"a": {}})
DEEP = Raw("[" * 30_000 + "]" * 30_000)
MOST, SECONDS = 150, 1.0  # changes of one file, and the time for all of a loader
LEFT_OUT = ("state", "huggingface-gpt2", "huggingface-qwen2")  # slow, or the form of another
Path_ = tuple[Any, ...]


def _fields(document: Any, path: Path_ = ()) -> Iterator[Path_]:
    """The places of a document; of alike elements of a list only the first two."""
    items = document.items() if isinstance(document, dict) else enumerate(document[:2])
    for key, value in items:
        yield (*path, key)
        if isinstance(value, (dict, list)):
            yield from _fields(value, (*path, key))


def _changed(runner: Runner, name: str) -> Iterator[dict[str, bytes | None]]:
    honest = runner.loader.codec(name).decode(runner.honest[name])
    fields = list(_fields(honest))
    tried = len(HARSH) + 1
    step = max(1, -(-len(fields) * tried // MOST))  # a prime to the number of values would visit all; nearly is enough
    for number in range(0, len(fields) * tried, step + (step > 1 and tried % step == 0)):
        field, value = fields[number // tried], number % tried
        made = Draft(runner.loader, runner.honest)
        document = made.structures[name] = copy.deepcopy(honest)
        if value < len(HARSH):
            put(document, field, HARSH[value])
        else:
            _remove(document, field)
        runner.loader.seal(made)
        yield made.changes()
    for whole in (DEEP, [], 1, None, "x"):
        made = Draft(runner.loader, runner.honest)
        made.structures[name] = whole
        runner.loader.seal(made)
        yield made.changes()


def _remove(document: Any, field: Path_) -> None:
    for key in field[:-1]:
        document = document[key]
    del document[field[-1]]


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Watch:
    return Watch(tmp_path_factory.mktemp("fields"))


@pytest.mark.parametrize("name", [name for name in LOADERS if name not in LEFT_OUT])
def test_any_field_may_hold_anything(name: str, watch: Watch) -> None:
    runner, found = Runner(LOADERS[name], Path(watch.folder), watch), {}
    tally, until = Tally(), time.monotonic() + SECONDS
    with watch.limited():
        for file in runner.honest:
            if runner.loader.codec(file) not in (JSON, LINES) or not runner.loader.weights.get(file, 1):
                continue
            for number, changes in enumerate(_changed(runner, file)):
                if time.monotonic() > until:
                    break
                outcome = runner.execute(changes)
                tally.add(number, outcome)
                if outcome.finding is not None:
                    found.setdefault(
                        (outcome.finding.kind, outcome.finding.place), {k: v[-300:] for k, v in changes.items() if v}
                    )
    assert found == {}
    assert tally.refused or not tally.executions or not runner.loader.refuses
