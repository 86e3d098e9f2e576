"""A search space as a file that a person can write: kind "space", schema 2.

Every dimension may be left out. Then it has the one value that `model` gives, or 1 for `blocks` and `kv_groups`, or 0
for the minimum shares. One value needs no list. `lost` is the share of a block's score that rounding to the precision
costs; left out it is the measured one. `model` has an architecture's fields without `blocks`. With `base`, the
name of a built-in space, the file only needs the differences:

    {"kind": "space", "schema_version": 2, "name": "mine", "base": "edge", "widths": [256, 384, 512], "contexts": 1024}

    {"kind": "space", "schema_version": 2, "name": "whole",
     "blocks": [1, 2, 3, 4],             # numbers of blocks
     "widths": [128, 256], "ffn_ratios": [1, 2, 4] (FFN width / width), "layers": [1, 2, 3] (per block),
     "kv_groups": [1, 2, 4],             # query heads per KV head; each block uses those that divide its heads
     "shared": [false, true],            # whether all layers of a block have one set of weights
     "ffn": ["relu", "swiglu"], "embedding_widths": [256],
     "vocabularies": [{"size": 8192, "bytes_per_token": 3.6, "tokenizer": "byte-level BPE"}],
     "contexts": [1024],                 # positions of a model
     "windows": [0, 256],                # positions that a block's layers attend to; 0, or left out: all
     "precisions": ["int8", {"name": "int4", "lost": 0.09}],   # of each block's weights; left out: the search's for all
     "least_width": 0.5,                 # minimum width of the first block, as a share of the embedding's width
     "least_embedding": 0.5,             # minimum width of the embedding, as a share of the widest block's width
     "model": {"head_dim": 64, "norm": "rmsnorm", "qk_norm": "head", ...}}
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from merino_edge import artefact
from merino_edge.architecture import Architecture
from merino_edge.errors import ArtefactError, UnsupportedError
from merino_edge.search import block_precision
from merino_edge.search.block_precision import BlockPrecision
from merino_edge.search.space import Space, Vocabulary

KIND = "space"
SCHEMA_VERSION = 2

DIMENSIONS = ("blocks", "widths", "ffn_ratios", "layers", "kv_groups", "shared", "ffn", "embedding_widths",
              "vocabularies", "contexts")  # fmt: skip
OPTIONAL = ("windows", "precisions")  # left out of a file where they say nothing, so that older ones keep their hash
SHARES = ("least_width", "least_embedding")
# The field of the model that gives a dimension's value if the file leaves the dimension out.
_FROM_MODEL = {
    "ffn": "ffn",
    "embedding_widths": "embedding_width",
    "vocabularies": "vocab_size",
    "contexts": "max_positions",
}
_SET_BY_SPACE = ("blocks", *_FROM_MODEL.values())
_DEFAULTS = {"blocks": 1, "kv_groups": 1, "shared": False}


def to_dict(space: Space) -> dict[str, Any]:
    """The file form of a space, complete and without a base."""
    fields = {name: _listed(getattr(space, name)) for name in DIMENSIONS}
    fields["vocabularies"] = [dataclasses.asdict(v) for v in space.vocabularies]
    if space.windows != (0,):
        fields["windows"] = _listed(space.windows)
    if space.precisions:
        fields["precisions"] = [dataclasses.asdict(precision) for precision in space.precisions]
    model = {name: value for name, value in space.model.to_dict().items() if name not in _SET_BY_SPACE}
    return {"name": space.name, **fields, **{share: getattr(space, share) for share in SHARES}, "model": model}


def from_dict(value: Any, where: str = "space", bases: Mapping[str, Space] | None = None) -> Space:
    """Read a space from its file form. `bases` are the spaces that `base` may name.

    Raises ArtefactError, InputError, UnsupportedError or ArchitectureError where the form is not a valid space.
    """
    if not isinstance(value, dict):
        raise ArtefactError(f"{where} holds no space", "name one: --space paper, edge, or a space file")
    fields = artefact.remove_envelope(value)
    if (base := fields.pop("base", None)) is not None:
        if not isinstance(base, str) or base not in (bases or {}):
            raise ArtefactError(f"{where}: base {base!r}", f"choose one of {', '.join(bases or {})}")
        fields = _merged(to_dict((bases or {})[base]), fields, where)
    model = fields.get("model")
    if any(name.startswith("convolution") for name in (*fields, *(model if isinstance(model, dict) else ()))):
        raise UnsupportedError(
            f"{where}: no search has short convolutions, as no score says what they give up of attention",
            "leave them out; an imported model with them runs as it is",
        )
    if unknown := sorted(set(fields) - {"name", "model", *OPTIONAL, *SHARES, *DIMENSIONS}):
        raise ArtefactError(
            f"{where}: unknown {', '.join(unknown)}", f"it may have {', '.join((*DIMENSIONS, *OPTIONAL, *SHARES))}"
        )
    if missing := sorted({"name", "widths", "ffn_ratios", "layers", "model"} - set(fields)):
        raise ArtefactError(f"{where}: missing {', '.join(missing)}", "add it, or name a base")
    if not isinstance(fields["name"], str) or not isinstance(fields["model"], dict):
        raise ArtefactError(f"{where}: name must be a string and model an object", "correct the file")
    return Space(name=fields["name"], **_dimensions(fields, where), model=_model(fields))


def _listed(choices: Any) -> Any:
    """A single value without its list, as a person writes it."""
    return choices[0] if len(choices) == 1 else list(choices)


def _merged(base: dict[str, Any], fields: dict[str, Any], where: str) -> dict[str, Any]:
    if "model" in fields and not isinstance(fields["model"], dict):
        raise ArtefactError(f"{where}: model must be an object", "correct the file")
    return {**base, **fields, "model": {**base["model"], **fields.get("model", {})}}


def _dimensions(fields: dict[str, Any], where: str) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name in DIMENSIONS:
        of_model = _FROM_MODEL.get(name, "")
        if name in fields and of_model in fields["model"]:
            raise ArtefactError(f"{where}: both {name} and the model's {of_model}", "leave the model's out")
        value = fields.get(
            name, _DEFAULTS.get(name, fields["model"].get(of_model, getattr(Architecture, of_model, None)))
        )
        values[name] = tuple(value) if isinstance(value, list) else (value,)
    values["vocabularies"] = tuple(_vocabulary(item, where) for item in values["vocabularies"])
    windows = fields.get("windows", 0)
    values["windows"] = tuple(windows) if isinstance(windows, list) else (windows,)
    items = fields.get("precisions", [])
    values["precisions"] = tuple(_precision(item, where) for item in (items if isinstance(items, list) else [items]))
    return {**values, **{share: fields.get(share, 0) for share in SHARES}}


def _vocabulary(item: Any, where: str) -> Vocabulary:
    fields = item if isinstance(item, dict) else {"size": item}
    if "size" not in fields or set(fields) - {f.name for f in dataclasses.fields(Vocabulary)}:
        raise ArtefactError(f"{where}: vocabulary {item!r}", "it has size, bytes_per_token and tokenizer")
    return Vocabulary(**fields)


def _precision(item: Any, where: str) -> BlockPrecision:
    fields = item if isinstance(item, dict) else {"name": item}
    if not isinstance(fields.get("name"), str) or set(fields) - {"name", "lost"}:
        raise ArtefactError(f"{where}: precision {item!r}", "it has name and lost")
    return dataclasses.replace(block_precision.measured(fields["name"]), **fields)


def _model(fields: dict[str, Any]) -> Architecture:
    """The model. The fields that the space sets get any allowed value."""
    fields = {name: value for name, value in fields["model"].items() if name not in _SET_BY_SPACE}
    head_dim = fields.get("head_dim")
    block = {"width": head_dim, "layers": 1, "heads": 1, "kv_heads": 1, "ffn_width": 1}
    set_by_space = {"vocab_size": 1, "max_positions": 1, "embedding_width": 1, "blocks": [block]}
    return Architecture.from_dict({**fields, **set_by_space})
