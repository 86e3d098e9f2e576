"""Reading of Hugging Face folders: `config.json`, safetensors and `tokenizer.json` as a checkpoint's content.

It reads `model.safetensors`, or its shards by `model.safetensors.index.json`. Every float type becomes float32. Pickled
weights (.bin, .pt) are refused. `tokenizer_config.json`, `chat_template.jinja` and `generation_config.json` are read
where they exist. merino_edge.convert.families holds the model families.
"""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path, PurePath
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge import artefact, limits
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Weights, check_header_size
from merino_edge.convert.families import FAMILIES, Config, Family
from merino_edge.convert.imported import (
    Imported,
    OnWeight,
    bind_template,
    check_tokenizer,
    convert_weights,
    load_tokenizer,
)
from merino_edge.errors import ArchitectureError, ArtefactError, MerinoError, UnsupportedError, require_all
from merino_edge.foreign_call import call
from merino_edge.tokenizer import FAILED, ChatFormat

if TYPE_CHECKING:
    import tokenizers

SAFETENSORS = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack")
BUFFERS = re.compile(r"(.*\.)?(rotary_emb\.inv_freq|attn\.(masked_)?bias|attention\.(masked_)?bias)")  # never trained
FLOATS = ("float64", "float32", "float16", "bfloat16")


def read(folder: Path, on_weight: OnWeight) -> Imported:
    """Read the model in `folder`. Raises UnsupportedError, ArtefactError, MissingExtraError."""
    config = _config(folder, "config.json")
    name = config.get("model_type", "none")
    if name not in FAMILIES:
        raise UnsupportedError(
            f"{config.where}: model_type {name!r} is not supported", f"choose one of {', '.join(FAMILIES)}"
        )
    config.only("quantization_config", ())
    family = FAMILIES[name]
    try:
        a = family.architecture(config)
    except ArchitectureError as error:
        raise UnsupportedError(f"{config.where}: {error.message}", "choose another model") from None
    files = _weight_files(folder)
    if not (folder / "tokenizer.json").is_file():
        raise ArtefactError(
            f"{folder / 'tokenizer.json'} is missing",
            "save it there: transformers.AutoTokenizer.from_pretrained(MODEL).save_pretrained(FOLDER)",
        )
    backend = load_tokenizer(artefact.read_text(folder / "tokenizer.json"), str(folder / "tokenizer.json"))
    chat = _chat(folder, config, backend, a.vocab_size)
    weights = _weights(a, family, files, on_weight)
    hashes = {file.name: artefact.sha256_file(file) for file in files}
    source = {"format": "huggingface", "family": name, "name": folder.resolve().name, "files": hashes}
    return Imported(a, weights, str(backend.to_str(pretty=True)), chat, source)


def _config(folder: Path, name: str, *, required: bool = True) -> Config:
    path = folder / name
    if not path.is_file() and not required:
        return Config({}, str(path))
    return Config(artefact.parse_json(artefact.read_text(path), str(path)), str(path))


# --- weights ---------------------------------------------------------------------------------------


def _weight_files(folder: Path) -> list[Path]:
    if (folder / SAFETENSORS).is_file():
        return [folder / SAFETENSORS]
    if (folder / INDEX).is_file():
        names = _config(folder, INDEX).values.get("weight_map")
        if not isinstance(names, dict) or not names:
            raise ArtefactError(f"{folder / INDEX} has no weight_map", "download it again")
        for name in names.values():
            if not isinstance(name, str) or PurePath(name).name != name or not (folder / name).is_file():
                raise ArtefactError(
                    f"{folder / INDEX} names {name!r}, which is no file beside it", "download the folder again"
                )
        return [folder / name for name in sorted(set(names.values()))]
    for path in sorted(folder.iterdir()):
        if path.suffix in PICKLES:
            raise UnsupportedError(
                f"{path} is not safetensors, and a pickle can run code when it is read",
                "download the model's .safetensors files",
            )
    raise ArtefactError(f"{folder} holds no {SAFETENSORS}", "download the model's .safetensors files")


def _weights(a: Architecture, family: Family, files: list[Path], on_weight: OnWeight) -> Weights:
    """The weights of all `files`. One weight is read at a time."""
    require_all({"import": ["safetensors", "ml_dtypes"]})
    import ml_dtypes  # noqa: F401  (gives numpy the name bfloat16)
    from safetensors import safe_open

    locations: dict[str, tuple[Path, str]] = {}  # name without the family's prefix -> where it is stored
    opened: dict[Path, Any] = {}
    try:
        for file in files:
            check_header_size(file)
            opened[file] = safe_open(file, framework="np")
            for stored in opened[file].keys():  # noqa: SIM118  (not a dict)
                name = next((stored[len(p) :] for p in family.prefixes if stored.startswith(p)), stored)
                if BUFFERS.fullmatch(name):
                    continue
                if name in locations:
                    raise ArtefactError(f"{file}: weight {stored} appears twice", "download the folder again")
                locations[name] = (file, stored)

        def load(name: str) -> np.ndarray:
            file, stored = locations[name]
            array = opened[file].get_tensor(stored)
            if array.dtype.name not in FLOATS:
                raise UnsupportedError(
                    f"{file}: {stored} is {array.dtype.name}, not a float", "choose an unquantised model"
                )
            return np.asarray(array, np.float32)

        return convert_weights(a, family.layout, locations, load, where=str(files[0].parent), on_weight=on_weight)
    except (MerinoError, MemoryError):
        raise
    except Exception as error:  # the library raises its own errors, and those of numpy for types that it lacks
        raise ArtefactError(
            f"{file} cannot be read ({error})", "it is damaged or truncated; download it again"
        ) from None


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
