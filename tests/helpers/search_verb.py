"""Runs `search` and `pareto` in a process of their own, and writes the space files that they read."""

from __future__ import annotations

import subprocess
from pathlib import Path

from helpers.warm_python import run_merino
from merino_edge import artefact
from merino_edge.search import space_file
from merino_edge.search.space import Space


def merino(*arguments: object, verb: str = "search", code: int = 0) -> subprocess.CompletedProcess[str]:
    return run_merino(verb, *arguments, code=code)


def written(space: Space, folder: Path) -> Path:
    path = folder / f"{space.name}.json"
    artefact.write_json(path, space_file.KIND, space_file.to_dict(space), space_file.SCHEMA_VERSION)
    return path
