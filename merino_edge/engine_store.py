"""The engine store: a folder of engines that TensorRT compiled on this machine, found by what they were compiled from.

    STORE/NAME.json         kind "engine", schema 1, with the entry of merino_edge.jetson.engine_build
          NAME-PLAN.plan    the engine; PLAN begins its sha256
          timings-HASH.bin  kernel timings, for the next build
          profile/          engines of profiles (merino_edge.jetson.profiler.compiled_models)

NAME is GRAPH-CAPABILITY-LIBRARY-VERSION. GRAPH begins a hash of the graph and its weights, since two models of one
shape have the same graph file. So a bundle may be read-only, and copies of it share their engines. Everything here can
be made again by `merino-edge build`, so the folder may be deleted.

The store is the folder $MERINO_ENGINES. Without that variable it is /engines, the container's volume, if this user may
write there. Elsewhere it is `engines` in the user's cache. merino_edge.store_limit bounds its size.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge import artefact
from merino_edge.bundle import Bundle
from merino_edge.bundle_forms import Engine
from merino_edge.errors import ArtefactError, OutputError

KIND = "engine"
SCHEMA_VERSION = 1
VARIABLE = "MERINO_ENGINES"
OF_CONTAINER = "engines"  # below the root
ELSEWHERE = f"set {VARIABLE} to a folder that you may write; in the container add: -v merino-engines:/engines"


@dataclass(frozen=True)
class BuiltEngine:
    """A compiled engine, in a bundle or in the store."""

    path: Path  # of the plan
    entry: dict[str, Any]  # as merino_edge.jetson.engine_build wrote it

    @property
    def is_stored(self) -> bool:
        """Whether it is in a store, not in a bundle."""
        return "graph_sha256" in self.entry

    def check(self) -> None:
        """Raise ArtefactError where the file is not the one that was written. A bundle checks its own when it loads."""
        wanted = self.entry.get("plan_sha256")
        if not self.path.is_file() or (wanted and artefact.sha256_file(self.path) != wanted):
            raise ArtefactError(f"{self.path} is missing or altered", "build it again: merino-edge build BUNDLE")


def store_folder(root: Path | str = "/") -> Path:
    """Where engines are written."""
    folders = store_folders(root)
    return next((folder for folder in folders if not _is_closed(folder, root)), folders[-1])


def store_folders(root: Path | str = "/") -> list[Path]:
    """Where engines are looked for. A volume that is read-only may hold some."""
    if named := os.environ.get(VARIABLE):
        return [Path(named)]
    volume = Path(root) / OF_CONTAINER
    return [*([volume] if volume.is_dir() else []), artefact.user_cache() / "engines"]


def _is_closed(folder: Path, root: Path | str) -> bool:
    return folder == Path(root) / OF_CONTAINER and not os.access(folder, os.W_OK | os.X_OK)


def check_room(folder: Path, needed_bytes: int, elsewhere: str = ELSEWHERE) -> None:
    """Raise OutputError where `folder` cannot be written or has less than `needed_bytes` free.

    `elsewhere`: how the user names another folder.
    """
    with _translated(folder, elsewhere):
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"1")
        free_bytes = shutil.disk_usage(folder).free
    if free_bytes < needed_bytes:
        raise OutputError(
            f"engines need about {needed_bytes / 1e6:,.0f} MB in {folder}, {free_bytes / 1e6:,.0f} MB are free",
            f"free the disk, or {elsewhere}",
        )


def add_stored(folder: Path, graph_sha256: str, plan: bytes, entry: dict[str, Any]) -> BuiltEngine:
    """Write an engine and its entry; they replace one of the same graph, GPU and library. Raises OutputError.

    The plan is complete before the entry names it, and the plan before is deleted only after that.
    """
    name = "-".join([graph_sha256[:16], *(str(entry[key]) for key in ("capability", "library", "version"))])
    plan_sha256 = hashlib.sha256(plan).hexdigest()
    path = _plan_path(folder, name, plan_sha256)
    written = {**entry, "graph_sha256": graph_sha256, "plan_sha256": plan_sha256}
    with _translated(folder):
        artefact.write_bytes(path, plan)
        artefact.write_json(folder / f"{name}.json", KIND, written, SCHEMA_VERSION)
        for old in folder.glob(f"{name}-*.plan"):
            if old != path:
                old.unlink(missing_ok=True)
    return BuiltEngine(path, written)


def engines_of(bundle: Bundle, root: Path | str = "/") -> list[BuiltEngine]:
    """The engines of a bundle's graphs, for whatever GPU: those in the bundle, then those of the stores by age."""
    mine = [BuiltEngine(bundle.path / entry["file"], entry) for entry in bundle.engines]
    stored = [
        pair
        for folder in store_folders(root)
        for context in bundle.contexts
        for pair in _stored(folder, bundle.graph_sha256(context))
    ]
    return [*mine, *(engine for _, engine in sorted(stored, key=lambda pair: pair[0]))]


def _stored(folder: Path, graph_sha256: str) -> Iterator[tuple[float, BuiltEngine]]:
    """Each engine with the time when its entry was written.

    An entry that cannot be read is as none: it may be another board's, and the next build writes this board's again.
    """
    for file in sorted(folder.glob(f"{graph_sha256[:16]}-*.json")):
        try:
            entry = artefact.remove_envelope(artefact.read_json(file, KIND, SCHEMA_VERSION, form=Engine))
            written_s = file.stat().st_mtime
        except (ArtefactError, OSError):
            continue
        if entry.get("graph_sha256") == graph_sha256:
            yield written_s, BuiltEngine(_plan_path(folder, file.stem, str(entry.get("plan_sha256"))), entry)


def _plan_path(folder: Path, name: str, plan_sha256: str) -> Path:
    return folder / f"{name}-{plan_sha256[:12]}.plan"


@contextmanager
def _translated(folder: Path, elsewhere: str = ELSEWHERE) -> Iterator[None]:
    try:
        yield
    except (OSError, OutputError) as error:
        reason = error.message if isinstance(error, OutputError) else f"{error.strerror or error}"
        raise OutputError(f"engines cannot be kept in {folder} ({reason})", elsewhere) from error
