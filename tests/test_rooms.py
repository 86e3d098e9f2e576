"""Who may import whom: rooms import only rooms below them, files never in a circle, and few rooms need PyTorch."""

from __future__ import annotations

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

# Each room, and the rooms below it that it may import; every room may import the shared nouns (merino_edge/*.py).
# `cli` stands above all.
MAY_IMPORT: dict[str, set[str]] = {
    "shared nouns": set(),
    "latency": set(),
    "data": set(),
    "convert": set(),
    "pytorch": set(),
    "distillation": {"data", "pytorch"},
    "training": {"data", "pytorch", "distillation"},
    "search": {"latency"},
    "runtime": set(),
    "export": {"data", "pytorch"},
    "jetson": {"latency", "pytorch", "export", "runtime"},
}
MAY_IMPORT["cli"] = set(MAY_IMPORT)

PYTORCH_ROOMS = {"pytorch", "training", "distillation", "cli"}
PYTORCH_FILES = {
    "export/parity.py",
    "export/sensitivity.py",
    "export/quantization/calibration.py",
    "export/quantization/fp16_overflow.py",
}

Imports = dict[str, set[str]]


def files(repository: Path) -> dict[str, Path]:
    """The module name of every file of the package."""
    found = {}
    for folder in ("merino_edge", "search", "export", "runtime", "jetson"):
        for file in sorted((repository / folder).rglob("*.py")):
            relative = file.relative_to(repository)
            if relative.parts[:2] in {("merino_edge", room) for room in ("search", "export", "runtime", "jetson")}:
                continue  # the links, where Python follows them
            parts = [part for part in relative.with_suffix("").parts if part != "__init__"]
            found[".".join(parts if parts[0] == "merino_edge" else ["merino_edge", *parts])] = file
    return found


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


def room_of(module: str, modules: dict[str, Path]) -> str:
    """The folder of `merino_edge` that a module lives in, at any depth."""
    parts = module.split(".")
    if module == "merino_edge.__main__":  # Python wants it there
        return "cli"
    is_folder = len(parts) > 1 and modules[".".join(parts[:2])].name == "__init__.py"
    return parts[1] if is_folder else "shared nouns"


@pytest.fixture(scope="module")
def modules(repository: Path) -> dict[str, Path]:
    return files(repository)


@pytest.fixture(scope="module")
def imports(modules: dict[str, Path]) -> Imports:
    """Which files of the package each of its files imports."""
    return {module: (imported_modules(file) & set(modules)) - {module} for module, file in modules.items()}


def test_every_room_is_known(modules: dict[str, Path]) -> None:
    assert {room_of(module, modules) for module in modules} == set(MAY_IMPORT)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_rooms_import_only_downwards(imports: Imports, modules: dict[str, Path], room: str) -> None:
    allowed = MAY_IMPORT[room] | {room, "shared nouns"}
    upwards = {
        f"{module} -> {other}"
        for module, others in imports.items()
        for other in others
        if room_of(module, modules) == room and room_of(other, modules) not in allowed
    }
    assert not upwards


def circle(imports: Imports) -> list[str]:
    """The modules of a circle, none where there is none. A package's own __init__ is imported with any part of it."""
    try:
        TopologicalSorter(imports).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


def test_nothing_imports_in_a_circle(imports: Imports) -> None:
    assert circle(imports) == []
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"a"}}) != []


def test_only_some_rooms_import_pytorch(repository: Path, modules: dict[str, Path]) -> None:
    importers = {
        str(file.relative_to(repository))
        for module, file in modules.items()
        if any(name.split(".")[0] == "torch" for name in imported_modules(file))
        and room_of(module, modules) not in PYTORCH_ROOMS
    }
    assert importers == PYTORCH_FILES
