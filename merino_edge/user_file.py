"""Handwritten artefacts: lookup by name (of those in the package) or by path, and errors that name the mistake.

This module knows no kind of artefact. The users are merino_edge.training.recipe and merino_edge.distillation.prompts.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from merino_edge import names as near_names
from merino_edge.errors import ArtefactError, InputError


def names(folder: Path) -> list[str]:
    """The names of the packaged files, which lie in `folder`."""
    return sorted(path.stem for path in folder.glob("*.json"))


def find(folder: Path, name_or_path: Path | str, missing: str) -> Path:
    """The file with this name in `folder`, or else the path. Raises InputError that begins with `missing`."""
    path, packaged = Path(name_or_path), names(folder)
    if str(name_or_path) in packaged:
        return folder / f"{name_or_path}.json"
    if not near_names.is_missing(path):
        return path
    if found := near_names.find(name_or_path, packaged):
        return folder / f"{found}.json"
    hint = near_names.beside(path) or near_names.choose(name_or_path, packaged, ", or give a file")
    raise InputError(f"{missing} {name_or_path}", hint)


def require_known(value: Mapping[str, Any], known: Collection[str], path: Path, where: str = "") -> None:
    """Raise ArtefactError for a field that is none of `known`. `where` says where in the file, if not at its top."""
    if unknown := sorted(set(value) - set(known)):
        raise error(path, f"unknown field {unknown[0]!r}{where}", f"known: {', '.join(known)}")


def error(path: Path, what: str, hint: str) -> ArtefactError:
    """The error to raise for a mistake in the file."""
    return ArtefactError(f"{path}: {what}", hint)
