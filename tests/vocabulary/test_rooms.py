"""Who may import whom: rooms know the vocabulary and little else, and only the PyTorch wing imports PyTorch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

MAY_IMPORT = {
    "merino_edge": set(),
    "search": {"search"},
    "export": {"export"},
    "runtime": {"runtime"},
    "jetson": {"jetson", "export", "runtime"},
}
PYTORCH_WING = {
    "merino_edge/model.py",
    "merino_edge/proxies.py",
    "merino_edge/data.py",
    "merino_edge/training.py",
    "merino_edge/training_state.py",
    "merino_edge/training_log.py",
    "merino_edge/throughput.py",
    "merino_edge/workers.py",
    "merino_edge/optimizer.py",
    "merino_edge/objective.py",
    "merino_edge/study_runs.py",
    "merino_edge/torch_engine.py",
    "merino_edge/batched.py",
    "merino_edge/computing.py",
    "merino_edge/written.py",
    "merino_edge/teacher.py",
    "merino_edge/stored_logits.py",
    "export/calibration.py",
    "export/overflow.py",
    "export/parity.py",
    "export/sensitivity.py",
}
ROOMS = {"search", "export", "runtime", "jetson", "cli"}


def imported_modules(file: Path) -> set[str]:
    """Full names of everything a file imports at run time, wherever in it; blocks under TYPE_CHECKING apart."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def python_files(repository: Path, room: str) -> list[Path]:
    """Of the vocabulary its folder alone: `cli` may import every room."""
    return sorted((repository / room).glob("*.py" if room == "merino_edge" else "**/*.py"))


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_what_they_may(repository: Path, room: str) -> None:
    files = python_files(repository, room)
    assert files
    for file in files:
        parts = [name.split(".") for name in imported_modules(file)]
        reached = {p[1] for p in parts if p[0] == "merino_edge" and len(p) > 1 and p[1] in ROOMS}
        assert reached <= MAY_IMPORT[room], file


def test_only_the_pytorch_wing_imports_pytorch(repository: Path) -> None:
    files = [file for room in MAY_IMPORT for file in python_files(repository, room)]
    importers = {
        str(f.relative_to(repository)) for f in files if any(n.split(".")[0] == "torch" for n in imported_modules(f))
    }
    assert importers <= PYTORCH_WING
