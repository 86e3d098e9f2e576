"""The states of an unfinished training, in a folder beside the checkpoint's files: the newest and the one before.

CKPT/state/state.json           kind "training-state", schema 1: `file`, `file_sha256` and the fields of the caller
                                (merino_edge.training.train); written last, when the named file is complete
           before.json          the same of the save before, from which a training goes on where the newest is damaged
           step-K.safetensors   named tensors
           corpus/              the tokens (merino_edge.data.corpus)
"""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

from torch import Tensor

from merino_edge import artefact, atomic
from merino_edge.checkpoint import check_header_size
from merino_edge.errors import ArtefactError, InputError, OutputError
from merino_edge.training.forms import State

KIND = "training-state"
SCHEMA_VERSION = 1
NEWEST, BEFORE = "state.json", "before.json"
LOG = "log.jsonl"  # beside the checkpoint's files (merino_edge.training.log)


def folder_of(out: Path | str) -> Path:
    """The state folder of checkpoint folder `out`."""
    return Path(out) / "state"


def exists(out: Path | str) -> bool:
    """Whether `out` holds an unfinished training."""
    return any((folder_of(out) / name).is_file() for name in (NEWEST, BEFORE))


def load(out: Path | str) -> dict[str, Any]:
    """The newest state of checkpoint folder `out` that is whole; `damaged` says why it is not the newest, or is None.

    Raises InputError where there is none, ArtefactError where none is whole.
    """
    if not exists(out):
        raise InputError(f"{out} holds no unfinished training", "leave out --continue")
    damage: ArtefactError | None = None
    for name in (NEWEST, BEFORE):
        try:
            head = artefact.read_json(folder_of(out) / name, KIND, SCHEMA_VERSION, form=State)
            _check_file(out, head)
            return {**head, "damaged": None if damage is None else damage.message}
        except ArtefactError as error:
            damage = damage or error
    assert damage is not None
    raise ArtefactError(damage.message, f"train again with another --out; the model that {out} holds stays") from None


def load_tensors(out: Path | str, head: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that `head` (from `load`) names. Raises ArtefactError where the file is missing or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    file = _check_file(out, head)
    check_header_size(file)
    try:
        return dict(load_file(file))
    except (SafetensorError, ValueError, KeyError, TypeError, OSError) as error:
        raise ArtefactError(f"{file} cannot be read ({error})", "train again with another --out") from None


def _check_file(out: Path | str, head: dict[str, Any]) -> Path:
    file = folder_of(out) / Path(str(head.get("file"))).name
    try:
        facts = file.stat()
        sha256 = _sha256(file, facts.st_size, facts.st_mtime_ns) if file.is_file() else ""
    except OSError:
        sha256 = ""
    if sha256 != head.get("file_sha256"):
        raise ArtefactError(f"{file} is missing or altered")
    return file


@functools.lru_cache(maxsize=4)
def _sha256(file: Path, size_bytes: int, time_ns: int) -> str:
    """The hash of a file of gigabytes, once for as long as size and time stay."""
    return artefact.sha256_file(file)


def save(out: Path | str, head: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Add a state; the newest until now stays. A kill at any moment leaves a whole one. Raises OutputError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    folder = folder_of(out)
    file = folder / f"step-{head['step']}.safetensors"
    hidden = atomic.hidden_name(file)
    try:
        with atomic.translate_os_errors(file):
            folder.mkdir(parents=True, exist_ok=True)
            save_file(tensors, hidden)
            with open(hidden, "rb+") as written:
                os.fsync(written.fileno())
            sha256 = artefact.sha256_file(hidden)
            os.replace(hidden, file)
    except SafetensorError as error:
        raise OutputError(f"cannot write {file} ({error})", "choose another --out or free the disk") from error
    finally:
        atomic.remove(hidden)
    kept = {file}
    if (newest := _named(folder / NEWEST)) not in (None, file):
        artefact.write_bytes(folder / BEFORE, (folder / NEWEST).read_bytes())
        kept.add(folder / str(newest))
    artefact.write_json(folder / NEWEST, KIND, {**head, "file": file.name, "file_sha256": sha256}, SCHEMA_VERSION)
    for old in set(folder.glob("step-*")) - kept:
        old.unlink(missing_ok=True)


def _named(path: Path) -> Path | None:
    """The file of the state at `path`; None where there is none, or it is damaged."""
    try:
        head = artefact.read_json(path, KIND, SCHEMA_VERSION)
    except ArtefactError:
        return None
    return path.with_name(Path(str(head.get("file"))).name)


def end(out: Path | str) -> None:
    """Remove the states of a training that is finished, by one rename first: no part of them is taken for a state."""
    folder = folder_of(out)
    hidden = atomic.hidden_name(folder)
    try:
        os.rename(folder, hidden)
    except OSError:
        hidden = folder
    atomic.remove(hidden)
