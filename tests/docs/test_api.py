"""The public Python API: the names of `merino_edge.__all__`, and that importing the package loads nothing heavy."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from pathlib import Path

import pytest

import merino_edge

HEAVY = ("numpy", "onnx", "onnxruntime", "rich", "tokenizers", "torch", "typer")


@pytest.mark.parametrize("name", merino_edge.__all__)
def test_every_name_resolves_and_has_a_docstring(name: str) -> None:
    value = getattr(merino_edge, name)
    assert inspect.getdoc(value)
    assert getattr(merino_edge, name) is value


def test_the_list_for_type_checkers_is_the_same(repository: Path) -> None:
    tree = ast.parse((repository / "merino_edge/__init__.py").read_text())
    (block,) = (
        node
        for node in tree.body
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
    )
    homes = {
        alias.asname or alias.name: node.module if alias.asname is None else f"{node.module}:{alias.name}"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert homes == merino_edge._HOMES
    assert sorted(merino_edge.__all__) == sorted(homes)
    assert set(merino_edge.__all__) <= set(dir(merino_edge))


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = merino_edge.nonsense  # type: ignore[attr-defined]


def test_importing_the_package_loads_no_heavy_library() -> None:
    code = f"import sys, merino_edge; print([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
