"""Import: a pretrained model from a Hugging Face folder or a GGUF file becomes a checkpoint.

`import_model` reads the model through `convert.huggingface` or `convert.gguf`. It writes a checkpoint
(merino_edge.checkpoint) with float32 weights. `training.json` records the source:

    "source": {"format": "huggingface" | "gguf", "family": "llama", "name": FILE or FOLDER, "files": {FILE: sha256}}

A model is imported exactly or not at all: a property or a weight that an `Architecture` cannot express is refused by
name. The import needs no PyTorch and never reads a pickle.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from pathlib import Path

from merino_edge import artefact, checkpoint, names
from merino_edge.architecture import Architecture
from merino_edge.convert.imported import Imported, OnWeight
from merino_edge.errors import ArtefactError, InputError


def import_model(
    source: Path | str,
    out: Path | str,
    on_weight: OnWeight = lambda done, total: None,
    *,
    base: Path | str | None = None,
    chat_template: str | None = None,
    on_note: Callable[[str], None] = lambda line: None,
) -> Architecture:
    """Write the checkpoint `out` from a Hugging Face folder or a GGUF file and return its architecture.

    `on_weight` gets the number of weights read so far and in all, `on_note` a line on what is odd about the model.
    `base` is the model of a LoRA adapter. `chat_template` replaces the model's own; an empty one is none. Raises
    UnsupportedError (a property that an architecture cannot express), ArtefactError (damaged or incomplete),
    InputError (not a model), OutputError, MissingExtraError.
    """
    model = _read(source, on_weight, base, chat_template)
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


def _read(source: Path | str, on_weight: OnWeight, base: Path | str | None, chat_template: str | None) -> Imported:
    from merino_edge.convert import gguf, hub_cache, huggingface, pretrained

    path = Path(source)
    if not path.exists():
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and path.suffix != ".gguf":
            raise InputError(
                f"there is no folder {source}; a model of the Hugging Face hub must be downloaded first",
                f"run: hf download {source} --local-dir {path.name}",
            )
        nearest = names.near(str(source), [pretrained.NAME])
        meant = f"did you mean {nearest}?" if nearest else names.beside(path)
        raise ArtefactError(f"{source} does not exist", meant or "check the path")
    if path.is_dir():
        if artefact.is_artefact_folder(path):
            raise InputError(f"{path} is an artefact of merino-edge already", f"run: merino-edge show {path}")
        found = hub_cache.snapshot(path)
        of_adapter = None if base is None else hub_cache.snapshot(Path(base)).path
        model = huggingface.read(found.path, on_weight, of_adapter, chat_template)
        return dataclasses.replace(model, source={**model.source, **found.origin})
    try:
        with open(path, "rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise ArtefactError(f"{path} cannot be read ({error.strerror})", "check its permissions") from None
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file", "give a .gguf file, or a Hugging Face folder with config.json")
    return gguf.read(path, on_weight, chat_template)
