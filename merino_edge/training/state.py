"""The state of an unfinished training: a folder beside the checkpoint's files that is replaced atomically.

CKPT/state/state.json           kind "training-state", schema 1: `file`, `file_sha256` and the fields of the caller
                                (merino_edge.training.trainer); written last, when the named file is complete
           step-K.safetensors   named tensors
           corpus/              the tokens (merino_edge.data.corpus)
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from merino_edge import artefact
from merino_edge.errors import ArtefactError, InputError, OutputError

KIND = "training-state"
SCHEMA_VERSION = 1
LOG = "log.jsonl"  # beside the checkpoint's files (merino_edge.training.log)


def folder_of(out: Path | str) -> Path:
    """The state folder of checkpoint folder `out`."""
    return Path(out) / "state"


def exists(out: Path | str) -> bool:
    """Whether `out` holds an unfinished training."""
    return (folder_of(out) / "state.json").is_file()


def load(out: Path | str) -> dict[str, Any]:
    """The verified state.json of checkpoint folder `out`. Raises InputError where there is none, ArtefactError."""
    if not exists(out):
        raise InputError(f"{out} holds no unfinished training", "leave out --continue")
    return artefact.read_json(folder_of(out) / "state.json", KIND, SCHEMA_VERSION)


def load_tensors(out: Path | str, head: dict[str, Any]) -> dict[str, Tensor]:
    """The tensors that `head` (from `load`) names. Raises ArtefactError where the file is missing or altered."""
    from safetensors.torch import load_file

    file = folder_of(out) / Path(str(head.get("file"))).name
    if not file.is_file() or artefact.sha256_file(file) != head.get("file_sha256"):
        raise ArtefactError(f"{file} is missing or altered", f"remove {out} and train again")
    return dict(load_file(file))


def save(out: Path | str, head: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Replace the state. A kill at any moment leaves the old state or the new one. Raises OutputError."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    file = folder_of(out) / f"step-{head['step']}.safetensors"
    temporary = file.with_suffix(".tmp")
    try:
        with artefact.translate_os_errors(file):
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(tensors, temporary)
            with open(temporary, "rb+") as written:
                os.fsync(written.fileno())
            os.replace(temporary, file)
    except SafetensorError as error:
        raise OutputError(f"cannot write {file} ({error})", "choose another --out or free the disk") from error
    finally:
        temporary.unlink(missing_ok=True)
    named = {"file": file.name, "file_sha256": artefact.sha256_file(file)}
    artefact.write_json(folder_of(out) / "state.json", KIND, {**head, **named}, SCHEMA_VERSION)
    for old in set(folder_of(out).glob("step-*")) - {file}:
        old.unlink(missing_ok=True)
