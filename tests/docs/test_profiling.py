"""The commands of docs/profiling.md run as they are printed, in their order; only less is measured."""

from __future__ import annotations

import re
from pathlib import Path

from helpers.documented import run
from merino_edge.latency.table_file import load_table

SHORTER = {"--quick": "--minutes 0.01", "--space edge": "--space demo"}


def test_every_command_runs(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs/profiling.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    told = re.findall(r"`(merino-edge estimate --board [^`]*)`", text)
    commands = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()] + told
    ran = [c for c in commands if c.startswith("merino-edge") and ("profile" not in c or re.search("quick|dry-run", c))]
    assert len(ran) == 6
    for command in ran:
        run(command, tmp_path, SHORTER)
    assert load_table(tmp_path / "board.jsonl").finished and (tmp_path / "board.png").exists()
    assert load_table(tmp_path / "nano.jsonl").estimated
