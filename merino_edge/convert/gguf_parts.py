"""A model in GGUF: one file, or several parts that llama.cpp's splitter wrote.

    NAME-00001-of-00003.gguf, ...: each has some of the tensors, the first also the model's metadata

Files of another use (a LoRA adapter, an image encoder, a vocabulary without weights) are refused by what they are.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from merino_edge.convert.gguf_file import GgufFile, Tensor
from merino_edge.errors import ArtefactError, UnsupportedError

PART = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MOST_PARTS = 1000
# What `general.type` may say of a file that is no model, and what to do.
OTHER_USES = {
    "adapter": ("a LoRA adapter", "merge it into its base with llama-export-lora, or import the adapter's peft folder"),
    "mmproj": ("the encoder of images or sound of a model", "give the model's own .gguf file"),
    "vocab": ("a vocabulary without weights", "give the model's own .gguf file"),
    "imatrix": ("a record of activations", "give the model's own .gguf file"),
}


class GgufModel(NamedTuple):
    """The metadata and tensors of a whole model, and its files."""

    values: Mapping[str, Any]
    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]


def read_model(path: Path) -> GgufModel:
    """All parts of the model that `path`, any of them, belongs to.

    Raises ArtefactError (damaged, a part is missing or another model's), UnsupportedError (no model).
    """
    file = GgufFile(path)
    kind, count = _text(file, "general.type"), file.values.get("split.count")
    use = "adapter" if "adapter.type" in file.values else kind
    if use in OTHER_USES:
        what, hint = OTHER_USES[use]
        raise UnsupportedError(f"{path} is {what}, not a model", hint)
    if not isinstance(count, int) or count <= 1:
        if not file.tensors:
            raise UnsupportedError(f"{path} is {OTHER_USES['vocab'][0]}, not a model", OTHER_USES["vocab"][1])
        return GgufModel(file.values, file.tensors, (path,))
    return _joined(path, file, count)


def _joined(path: Path, file: GgufFile, count: int) -> GgufModel:
    if count > MOST_PARTS or not (named := PART.fullmatch(path.name)):
        raise ArtefactError(
            f"{path} is one of {count} parts, but its name does not say which",
            f"give the parts the names NAME-00001-of-{count:05}.gguf, or join them: llama-gguf-split --merge",
        )
    paths = [path.with_name(f"{named[1]}-{i:05}-of-{count:05}.gguf") for i in range(1, count + 1)]
    if missing := [part.name for part in paths if not part.is_file()]:
        raise ArtefactError(f"{path} is one of {count} parts, and {missing[0]} is not beside it", "download all parts")
    files = [file if part == path else GgufFile(part) for part in paths]
    tensors: dict[str, Tensor] = {}
    for number, (part, opened) in enumerate(zip(paths, files, strict=True)):
        if opened.values.get("split.count") != count or opened.values.get("split.no") != number:
            raise ArtefactError(f"{part} is not part {number + 1} of {count}", "download all parts again")
        if twice := tensors.keys() & opened.tensors.keys():
            raise ArtefactError(f"{part}: {min(twice)[:100]} is in another part too", "download all parts again")
        tensors |= opened.tensors
    total = files[0].values.get("split.tensors.count")
    if isinstance(total, int) and total != len(tensors):
        raise ArtefactError(
            f"{paths[0]} says {total} tensors, its parts hold {len(tensors)}", "a part is of another model"
        )
    return GgufModel(files[0].values, tensors, tuple(paths))


def _text(file: GgufFile, key: str) -> str:
    value = file.values.get(key)
    return value.decode(errors="replace") if isinstance(value, bytes) else ""
