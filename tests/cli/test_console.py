"""What is written where there is no terminal: whole lines, and progress now and then."""

from __future__ import annotations

import io
import sys

import pytest
from rich.console import Console
from rich.table import Table

from merino_edge.cli import console, progress_lines
from merino_edge.cli.progress_lines import ProgressLines, StatusLines

LONG = "run: merino-edge export " + "very/" * 60 + "long --out BUNDLE"


@pytest.fixture
def no_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)


def test_lines_are_whole_in_a_pipe(no_columns: None, capsys: pytest.CaptureFixture[str]) -> None:
    table = Table("name", "command")
    table.add_row("export", LONG)
    for screen in (console.stderr(), console.stdout()):
        screen.print(LONG)
        screen.print(table)
    said = capsys.readouterr()
    for stream in (said.out, said.err):
        assert sum(LONG in line for line in stream.splitlines()) == 2
        assert max(map(len, stream.splitlines())) < len(LONG) + 40  # a table is not as wide as the pipe


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def test_the_lines_of_a_progress() -> None:
    clock = Clock()
    lines = ProgressLines(Console(file=io.StringIO()), clock)
    task = lines.add_task("train", total=400, completed=100, note="reading the corpus")
    clock.now = 5.0
    assert lines.line() == "train: 100 of 400; reading the corpus"
    lines.update(task, completed=200, note="loss 3.1")
    clock.now = 100.0
    assert lines.line() == "train: 200 of 400, about 3 min left; loss 3.1"
    lines.advance(task, 200)
    assert lines.line() == "train: 400 of 400; loss 3.1"
    lines.add_task("tokenize", total=None)
    assert lines.line() == "tokenize: 2 min so far"


def test_lines_come_ever_more_rarely() -> None:
    clock = Clock()
    lines = StatusLines(Console(file=io.StringIO()), "comparing", clock)
    pauses = []
    while clock.now < 86_400:
        pauses.append(lines.pause())
        clock.now += pauses[-1]
    assert pauses[0] == 10.0 and pauses == sorted(pauses) and len(pauses) < 150  # in a day
    assert lines.line() == f"comparing, {clock.now / 3600:.1f} h so far"


def test_a_long_verb_prints_and_a_short_one_does_not(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with console.stderr().status("comparing"), console.progress() as bar:
        bar.advance(bar.add_task("measuring", total=3, note=""))
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(progress_lines, "FIRST_SECONDS", 0.01)
    said = ""
    with console.stderr().status("comparing") as status, console.progress() as bar:
        task = bar.add_task("measuring", total=3, note="")
        bar.advance(task)
        while not ("of 3" in said and "exporting" in said):  # the thread writes when it may
            status.update("exporting")
            said += capsys.readouterr().err
    assert "comparing, 0 s so far\n" in said or "exporting, 0 s so far\n" in said
    assert "measuring: 1 of 3, about 0 s left\n" in said


def test_a_reader_that_went_away_ends_no_verb(monkeypatch: pytest.MonkeyPatch) -> None:
    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    screen = console.stderr()
    screen.print("nobody reads this")
    assert screen.quiet


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (99, "99 s"), (150, "2 min"), (7200, "2.0 h")])
def test_times(seconds: float, text: str) -> None:
    assert progress_lines.spell_time(seconds) == text
