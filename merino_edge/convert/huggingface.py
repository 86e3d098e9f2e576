"""Reading of Hugging Face folders: `config.json`, safetensors and `tokenizer.json` as a checkpoint's content.

`tokenizer_config.json`, `chat_template.jinja` and `generation_config.json` are read where they exist. The folder of a
LoRA adapter is read with its base. merino_edge.convert.weight_files finds the weights and reads them,
merino_edge.convert.families holds the model families.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from merino_edge import artefact, limits
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Weights
from merino_edge.convert import weight_files
from merino_edge.convert.adapter import Adapter, is_adapter
from merino_edge.convert.families import FAMILIES, Config, Family
from merino_edge.convert.imported import (
    Imported,
    OnWeight,
    bind_template,
    check_tokenizer,
    convert_weights,
    load_tokenizer,
)
from merino_edge.convert.weight_files import UNQUANTISED, StoredWeights, check_is_content
from merino_edge.errors import ArchitectureError, ArtefactError, InputError, UnsupportedError
from merino_edge.foreign_call import call
from merino_edge.tokenizer import FAILED, ChatFormat

if TYPE_CHECKING:
    import tokenizers

TOKENIZER = "tokenizer.json"
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)")  # never trained


def read(folder: Path, on_weight: OnWeight, base: Path | None = None) -> Imported:
    """Read the model in `folder`; of an adapter with the model in the folder `base`.

    Raises UnsupportedError, ArtefactError, InputError (GGUF files, or an adapter without base), MissingExtraError.
    """
    adapter = None
    own, generation = folder, "generation_config.json"
    if is_adapter(folder):
        adapter = Adapter.load(folder)
        folder = base or _base_of(adapter, folder)
        own = own if (own / TOKENIZER).is_file() else folder
    elif base is not None:
        raise InputError(f"{folder} is no adapter, so it has no base", "leave --base out")
    config = _config(folder, "config.json")
    if adapter is not None and (ends := _config(folder, generation, required=False).values.get("eos_token_id")):
        config.values["eos_token_id"] = ends  # an adapter's folder has no such file
    name = config.get("model_type", "none")
    if name not in FAMILIES:
        raise UnsupportedError(
            f"{config.where}: model_type {name!r} is not supported", f"choose one of {', '.join(FAMILIES)}"
        )
    if config.values.get("quantization_config"):
        method = str(Config(config.values["quantization_config"], config.where).values.get("quant_method", ""))[:40]
        raise UnsupportedError(f"{config.where}: quantization_config ({method}) is not supported", UNQUANTISED)
    family = FAMILIES[name]
    try:
        a = family.architecture(config)
    except ArchitectureError as error:
        raise UnsupportedError(f"{config.where}: {error.message}", "choose another model") from None
    files, promised = weight_files.find(folder)
    if not (own / TOKENIZER).is_file():
        raise ArtefactError(
            f"{own / TOKENIZER} is missing",
            "save it there: transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
        )
    check_is_content(own / TOKENIZER)
    backend = load_tokenizer(artefact.read_text(own / TOKENIZER), str(own / TOKENIZER))
    chat = _chat(own, config, backend, a.vocab_size)
    weights = _weights(
        a,
        family,
        StoredWeights(files),
        promised=promised,
        adapter=adapter,
        where=str(folder),
        on_weight=on_weight,
    )
    hashes = {file.name: artefact.sha256_file(file) for file in files}
    source = {"format": "huggingface", "family": name, "name": folder.resolve().name, "files": hashes}
    if adapter is not None:
        merged = {"name": adapter.file.resolve().parent.name, "sha256": artefact.sha256_file(adapter.file)}
        source["adapter"] = merged
    return Imported(a, weights, str(backend.to_str(pretty=True)), chat, source)


def _base_of(adapter: Adapter, folder: Path) -> Path:
    """The folder of the adapter's base, where it is on this machine. Raises InputError."""
    for path in (Path(adapter.base), folder / adapter.base, folder) if adapter.base else (folder,):
        if (path / "config.json").is_file():
            return path
    raise InputError(
        f"{folder} is a LoRA adapter of {adapter.base or 'a base that it does not name'}, which is not here",
        f"give the base's folder or hub name: merino-edge import {folder} --base {adapter.base or 'MODEL'} --out CKPT",
    )


def _config(folder: Path, name: str, *, required: bool = True) -> Config:
    path = folder / name
    if not path.is_file() and not required:
        return Config({}, str(path))
    return Config(artefact.parse_json(artefact.read_text(path), str(path)), str(path))


# --- weights ---------------------------------------------------------------------------------------


def _weights(
    a: Architecture,
    family: Family,
    stored: StoredWeights,
    *,
    promised: Mapping[str, str],
    adapter: Adapter | None,
    where: str,
    on_weight: OnWeight,
) -> Weights:
    """The weights of a family, an adapter merged. `promised`: the file of each weight by the folder's index."""

    def bare(name: str) -> str:
        return next((name[len(prefix) :] for prefix in family.prefixes if name.startswith(prefix)), name)

    locations: dict[str, str] = {}  # name without the family's prefix -> stored name
    for name, file in stored.file_of.items():
        if BUFFERS.fullmatch(bare(name)):
            continue
        if bare(name) in locations:
            raise ArtefactError(f"{file}: weight {name} appears twice", "download the folder again")
        locations[bare(name)] = name
    for name in promised.keys() - stored.file_of.keys():
        ours = family.layout.ours(bare(name))
        if bare(name) not in locations and ours and not (a.tied_head and ours == ("head.weight",)):
            raise ArtefactError(
                f"{where}: {promised[name]} does not hold {name}, as the index says", f"download {promised[name]} again"
            )
    if adapter is None:
        return convert_weights(
            a, family.layout, locations, lambda name: stored.load(locations[name]), where=where, on_weight=on_weight
        )
    changes = {bare(name): name for name in adapter.touched()}
    _check_tied(a, family, adapter, changes)
    locations |= {name: full for name, full in changes.items() if full in adapter.replaced and name not in locations}
    adapter.check_names([changes[name] for name in changes.keys() & locations.keys()])

    def load(name: str) -> np.ndarray:
        full = locations[name]
        array = stored.load(full) if full in stored.file_of else adapter.replaced[full]
        return adapter.apply(changes.get(name, full), array)

    return convert_weights(a, family.layout, locations, load, where=where, on_weight=on_weight)


def _check_tied(a: Architecture, family: Family, adapter: Adapter, changes: Mapping[str, str]) -> None:
    """Raise UnsupportedError where an adapter changes only one of two weights that are tied."""
    ends = {"embedding.weight", "head.weight"}
    tied = [changes[name] for name in changes if ends.intersection(family.layout.ours(name))]
    if a.tied_head and tied and not (len(tied) == 2 and all(name in adapter.replaced for name in tied)):
        raise UnsupportedError(
            f"{adapter.where}: it changes {tied[0]}, which is embedding and head at once",
            "give a base whose head is untied",
        )


# --- tokenizer and chat ----------------------------------------------------------------------------


def _chat(folder: Path, config: Config, backend: tokenizers.Tokenizer, vocab_size: int) -> ChatFormat:
    settings = _config(folder, "tokenizer_config.json", required=False)
    bos_token, eos_token = (_token(settings, name) for name in ("bos_token", "eos_token"))
    eos = _eos_token_ids(_config(folder, "generation_config.json", required=False)) or _eos_token_ids(config)
    first = None if eos_token is None else backend.token_to_id(eos_token)
    bos = prepended_token(backend)
    template = bind_template(_template(folder, settings), str(folder), bos_token=bos_token, eos_token=eos_token)
    chat = ChatFormat(tuple(sorted(eos, key=lambda i: i != first)), bos, template)
    check_tokenizer(backend, vocab_size, chat, str(folder))
    return chat


def _token(settings: Config, name: str) -> str | None:
    value = settings.values.get(name)
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None


def _eos_token_ids(config: Config) -> list[int]:
    value = config.values.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    for i in ids:
        limits.check_range(f"{config.where}: eos_token_id", i, 0, limits.MAX_VOCAB_SIZE, ArtefactError)
    return ids


def prepended_token(backend: tokenizers.Tokenizer) -> int | None:
    """The token id that the tokenizer puts before a text; None if it puts none. Raises UnsupportedError for more.

    As in transformers, tokenizer.json decides this and not the setting `add_bos_token`.
    """
    bare, full = (
        call(partial(_ids_of_a, backend, special=special), FAILED, "choose another model", quiet=True)
        for special in (False, True)
    )
    if full == bare:
        return None
    if full[1:] != bare:
        raise UnsupportedError(
            f"the tokenizer puts {full} around {bare}, not one token before it", "choose another model"
        )
    return int(full[0])


def _ids_of_a(backend: tokenizers.Tokenizer, *, special: bool) -> list[int]:
    return list(backend.encode("a", add_special_tokens=special).ids)


def _template(folder: Path, settings: Config) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return artefact.read_text(folder / "chat_template.jinja", limits.MAX_TEMPLATE_BYTES)
    value = settings.values.get("chat_template")
    if isinstance(value, list):  # several, each {"name": ..., "template": ...}
        value = next((v.get("template") for v in value if isinstance(v, dict) and v.get("name") == "default"), None)
    return value if isinstance(value, str) else None
