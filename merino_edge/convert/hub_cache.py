"""The cache folder of the Hugging Face hub: which model and revision a folder in it is.

    models--OWNER--NAME/refs/main (a revision)     models--OWNER--NAME/snapshots/REVISION/ (links to the files)

Source: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from merino_edge import artefact, limits
from merino_edge.errors import ArtefactError, InputError

PREFIX = "models--"


@dataclass(frozen=True)
class Snapshot:
    """A folder of a model's files, and where on the hub they are from; no name where it is any folder."""

    path: Path
    name: str = ""
    revision: str = ""

    @property
    def origin(self) -> dict[str, str]:
        """What `training.json` records of it."""
        return {"hub": self.name, "revision": self.revision} if self.name else {}


def snapshot(folder: Path) -> Snapshot:
    """The files that `folder` means: itself, or the newest revision where it is a model's folder in the cache.

    Raises ArtefactError where a download did not end, InputError for a whole cache.
    """
    if (folder / "snapshots").is_dir() and not (folder / "config.json").exists():
        revision = _revision(folder)
        return Snapshot(folder / "snapshots" / revision, _name(folder), revision)
    resolved = folder.resolve()
    if resolved.parent.name == "snapshots" and resolved.parent.parent.name.startswith(PREFIX):
        return Snapshot(folder, _name(resolved.parent.parent), resolved.name)
    models = sorted(path.name for path in folder.glob(f"{PREFIX}*") if (path / "snapshots").is_dir())
    if models and not (folder / "config.json").exists():
        several = ", ".join(models[:20])
        raise InputError(f"{folder} is the cache of {len(models)} models", f"give one of its folders: {several}")
    return Snapshot(folder)


def _revision(folder: Path) -> str:
    """The revision of branch `main`, else the one that is there."""
    reference = folder / "refs" / "main"
    if reference.is_file():
        revision = artefact.read_text(reference, limits.MAX_PROMPT_BYTES).strip()
        if revision and "/" not in revision and (folder / "snapshots" / revision).is_dir():
            return revision
    found = sorted(
        (path for path in (folder / "snapshots").iterdir() if path.is_dir()), key=lambda p: p.stat().st_mtime
    )
    if not found:
        raise ArtefactError(
            f"{folder} holds no whole revision", f"run: merino-edge import {_name(folder)} --out CHECKPOINT"
        )
    return max(found, key=lambda path: path.stat().st_mtime).name


def _name(folder: Path) -> str:
    return folder.resolve().name.removeprefix(PREFIX).replace("--", "/", 1)
