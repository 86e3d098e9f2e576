"""Export to Hugging Face: a checkpoint becomes a folder that transformers loads. It is the inverse of the import.

    config.json, generation_config.json, model.safetensors, tokenizer.json, tokenizer_config.json (chat template inside)

The family is the first one of merino_edge.convert.families whose configuration, read back, gives the architecture. If
there is none, the error names the fields that the nearest family cannot express. Blocks of one shape become one stack
of layers, whose windows and rotary positions may differ. Layers that share weights get copies of them, because no
family shares. Weights keep their float type. The export needs no PyTorch and no transformers.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge import __version__, artefact, atomic, checkpoint, safetensors_file
from merino_edge.architecture import Architecture
from merino_edge.checkpoint import Checkpoint, Weights
from merino_edge.convert.families import FAMILIES, Config, Family
from merino_edge.convert.folding import layer_names
from merino_edge.convert.huggingface import prepended_token
from merino_edge.convert.imported import load_tokenizer
from merino_edge.convert.layouts import Layout
from merino_edge.convert.weight_files import SAFETENSORS
from merino_edge.errors import ArchitectureError, ArtefactError, UnsupportedError
from merino_edge.kind import TRANSFORMERS
from merino_edge.tokenizer import ChatFormat
from merino_edge.weights import weight_shapes

if TYPE_CHECKING:
    import tokenizers

SHAPE = ("width", "heads", "kv_heads", "ffn_width")  # equal in all layers of a family
# A token that `convert.imported.bind_template` has set at a template's top.
BOUND = re.compile(r'\{% set ([a-z][a-z0-9_]*_token) = ("(?:[^"\\]|\\.)*") %\}\n')


@dataclass(frozen=True)
class HuggingFaceExport:
    """The result of an export: family, architecture, and the number of layers that got copies of shared weights."""

    family: str
    model: str  # transformers' class
    architecture: Architecture  # of one block; importing the folder gives it
    copied_layers: int


def export_to_huggingface(source: Path | str, out: Path | str) -> HuggingFaceExport:
    """Write the checkpoint `source` as the folder `out`.

    Raises UnsupportedError (no family expresses its architecture), ArtefactError, OutputError, MissingExtraError.
    """
    ckpt = checkpoint.load(source)
    a = one_block(ckpt.architecture, str(source))
    origin = ckpt.training.get("source")
    name, config = _family(a, str(source), origin.get("family", "") if isinstance(origin, dict) else "")
    folding = FAMILIES[name].folding(Config(config, name), a)
    weights = {part: folding.undo(a, part, array) for part, array in one_block_weights(ckpt, a).items()}
    weights = _renamed(a, FAMILIES[name], weights)
    tokenizer = ckpt.path / "tokenizer.json"
    backend = load_tokenizer(artefact.read_text(tokenizer), str(tokenizer))
    with atomic.new_folder(out, TRANSFORMERS) as folder:
        _write_weights(folder / SAFETENSORS, weights, ckpt.training["sha256"])
        ends = _special_ids(ckpt.chat)
        dtype = np.result_type(*weights.values()).name
        model = {"architectures": [FAMILIES[name].model], "model_type": name, "dtype": dtype}
        # No pad_token_id: its embedding would get no gradient, and a family's default is some token of another's.
        _write(folder / "config.json", {**model, **config, **ends, "pad_token_id": None})
        stops = {"stop_strings": list(ckpt.chat.stop_strings)} if ckpt.chat.stop_strings else {}
        pad = next(iter(ckpt.chat.eos_token_ids), None)
        _write(folder / "generation_config.json", {**ends, "pad_token_id": pad, **stops})
        _write(folder / "tokenizer_config.json", tokenizer_settings(a, backend, ckpt.chat))
        artefact.write_text(
            folder / "tokenizer.json", _tokenizer_json(ckpt.path / "tokenizer.json", backend, ckpt.chat)
        )
    copied = a.layers - sum(block.weight_layers for block in ckpt.architecture.blocks)
    return HuggingFaceExport(name, FAMILIES[name].model, a, copied)


def _write(path: Path, values: dict[str, Any]) -> None:
    artefact.write_text(path, json.dumps(values, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


# --- shape -----------------------------------------------------------------------------------------


def one_block(a: Architecture, where: str) -> Architecture:
    """The same layers without sharing, as one block for each run of the same window, rotary and convolution.

    Raises UnsupportedError where their shapes differ.
    """
    first = a.blocks[0]
    for index, block in enumerate(a.blocks):
        for name in SHAPE:
            one, other = getattr(first, name), getattr(block, name)
            if one != other:
                raise UnsupportedError(
                    f"{where}: {name} is {one} in blocks[0] and {other} in blocks[{index}]; "
                    "in a family of transformers all layers are alike",
                    _instead(where),
                )
    single = [dataclasses.replace(block, layers=1, shared=False) for block in a.layer_blocks()]
    runs = [(block, len(list(same))) for block, same in groupby(single)]
    return dataclasses.replace(a, blocks=tuple(dataclasses.replace(block, layers=count) for block, count in runs))


def _family(a: Architecture, where: str, preferred: str) -> tuple[str, dict[str, Any]]:
    """A family that expresses all of `a` (`preferred` if it does), and its configuration. Raises UnsupportedError."""
    wanted, nearest = flat(a), ("", dict.fromkeys(flat(a)))
    for name in sorted(
        (name for name, family in FAMILIES.items() if family.written), key=lambda name: name != preferred
    ):
        config = FAMILIES[name].config(a)
        try:
            read_back = flat(FAMILIES[name].architecture(Config(config, name)))
        except (ArchitectureError, ArtefactError, UnsupportedError):
            continue
        other = {key: value for key, value in read_back.items() if value != wanted[key]}
        if not other:
            return name, config
        if len(other) < len(nearest[1]):
            nearest = (name, other)
    name, other = nearest
    ours, theirs = (", ".join(f"{key} {values[key]}" for key in other) for values in (wanted, other))
    raise UnsupportedError(
        f"{where}: no family of transformers has {ours}; the nearest, {name}, has {theirs}", _instead(where)
    )


def flat(a: Architecture) -> dict[str, Any]:
    """The fields of an architecture whose layers have one shape, by name; what may differ layer by layer."""
    values = {**dataclasses.asdict(a), **dataclasses.asdict(a.blocks[0]), "layers": a.layers}
    del values["blocks"]
    for name in ("window", "rotary", "convolution"):
        of_layers = [getattr(block, name) for block in a.layer_blocks()]
        values[name] = of_layers[0] if len(set(of_layers)) == 1 else of_layers
    return values


def _instead(where: str) -> str:
    bundle = f"run it as a bundle (merino-edge export {where} --out BUNDLE)"
    return f"{bundle}, or train what merino-edge search --family llama finds"


# --- weights ---------------------------------------------------------------------------------------


def one_block_weights(ckpt: Checkpoint, a: Architecture) -> Weights:
    """The weights by the names of `one_block`'s architecture `a`. Shared weights stand under the name of each layer."""
    sources = [
        f"blocks.{index}.layers.{layer % block.weight_layers}."
        for index, block in enumerate(ckpt.architecture.blocks)
        for layer in range(block.layers)
    ]
    weights = {name: array for name, array in ckpt.weights.items() if not name.startswith("blocks.")}
    for layer, source in zip(layer_names(a.blocks), sources, strict=True):
        of_layer = [name for name in ckpt.weights if name.startswith(source)]
        weights |= {layer + name.removeprefix(source): ckpt.weights[name] for name in of_layer}
    return weights


def _renamed(a: Architecture, family: Family, weights: Weights) -> Weights:
    """A family's weights from ours: the inverse of `imported.convert_weights`."""
    expected, renamed = weight_shapes(a), Weights()
    for module, parts in layout_modules(a, family.layout):
        prefix = "" if parts == ("head",) else family.prefixes[0]
        for kind in ("weight", "bias"):
            ours = tuple(f"{part}.{kind}" for part in parts)
            if all(name in expected for name in ours):
                renamed[f"{prefix}{module}.{kind}"] = family.fuse(a, ours, [weights[name] for name in ours])
    return renamed


def layout_modules(a: Architecture, layout: Layout) -> Iterator[tuple[str, tuple[str, ...]]]:
    """The modules of a layout, and the modules of ours in each."""
    for theirs, ours in layout.outside.items():
        yield theirs, (ours,)
    for layer, prefix in enumerate(layer_names(a.blocks)):
        for theirs, several in layout.inside.items():
            ours_of_layer = tuple(f"{prefix}{part}" for part in several.split())
            yield f"{layout.layer}{layer}.{theirs}", ours_of_layer


def _write_weights(path: Path, weights: Weights, source_sha256: str) -> None:
    metadata = {
        "format": "pt",
        "merino_edge": __version__,
        "checkpoint_sha256": source_sha256,
    }  # transformers asks for pt
    with safetensors_file.new_file(path, weights, metadata):
        pass


# --- tokenizer and chat ----------------------------------------------------------------------------


def _special_ids(chat: ChatFormat) -> dict[str, Any]:
    """The special token ids. They are written even as null, because a family's defaults are its first model's ids."""
    ends = list(chat.eos_token_ids)
    return {"bos_token_id": chat.bos_token_id, "eos_token_id": ends[0] if len(ends) == 1 else ends or None}


def tokenizer_settings(a: Architecture, backend: tokenizers.Tokenizer, chat: ChatFormat) -> dict[str, Any]:
    ids = {"bos_token": chat.bos_token_id, "eos_token": next(iter(chat.eos_token_ids), None)}
    tokens = {name: None if i is None else backend.id_to_token(i) for name, i in ids.items()}
    tokens["pad_token"] = tokens["eos_token"]
    template = chat.chat_template
    while template is not None and (bound := BOUND.match(template)):
        tokens[bound[1]], template = json.loads(bound[2]), template[bound.end() :]
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **tokens,
        "model_max_length": a.max_positions,
        "clean_up_tokenization_spaces": False,
        **({} if template is None else {"chat_template": template}),
    }


def _tokenizer_json(path: Path, backend: tokenizers.Tokenizer, chat: ChatFormat) -> str:
    """The text of tokenizer.json. It is changed only where the tokenizer does not prepend the token of `chat`."""
    from tokenizers import processors

    if prepended_token(backend) == chat.bos_token_id:
        return artefact.read_text(path)
    if chat.bos_token_id is None:
        backend.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    else:
        first = backend.id_to_token(chat.bos_token_id)
        backend.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A $B", special_tokens=[(first, chat.bos_token_id)]
        )
    return str(backend.to_str(pretty=True))
