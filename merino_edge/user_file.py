"""Artefacts that a person writes, some of them in the package: found by name or path, refused by what is wrong in them.

Knows no kind of artefact (merino_edge.training.recipe and merino_edge.distillation.prompts have theirs).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from merino_edge.errors import ArtefactError, InputError


def names(folder: Path) -> list[str]:
    """Of those in the package, which lie in `folder`."""
    return sorted(path.stem for path in folder.glob("*.json"))


def find(folder: Path, name_or_path: Path | str, missing: str) -> Path:
    """The file of a name in `folder`, or else the path. Raises InputError, with `missing` for what there is not."""
    path, known = Path(name_or_path), names(folder)
    if str(name_or_path) in known:
        return folder / f"{name_or_path}.json"
    if not path.exists():
        raise InputError(f"{missing} {name_or_path}", f"give a file, or one of {', '.join(known)}")
    return path


def require_known(value: Mapping[str, Any], known: Collection[str], path: Path, where: str = "") -> None:
    """Raise ArtefactError for a field that is none of `known`; `where` in the file, if not at its top."""
    if unknown := sorted(set(value) - set(known)):
        raise error(path, f"unknown field {unknown[0]!r}{where}", f"known: {', '.join(known)}")


def error(path: Path, what: str, hint: str) -> ArtefactError:
    return ArtefactError(f"{path}: {what}", hint)
