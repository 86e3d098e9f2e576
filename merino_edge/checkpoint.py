"""A checkpoint: the folder that `train` and `import` write and `export` reads. It needs no PyTorch.

CKPT/architecture.json    the architecture artefact
     model.safetensors    weights by the names of merino_edge.weights
     tokenizer.json       chat.json (see merino_edge.tokenizer)
     training.json        kind "checkpoint": where the weights come from, sha256 of the other files
     training.next.json   the next training.json, while a training saves: it counts once the weights are those it names
     state/               only while training: the state to resume from (merino_edge.training.state)
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from merino_edge import architecture, artefact, atomic, kinds
from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError
from merino_edge.tokenizer import ChatFormat
from merino_edge.weights import weight_shapes

KIND = "checkpoint"
MODEL, NEXT = "model.safetensors", "training.next.json"
FILES = ("architecture.json", MODEL, "tokenizer.json", "chat.json")

Weights = dict[str, np.ndarray]


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
    expected = weight_shapes(a)
    for name in sorted(set(expected) ^ set(weights)):
        raise ArtefactError(
            f"{where}: {'missing' if name in expected else 'unexpected'} weight {name}", "make it again"
        )
    for name, shape in expected.items():
        if tuple(weights[name].shape) != shape:
            raise ArtefactError(f"{where}: {name} is {list(weights[name].shape)}, not {list(shape)}", "make it again")
        if not np.isfinite(weights[name]).all():
            raise ArtefactError(f"{where}: {name} holds NaN or infinity", "training diverged or the file is altered")


def write_files(
    folder: Path, a: Architecture, weights: Weights, *, tokenizer_json: str, chat: ChatFormat, training: dict[str, Any]
) -> None:
    """Write a checkpoint's files into an existing folder, `training.json` last. Raises ArtefactError, OutputError.

    Over a checkpoint of the same architecture and tokenizer a kill at any moment leaves the old weights or the new.
    """
    from safetensors.numpy import save

    check_weights(a, weights, "checkpoint")
    model = save({k: np.ascontiguousarray(v) for k, v in weights.items()})
    architecture.save(folder / "architecture.json", a)
    artefact.write_text(folder / "tokenizer.json", tokenizer_json)
    artefact.write_text(folder / "chat.json", chat.to_json())
    hashes = {name: artefact.sha256_file(folder / name) for name in FILES if name != MODEL}
    hashes[MODEL] = artefact.sha256_bytes(model)
    is_first = not (folder / "training.json").exists()
    if not is_first:
        artefact.write_json(folder / NEXT, KIND, {"id": a.id, "files": hashes, **training})
    try:
        artefact.write_bytes(folder / MODEL, model)
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
        later = artefact.read_json(path / NEXT, KIND)
        if later.get("files", {}).get(MODEL) == artefact.sha256_file(path / MODEL):
            return later
    return artefact.read_json(path / "training.json", KIND)


def load(path: Path | str) -> Checkpoint:
    """Read and verify a checkpoint. Raises ArtefactError, MissingExtraError."""
    from merino_edge.errors import require

    require("safetensors", "train")
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    path = Path(path)
    kinds.require(path, KIND)
    if not path.is_dir():
        raise ArtefactError(f"{path} is not a checkpoint folder", "make one: merino-edge train, or merino-edge import")
    document = record(path)
    for name in FILES:
        if not (path / name).is_file():
            raise ArtefactError(f"{path / name} is missing", "make the checkpoint again")
        if artefact.sha256_file(path / name) != document.get("files", {}).get(name):
            raise ArtefactError(
                f"{path / name} does not match its hash in training.json", "it was altered; make it again"
            )
    a, _ = architecture.load(path / "architecture.json")
    try:
        weights = load_file(path / "model.safetensors")
    except (SafetensorError, ValueError, OSError) as error:
        raise ArtefactError(f"{path / 'model.safetensors'} cannot be read ({error})", "make it again") from None
    check_weights(a, weights, str(path))
    chat = ChatFormat.load(path / "chat.json")
    if chat.bos_token_id is not None and chat.bos_token_id >= a.vocab_size:
        raise ArtefactError(
            f"{path / 'chat.json'}: token {chat.bos_token_id} is outside the vocabulary of {a.vocab_size}",
            "make the checkpoint again",
        )
    return Checkpoint(path, a, weights, chat, document)
