"""Import: a pretrained model from a Hugging Face folder or a GGUF file becomes a checkpoint.

`import_model` reads the model through `convert.huggingface` or `convert.gguf`. It writes a checkpoint
(merino_edge.checkpoint) with float32 weights. `training.json` records the source:

    "source": {"format": "huggingface" | "gguf", "family": "llama", "name": FILE or FOLDER, "files": {FILE: sha256}}

A model is imported exactly or not at all: a property or a weight that an `Architecture` cannot express is refused by
name. The import needs no PyTorch and never reads a pickle.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

from merino_edge import artefact, checkpoint, names
from merino_edge.architecture import Architecture
from merino_edge.convert import hub_cache
from merino_edge.convert.hub_cache import Snapshot
from merino_edge.convert.imported import Imported, OnWeight
from merino_edge.errors import ArtefactError, InputError, UnsupportedError

OnBytes = Callable[[int, int], None]  # called with (bytes here, bytes in all)


def import_model(
    source: Path | str,
    out: Path | str,
    on_weight: OnWeight = lambda done, total: None,
    *,
    base: Path | str | None = None,
    chat_template: str | None = None,
    on_note: Callable[[str], None] = lambda line: None,
    on_bytes: OnBytes = lambda done, total: None,
) -> Architecture:
    """Write the checkpoint `out` from a Hugging Face folder, a GGUF file or a name of the hub; return its architecture.

    `on_weight` gets the number of weights read so far and in all, `on_note` a line on what is odd about the model.
    `on_bytes` gets the bytes of a download that are here, and all. `base` is the model of a LoRA adapter.
    `chat_template` replaces the model's own; an empty one is none.

    Raises UnsupportedError (a property that an architecture cannot express), ArtefactError (damaged or incomplete),
    InputError (not a model), OutputError, MissingExtraError.
    """
    found = locate(source, on_bytes)
    of_adapter = None if base is None else locate(base, on_bytes).path
    model = _read(found.path, on_weight, of_adapter, chat_template)
    model = dataclasses.replace(model, source={**model.source, **found.origin})
    for note in model.notes:
        on_note(note)
    checkpoint.save(
        out,
        model.architecture,
        model.weights,
        tokenizer_json=model.tokenizer_json,
        chat=model.chat,
        training={"source": model.source},
    )
    return model.architecture


def _read(path: Path, on_weight: OnWeight, base: Path | None, chat_template: str | None) -> Imported:
    from merino_edge.convert import gguf, huggingface, weight_files

    if path.is_dir():
        if artefact.is_artefact_folder(path):
            raise InputError(f"{path} is an artefact of merino-edge already", f"run: merino-edge show {path}")
        return huggingface.read(path, on_weight, base, chat_template)
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None
    if magic == b"FUGG":
        raise UnsupportedError(f"{path} is big-endian", "download the little-endian file")
    weight_files.check_is_content(path)
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file", "give a .gguf file, or a Hugging Face folder with config.json")
    return gguf.read(path, on_weight, chat_template)


def locate(source: Path | str, on_bytes: OnBytes = lambda done, total: None) -> Snapshot:
    """The folder or file that `source` means: a path, or a name of the hub, which is downloaded.

    `on_bytes` gets the bytes here and in all. Raises ArtefactError, InputError, OutputError, UnsupportedError.
    """
    from merino_edge.convert import hub, hub_name, known_models, pretrained

    path = Path(source)
    if path.exists():
        return hub_cache.snapshot(path) if path.is_dir() else Snapshot(path)
    name = hub_name.HubName.parse(str(source))
    if name is not None and path.parent.is_dir():  # a path, then; the hub's models have an address too
        at_hub = f"check the path; for the hub's model give hf.co/{source}"
        raise ArtefactError(f"{source} does not exist", names.beside(path) or at_hub)
    if name is not None:
        return hub.fetch(name, on_bytes)
    nearest = names.near(str(source), [pretrained.NAME])
    meant = f"did you mean {nearest}?" if nearest else names.beside(path)
    if not meant and (known := known_models.near(str(source))):
        meant = f"did you mean {known}?"
    raise ArtefactError(f"{source} does not exist", meant or "check the path")
