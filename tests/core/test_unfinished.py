"""Parts of an interrupted command: kept for --continue, and for nothing else."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import pytest

from merino_edge.errors import Interrupted
from merino_edge.unfinished import PARTS, Unfinished


def interrupted(out: Path, *parts: str, key: object = 1, resume: bool = False) -> list[str]:
    """Do the parts, then Ctrl-C. Returns those that had to be made."""
    made: list[str] = []

    def make(part: str) -> list[object]:
        made.append(part)
        return [part, 0.1]

    def work() -> None:
        with Unfinished(out, key, resume=resume) as unfinished:
            for part in parts:
                assert unfinished.part(part, partial(make, part)) == [part, 0.1]
            raise KeyboardInterrupt

    with pytest.raises((Interrupted, KeyboardInterrupt)):
        work()
    return made


def test_parts_are_made_once(tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert interrupted(out, "a", "b") == ["a", "b"]
    assert interrupted(out, "a", "b", "c", resume=True) == ["c"]
    assert interrupted(out, "a", resume=False) == ["a"]  # anew
    assert interrupted(out, "a", key=2, resume=True) == ["a"]  # other inputs
    with Unfinished(out, 2, resume=True) as unfinished:
        assert unfinished.parts == {"a": ["a", 0.1]}
    assert os.listdir(tmp_path) == []


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Out of range"), Unfinished(tmp_path / "out", 1, resume=False) as unfinished:
        unfinished.part("a", lambda: ([1] and unfinished.add("b", 1)) or float("nan"))
    assert interrupted(tmp_path / "out") == [] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("cut", [1, 5, 40])
def test_a_cut_line_is_made_again(tmp_path: Path, cut: int) -> None:
    out = tmp_path / "out"
    interrupted(out, "a", "b")
    file = tmp_path / ".out.unfinished" / PARTS
    os.truncate(file, file.stat().st_size - cut)
    assert interrupted(out, "a", "b", resume=True) == ["b"]
    assert interrupted(out, "a", "b", resume=True) == []
