"""What pages suppose to stand in a reader's folder."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def edge_table(merino: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A latency table of the space `edge` at int4: estimated, in place of the one that a board measures."""
    path = tmp_path_factory.mktemp("edge") / "board.jsonl"
    options = ["--board", "orin-nano-8gb", "--space", "edge", "--precision", "int4", "--out", str(path)]
    subprocess.run([*merino, "estimate", *options], check=True, capture_output=True)
    return path
