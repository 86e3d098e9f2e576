"""A checkpoint: the folder that `train` and `import` write and `export` reads. It needs no PyTorch.

CKPT/architecture.json    the architecture artefact
     model.safetensors    weights by the names of merino_edge.weights
     tokenizer.json       chat.json (see merino_edge.tokenizer)
     training.json        kind "checkpoint": where the weights come from, sha256 of the other files
     training.next.json   the next training.json, while a training saves: it counts once the weights are those it names
     state/               only while training: the state to resume from (merino_edge.training.state)
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merino_edge import architecture, artefact, atomic, limits, safetensors_file, wrong_kind
from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, require
from merino_edge.forms import UNSET, Form, Line, Sha256, UnsetType
from merino_edge.tokenizer import ChatFormat
from merino_edge.weights import weight_shapes

KIND = "checkpoint"
MODEL, NEXT = "model.safetensors", "training.next.json"
FILES = ("architecture.json", MODEL, "tokenizer.json", "chat.json")
HASHED_BYTES = 64 * 2**20  # takes a tenth of a second

Weights = dict[str, np.ndarray]


class Record(Form):
    """The form of training.json, as far as it is read here."""

    files: dict[str, Sha256]
    id: Line | UnsetType = UNSET


@dataclass(frozen=True)
class Checkpoint:
    """A loaded checkpoint. `weights` are as stored (float32 or float16), checked against the architecture."""

    path: Path
    architecture: Architecture
    weights: Weights
    chat: ChatFormat
    training: dict[str, Any]


def check_weights(a: Architecture, weights: Weights, where: str) -> None:
    """Raise ArtefactError unless `weights` are exactly the architecture's, finite and of its shapes."""
    _check_shapes(a, {name: tuple(array.shape) for name, array in weights.items()}, where)
    for name, array in weights.items():
        if not np.isfinite(array).all():
            raise ArtefactError(f"{where}: {name} holds NaN or infinity", "training diverged or the file is altered")


def _check_shapes(a: Architecture, found: Mapping[str, tuple[int, ...]], where: str) -> None:
    expected = weight_shapes(a)
    for name in sorted(expected.keys() ^ found.keys()):
        raise ArtefactError(
            f"{where}: {'missing' if name in expected else 'unexpected'} weight {name}", "make it again"
        )
    for name, shape in expected.items():
        if found[name] != shape:
            raise ArtefactError(f"{where}: {name} is {list(found[name])}, not {list(shape)}", "make it again")


def write_files(
    folder: Path, a: Architecture, weights: Weights, *, tokenizer_json: str, chat: ChatFormat, training: dict[str, Any]
) -> None:
    """Write a checkpoint's files into an existing folder, `training.json` last. Raises ArtefactError, OutputError.

    Over a checkpoint of the same architecture and tokenizer a kill at any moment leaves the old weights or the new.
    """
    require("safetensors", "train")
    check_weights(a, weights, "checkpoint")
    architecture.save(folder / "architecture.json", a)
    artefact.write_text(folder / "tokenizer.json", tokenizer_json)
    artefact.write_text(folder / "chat.json", chat.to_json())
    hashes = {name: artefact.sha256_file(folder / name) for name in FILES if name != MODEL}
    is_first = not (folder / "training.json").exists()
    try:
        with safetensors_file.new_file(folder / MODEL, weights) as sha256:
            hashes[MODEL] = sha256
            if not is_first:
                artefact.write_json(folder / NEXT, KIND, {"id": a.id, "files": hashes, **training})
    except BaseException:
        atomic.remove(folder / NEXT)
        raise
    if is_first:
        artefact.write_json(folder / "training.json", KIND, {"id": a.id, "files": hashes, **training})
        return
    with atomic.translate_os_errors(folder):
        os.replace(folder / NEXT, folder / "training.json")


def save(
    path: Path | str,
    a: Architecture,
    weights: Weights,
    *,
    tokenizer_json: str,
    chat: ChatFormat,
    training: dict[str, Any],
) -> None:
    """Write a whole checkpoint folder, atomically. Raises OutputError, ArtefactError."""
    with atomic.new_folder(path, KIND) as folder:
        write_files(folder, a, weights, tokenizer_json=tokenizer_json, chat=chat, training=training)


def record(path: Path) -> dict[str, Any]:
    """training.json, or the next one where a save was killed between two files. Raises ArtefactError."""
    if (path / NEXT).is_file() and (path / MODEL).is_file():
        later = artefact.read_json(path / NEXT, KIND, form=Record)
        if later["files"].get(MODEL) == artefact.sha256_file(path / MODEL):
            return later
    return artefact.read_json(path / "training.json", KIND, form=Record)


def load(path: Path | str) -> Checkpoint:
    """Read and verify a checkpoint. Raises ArtefactError, MissingExtraError."""
    path = Path(path)
    a, chat, document = _verified(path, hashed_bytes=None)
    with _safetensors(path / MODEL) as load_file:
        weights = load_file(path / MODEL)
    for name, array in weights.items():
        if array.dtype not in (np.float32, np.float16):
            raise ArtefactError(f"{path}: {name} is {array.dtype.name}, not float32 or float16", "make it again")
    check_weights(a, weights, str(path))
    return Checkpoint(path, a, weights, chat, document)


def describe(path: Path | str) -> tuple[Architecture, dict[str, Any]]:
    """The architecture and training.json of a checkpoint, without its weights: only their names and shapes are read.

    Files of more than HASHED_BYTES are not hashed. Raises ArtefactError, MissingExtraError.
    """
    path = Path(path)
    a, _, document = _verified(path, hashed_bytes=HASHED_BYTES)
    with _safetensors(path / MODEL):
        from safetensors import safe_open

        with safe_open(path / MODEL, framework="np") as file:
            found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    _check_shapes(a, found, str(path))
    return a, document


def _verified(path: Path, hashed_bytes: int | None) -> tuple[Architecture, ChatFormat, dict[str, Any]]:
    """Everything but the weights. Files of more than `hashed_bytes` are not hashed; None: all are."""
    wrong_kind.require(path, KIND)
    if not path.is_dir():
        raise ArtefactError(f"{path} is not a checkpoint folder", "make one: merino-edge train, or merino-edge import")
    document = record(path)
    for name in FILES:
        if not (path / name).is_file():
            raise ArtefactError(f"{path / name} is missing", "make the checkpoint again")
        if hashed_bytes is not None and (path / name).stat().st_size > hashed_bytes:
            continue
        if artefact.sha256_file(path / name) != document["files"].get(name):
            raise ArtefactError(
                f"{path / name} does not match its hash in training.json", "it was altered; make it again"
            )
    a, _ = architecture.load(path / "architecture.json")
    chat = ChatFormat.load(path / "chat.json")
    if chat.largest_token_id >= a.vocab_size:
        raise ArtefactError(
            f"{path / 'chat.json'}: token {chat.largest_token_id} is outside the vocabulary of {a.vocab_size}",
            "make the checkpoint again",
        )
    return a, chat, document


def check_header_size(path: Path) -> None:
    """Raise ArtefactError where a safetensors file has a header that would take the library seconds and gigabytes."""
    size_bytes = int.from_bytes(artefact.read_head(path, 8), "little")
    if size_bytes > limits.MAX_HEADER_BYTES:
        raise ArtefactError(f"{path} has a header of {size_bytes} bytes", "it is damaged, or see merino_edge/limits.py")


@contextlib.contextmanager
def _safetensors(path: Path) -> Iterator[Callable[[Path], Weights]]:
    """The library's reader, whose errors become ArtefactError. Raises MissingExtraError where it is not installed."""
    require("safetensors", "train")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    check_header_size(path)
    try:
        yield load_file
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, OSError) as error:
        raise ArtefactError(f"{path} cannot be read ({error})", "make it again") from None
