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
from merino_edge.convert import tokenizer_parts, weight_files
from merino_edge.convert.adapter import Adapter, base_folder, is_adapter
from merino_edge.convert.end_tokens import end_token_ids, stop_strings
from merino_edge.convert.families import FAMILIES, Config, Family
from merino_edge.convert.folding import Folding
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
ENDS = ("eos_token_id", "stop_strings")  # settings of generation that end an answer
TOKEN_NAME = re.compile("[a-z][a-z0-9_]*_token")


def read(folder: Path, on_weight: OnWeight, base: Path | None = None, chat_template: str | None = None) -> Imported:
    """Read the model in `folder`; of an adapter with the model in the folder `base`.

    `chat_template` replaces the model's own unless it is None.

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
    if adapter is not None:  # whose folder has no such file
        of_base = _config(folder, generation, required=False).values
        config.values.update({name: of_base[name] for name in ENDS if of_base.get(name)})
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
    backend = _tokenizer(own, name)
    chat = _chat(own, config, backend, chat_template)
    notes = check_tokenizer(backend, a.vocab_size, chat, str(own))
    stored = StoredWeights(files)
    weights = _weights(
        a,
        family,
        family.folding(config, a),
        stored,
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
    notes = (*notes, *stored.notes.values())
    return Imported(a, weights, str(backend.to_str(pretty=True)), chat, source, notes)


def _base_of(adapter: Adapter, folder: Path) -> Path:
    """The folder of the adapter's base, where it is on this machine. Raises InputError."""
    if (base := base_folder(folder, adapter.base)) is not None:
        return base
    raise InputError(
        f"{folder} is a LoRA adapter of {adapter.base or 'a base that it does not name'}, which is not here",
        f"give the base's folder or hub name: merino-edge import {folder} --base {adapter.base or 'MODEL'} --out CKPT",
    )


def _config(folder: Path, name: str, *, required: bool = True) -> Config:
    path = folder / name
    if not path.is_file() and not required:
        return Config({}, str(path))
    if path.is_file():
        check_is_content(path)
    return Config(artefact.parse_json(artefact.read_text(path), str(path)), str(path))


# --- weights ---------------------------------------------------------------------------------------


def _weights(
    a: Architecture,
    family: Family,
    folding: Folding,
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
    convert = partial(convert_weights, a, family.layout, where=where, on_weight=on_weight, folding=folding)
    if adapter is None:
        return convert(locations, lambda name: stored.load(locations[name]))
    changes = {bare(name): name for name in adapter.touched()}
    _check_tied(a, family, adapter, changes)
    locations |= {name: full for name, full in changes.items() if full in adapter.replaced and name not in locations}
    adapter.check_names([changes[name] for name in changes.keys() & locations.keys()])

    def load(name: str) -> np.ndarray:
        full = locations[name]
        array = stored.load(full) if full in stored.file_of else adapter.replaced[full]
        of_layer = any(part.startswith("blocks.") for part in family.layout.ours(name))
        return adapter.apply(changes.get(name, full), array, inputs_first=family.layout.inputs_first and of_layer)

    return convert(locations, load)


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


def _tokenizer(folder: Path, model: str) -> tokenizers.Tokenizer:
    """The tokenizer of `tokenizer.json`, or of the files that older folders have in its place."""
    path = folder / TOKENIZER
    if path.is_file():
        check_is_content(path)
        return load_tokenizer(artefact.read_text(path), str(path))
    settings, older = (
        _config(folder, file, required=False).values for file in ("tokenizer_config.json", "special_tokens_map.json")
    )
    built = tokenizer_parts.build(folder, settings, older, model)
    return load_tokenizer(str(built.to_str()), str(folder / tokenizer_parts.VOCAB))


def _chat(folder: Path, config: Config, backend: tokenizers.Tokenizer, template: str | None) -> ChatFormat:
    settings = _config(folder, "tokenizer_config.json", required=False)
    older = _special_tokens(_config(folder, "special_tokens_map.json", required=False))
    tokens = _special_tokens(settings)
    # As in transformers: where the settings list the added tokens too, they are the newer file.
    of_template = tokens if "added_tokens_decoder" in settings.values else {**tokens, **older}
    ends = [of_template.get("eos_token"), tokens.get("eos_token"), older.get("eos_token")]
    generation = _config(folder, "generation_config.json", required=False)
    of_stops = generation if generation.values else config  # as in transformers
    named = [
        *(backend.token_to_id(token) for token in ends if token is not None),
        *_eos_token_ids(generation),
        *_eos_token_ids(config),
    ]
    added = {token.content: i for i, token in backend.get_added_tokens_decoder().items()}
    template = _template(folder, settings) if template is None else template
    bound = bind_template(template, str(folder), **of_template)
    stops = stop_strings(of_stops.values.get("stop_strings"), of_stops.where)
    return ChatFormat(end_token_ids(named, added), prepended_token(backend), bound, stops)


def _special_tokens(settings: Config) -> dict[str, str]:
    """The special tokens by their names in templates; a model may have some of its own."""
    own = settings.values.get("extra_special_tokens")
    named = {**settings.values, **(own if isinstance(own, dict) else {})}
    contents = {
        name: value.get("content") if isinstance(value, dict) else value
        for name, value in named.items()
        if TOKEN_NAME.fullmatch(name)
    }
    return {name: value for name, value in contents.items() if isinstance(value, str)}


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
    of_processor = _config(folder, "chat_template.json", required=False)  # before there was the file above
    value = settings.values.get("chat_template", of_processor.values.get("chat_template"))
    if isinstance(value, list):  # several, each {"name": ..., "template": ...}
        value = next((v.get("template") for v in value if isinstance(v, dict) and v.get("name") == "default"), None)
    return value if isinstance(value, str) else None
