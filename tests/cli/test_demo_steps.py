"""A step of the demo is kept while it depends on the same things and what it made is as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from merino_edge.cli.console import stderr
from merino_edge.cli.demo_steps import STATE, Steps
from merino_edge.errors import ArtefactError


class Writer:
    """A step that writes its number of runs to a file."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.runs = folder, 0

    def __call__(self) -> dict[str, int]:
        self.runs += 1
        (self.folder / "out.txt").write_text(str(self.runs))
        return {"run": self.runs}


@pytest.fixture
def write(tmp_path: Path) -> Writer:
    (tmp_path / "in.txt").write_text("input")
    return Writer(tmp_path)


def result_of(write: Writer, **facts: object) -> int:
    """The result of the step, run by a program that has just started."""
    steps = Steps(write.folder, {"cpu": "one"}, stderr())
    return int(steps.own("write", write, reads=["in.txt"], made=["out.txt"], facts=facts)["run"])


def test_a_step_is_kept(write: Writer) -> None:
    assert [result_of(write, steps=4) for _ in range(3)] == [1, 1, 1] and write.runs == 1
    assert Steps(write.folder, {}, stderr()).done("write")


def test_a_step_is_run_again_if_anything_changed(write: Writer) -> None:
    assert result_of(write, steps=4) == 1
    assert result_of(write, steps=5) == 2  # an option
    (write.folder / "in.txt").write_text("another")
    assert result_of(write, steps=5) == 3  # an input
    (write.folder / "out.txt").write_text("altered")
    assert result_of(write, steps=5) == 4 and (write.folder / "out.txt").read_text() == "4"
    (write.folder / "out.txt").unlink()
    assert result_of(write, steps=5) == 5


def test_a_step_that_did_not_end_is_not_done(write: Writer) -> None:
    def interrupted() -> dict[str, int]:
        raise KeyboardInterrupt

    steps = Steps(write.folder, {}, stderr())
    with pytest.raises(KeyboardInterrupt):
        steps.own("write", interrupted, reads=["in.txt"], made=["out.txt"], facts={})
    assert not Steps(write.folder, {}, stderr()).done("write")
    assert result_of(write) == 1


def test_what_an_interrupted_step_left_stays_for_it_to_go_on(write: Writer) -> None:
    def half() -> dict[str, int]:
        (write.folder / "out.txt").write_text("half")
        raise KeyboardInterrupt

    def rest() -> dict[str, int]:
        return {"run": len((write.folder / "out.txt").read_text())}

    for run, expected in ((half, None), (rest, 4)):
        steps = Steps(write.folder, {}, stderr())
        if expected is None:
            with pytest.raises(KeyboardInterrupt):
                steps.own("write", run, made=["out.txt"], facts={})
        else:
            assert steps.own("write", run, made=["out.txt"], facts={}) == {"run": expected}


def test_other_inputs_remove_what_was_made_but_no_letters(write: Writer) -> None:
    assert result_of(write, steps=1) == 1
    (write.folder / "home").mkdir()
    (write.folder / "home" / "letter.txt").write_text("precious")
    steps = Steps(write.folder, {}, stderr())
    seen = steps.own("write", lambda: {"left": (write.folder / "out.txt").exists()}, made=["out.txt", "home"], facts={})
    assert seen == {"left": False} and (write.folder / "home/letter.txt").read_text() == "precious"


def test_an_altered_state_is_refused(write: Writer) -> None:
    result_of(write)
    state = json.loads((write.folder / STATE).read_text())
    state["steps"]["write"]["result"]["run"] = 9
    (write.folder / STATE).write_text(json.dumps(state))
    with pytest.raises(ArtefactError, match="sha256"):
        result_of(write)


def test_other_load_is_none_of_our_own(tmp_path: Path) -> None:
    """A verb of the demo keeps a core busy. That is not other work."""
    (tmp_path / "space.json").write_text('{"kind": "space", "schema_version": 2, "name": "x", "base": "demo"}')
    steps = Steps(tmp_path, {}, stderr())
    words = {"board": "orin-nano-8gb", "mode": "15W", "space": "demo", "precision": "int8", "quick": True}
    first = steps.verb("estimate", "estimate", made=["t.jsonl"], out=tmp_path / "t.jsonl", **words)
    share = steps.other_load("estimate")
    assert first["estimated"] and (share is None or 0 <= share <= 1)
    assert steps.verb("estimate", "estimate", made=["t.jsonl"], out=tmp_path / "t.jsonl", **words) == first
