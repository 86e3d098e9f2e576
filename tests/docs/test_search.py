"""The commands of docs/search.md that need no board run as they are printed, and say what it says they say."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from helpers.documented import run

SHORTER = {"--points 40": "--points 4"}


def commands(text: str) -> list[str]:
    found = re.findall(r"^(?:    )?(merino-edge (?:search|pareto) .*)$", text, re.MULTILINE)
    return [command for command in found if "board.jsonl" not in command]


def test_every_command_runs(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs/search.md").read_text()
    (score,) = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.py").write_text(score)
    found = commands(text)
    assert len(found) >= 4
    for command in found:
        done = run(command, tmp_path, SHORTER)
        if command == found[0]:  # whose certificate is printed
            claim = re.findall(r"^    (score .*)$", text, re.MULTILINE)[0]
            assert claim in done.stderr
        if "--flops" in command:  # the recipe whose answer is told
            costs = json.loads((tmp_path / "model.json").read_text())["costs"]
            told = f"{costs['parameters'] / 1e6:.1f} M parameters, {costs['weight_mb@int4']:.1f} MB"
            assert told in text


def test_the_space_file_is_one(repository: Path, tmp_path: Path) -> None:
    from merino_edge.search.builtin_spaces import load_space

    (space,) = re.findall(r"^```json\n(.*?)^```", (repository / "docs/search.md").read_text(), re.MULTILINE | re.DOTALL)
    (tmp_path / "mine.json").write_text(space)
    assert load_space(str(tmp_path / "mine.json")).blocks == (2, 3)


def test_the_refusal_is_the_one_that_is_printed(repository: Path, tmp_path: Path) -> None:
    (line,) = re.findall(r"^    (merino-edge: .*)$", (repository / "docs/search.md").read_text(), re.MULTILINE)
    words = ["search", "--space", "edge", "--precision", "int4", "--flops", "3G", "--weight-mb", "1", "--out", "a.json"]
    done = subprocess.run(
        [sys.executable, "-m", "merino_edge.cli", *words], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stderr == f"{line}\n"
