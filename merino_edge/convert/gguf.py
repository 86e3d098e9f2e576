"""Reading of GGUF files (of llama.cpp): weights are dequantised to float32, the tokenizer is rebuilt from metadata.

Unknown metadata of the architecture and weights without equivalent are refused by name.
merino_edge.convert.gguf_families holds the families, merino_edge.convert.gguf_file reads the file itself, and
merino_edge.convert.gguf_tokenizer rebuilds the tokenizer.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from merino_edge import artefact, limits
from merino_edge.convert import gguf_families, gguf_layouts, gguf_rope, gguf_tokenizer
from merino_edge.convert.end_tokens import end_token_ids
from merino_edge.convert.gguf_file import Tensor
from merino_edge.convert.gguf_metadata import Metadata
from merino_edge.convert.gguf_parts import read_model
from merino_edge.convert.imported import (
    Imported,
    OnWeight,
    bind_template,
    check_tokenizer,
    convert_weights,
    load_tokenizer,
)
from merino_edge.errors import ArchitectureError, ArtefactError, UnsupportedError, require
from merino_edge.tokenizer import ChatFormat

if TYPE_CHECKING:
    import tokenizers


def read(path: Path, on_weight: OnWeight, chat_template: str | None = None) -> Imported:
    """Read the model in the GGUF file `path`, with `chat_template` in place of its own unless None.

    Raises UnsupportedError, ArtefactError, MissingExtraError.
    """
    require("gguf", "import")
    file = read_model(path)
    m, tensors = Metadata(file.values, str(path)), file.tensors
    family = m.need("general.architecture", str)
    if family not in gguf_families.FAMILIES:
        raise UnsupportedError(
            f"{path}: architecture {family!r} is not supported", f"choose one of {', '.join(gguf_families.FAMILIES)}"
        )
    try:
        own = gguf_families.FAMILIES[family]
        factors = next((tensors[name] for name in own.factors if name in tensors), None)
        listed = () if factors is None else gguf_rope.as_factors(_dequantised(factors, path))
        a, folding = gguf_families.read(m, family, tensors, listed)
    except ArchitectureError as error:
        raise UnsupportedError(f"{path}: {error.message}", "choose another model") from None
    backend = load_tokenizer(str(gguf_tokenizer.build(m).to_str()), str(path))  # which tries it too
    chat = _chat(m, backend, chat_template)
    notes = check_tokenizer(backend, a.vocab_size, chat, str(path))
    weights = convert_weights(
        a,
        gguf_layouts.reading(own.layout),
        [name for name in tensors if name not in own.factors],
        lambda name: _dequantised(tensors[name], path),
        where=str(path),
        on_weight=on_weight,
        folding=folding,
    )
    hashes = {part.name: artefact.sha256_file(part) for part in file.files}
    source = {"format": "gguf", "family": family, "name": path.name, "files": hashes}
    return Imported(a, weights, str(backend.to_str(pretty=True)), chat, source, notes)


def _dequantised(tensor: Tensor, path: Path) -> np.ndarray:
    from gguf.quants import dequantize

    try:
        with np.errstate(all="ignore"):  # what is not finite is refused later
            return np.asarray(dequantize(tensor.data, tensor.kind), np.float32)
    except NotImplementedError:
        raise UnsupportedError(
            f"{path}: {tensor.name} is {tensor.kind.name}, which cannot be read", "choose another quantisation"
        ) from None


# --- tokenizer and chat ----------------------------------------------------------------------------


# Special tokens by their names in templates and in the metadata, where one is misspelled.
SPECIAL_TOKENS = {"bos": "bos", "eos": "eos", "unk": "unknown", "sep": "seperator", "pad": "padding"}
SPECIAL_TOKENS |= {"cls": "cls", "mask": "mask"}


def _chat(m: Metadata, backend: tokenizers.Tokenizer, template: str | None) -> ChatFormat:
    eos = end_token_ids(
        (_token_id(m, name) for name in ("eos", "eot", "eom")), backend.get_vocab(with_added_tokens=True)
    )
    bos = _token_id(m, "bos")
    prepends = gguf_tokenizer.adds_bos(m)
    ids = {name: _token_id(m, key) for name, key in SPECIAL_TOKENS.items()}
    tokens = {f"{name}_token": None if i is None else backend.id_to_token(i) for name, i in ids.items()}
    template = m.get("tokenizer.chat_template", str) if template is None else template
    template = bind_template(template, m.where, **tokens)
    return ChatFormat(eos, bos if prepends else None, template)


def _token_id(m: Metadata, name: str) -> int | None:
    value = m.get(f"tokenizer.ggml.{name}_token_id", int)
    if value is not None:
        limits.check_range(f"{m.where}: {name}_token_id", value, 0, limits.MAX_VOCAB_SIZE, ArtefactError)
    return value
