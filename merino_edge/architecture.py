"""The shape of a language model: `Architecture`, the only way a model's shape travels.

It describes MeRino's models and also OPT, GPT-2, GPT-NeoX (Pythia) and Llama-like ones. It counts its own parameters
and FLOPs through `merino_edge.counts`. It knows nothing of weights, devices or PyTorch.

Artefact `NAME.json`, kind "architecture", schema 1:

    {"kind": "architecture", "schema_version": 1, "id": "1f0c...",
     "architecture": {"vocab_size": 50272, ..., "blocks": [{"width": 64, "layers": 1, ...}, ...]},
     ...}                      # a search adds score, costs, budgets, solver, seed (merino_edge.search)
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, get_args

from merino_edge import artefact, counts, limits
from merino_edge.errors import ArchitectureError, ArtefactError

KIND = "architecture"
SCHEMA_VERSION = 1

Norm = Literal["layernorm", "rmsnorm"]
NormPlacement = Literal["pre", "post"]
Ffn = Literal["relu", "gelu", "gelu_tanh", "swiglu"]
Positions = Literal["learned", "rotary"]
Bias = Literal["all", "qkv", "none"]


@dataclass(frozen=True)
class Block:
    """`layers` decoder layers of one shape. With `shared` they use one set of weights (paper section 5)."""

    width: int  # of the residual stream; Q, K, V together are as wide (heads * head_dim == width)
    layers: int
    heads: int
    kv_heads: int
    ffn_width: int
    shared: bool = False

    @property
    def weight_layers(self) -> int:
        """The number of layer weight sets that are stored."""
        return 1 if self.shared else self.layers


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer. Construction raises ArchitectureError when a rule is broken.

    Token embeddings are `embedding_width` wide. A bias-free linear width projection stands wherever two neighbours
    differ in width: embedding and first block, two blocks, last block and head. Learned positions are as wide as the
    first block, and are added after the projection (as in OPT).
    """

    vocab_size: int
    max_positions: int
    embedding_width: int
    head_dim: int
    blocks: tuple[Block, ...]
    tied_head: bool = True
    norm: Norm = "layernorm"
    norm_placement: NormPlacement = "pre"  # "post" (OPT-350M): x = norm(x + f(x)), no final norm
    norm_epsilon: float = 1e-5
    ffn: Ffn = "relu"
    positions: Positions = "learned"
    position_offset: int = 0  # rows of the learned table before position 0 (OPT: 2)
    rotary_dim: int = 0  # rotated leading part of each head, halves rotated together; 0: no rotary
    rotary_base: float = 10000.0
    bias: Bias = "all"  # "qkv": only query, key and value (Qwen2)
    parallel_residual: bool = False  # x + attention(norm(x)) + ffn(norm(x)) (GPT-NeoX)

    def __post_init__(self) -> None:
        validate(self)

    # --- derived shape ---

    @property
    def layers(self) -> int:
        """Total depth: the number of computed layers, shared or not."""
        return sum(block.layers for block in self.blocks)

    @property
    def gated(self) -> bool:
        """Whether the FFN has a gate matrix."""
        return self.ffn == "swiglu"

    @property
    def position_rows(self) -> int:
        """Rows of the learned position table; 0 with rotary positions."""
        return self.max_positions + self.position_offset if self.positions == "learned" else 0

    def layer_blocks(self) -> list[Block]:
        """The block of every computed layer, in order."""
        return [block for block in self.blocks for _ in range(block.layers)]

    # --- identity ---

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, in the order of the class."""
        return {**_plain(self), "blocks": [_plain(block) for block in self.blocks]}

    @staticmethod
    def from_dict(value: Any) -> Architecture:
        """The architecture from the form of `to_dict`. Raises ArchitectureError naming unknown or missing keys."""
        fields = _checked_fields(value, Architecture, "architecture")
        blocks = fields.get("blocks")
        if not isinstance(blocks, list):
            raise ArchitectureError("blocks must be a list", "see: merino-edge show ARTEFACT")
        built = tuple(Block(**_checked_fields(b, Block, f"blocks[{i}]")) for i, b in enumerate(blocks))
        return Architecture(**{**fields, "blocks": built})

    @cached_property
    def id(self) -> str:
        """A short hash of the shape: 12 hexadecimal digits, the same on every machine."""
        return artefact.sha256_text(artefact.canonical_json(self.to_dict()))[:12]

    # --- counts (closed forms in merino_edge.counts) ---

    @property
    def parameters(self) -> int:
        """Stored parameters; shared layers and a tied head count once."""
        return counts.parameters(self)

    def flops(self, sequence: int = 1024, *, head: bool = False) -> int:
        """FLOPs of one forward pass over `sequence` tokens (see `counts.flops`)."""
        return counts.flops(self, sequence, head=head)

    def weight_bytes(self, precision: str = "fp16", target: str | None = None) -> int:
        """Bytes of the stored weights, in a bundle for `target` if one is named (`counts.weight_bytes`)."""
        return counts.weight_bytes(self, precision, target)

    def kv_bytes(self, positions: int | None = None, element_bytes: int = 2) -> int:
        """Bytes of the KV cache for `positions` (default: all) positions."""
        return counts.kv_bytes(self, positions, element_bytes)


# --- rules -----------------------------------------------------------------------------------------


def _checked_fields(value: Any, cls: type, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ArchitectureError(f"{where} must be an object", "see: merino-edge show ARTEFACT")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    unknown = sorted(set(value) - set(fields))
    missing = sorted(n for n, f in fields.items() if f.default is dataclasses.MISSING and n not in value)
    if unknown or missing:
        what = f"unknown {', '.join(unknown)}" if unknown else f"missing {', '.join(missing)}"
        raise ArchitectureError(f"{where}: {what}", "compare with: merino-edge show ARTEFACT")
    return dict(value)


_FIELD_TYPES: dict[type, dict[str, str]] = {
    cls: {field.name: str(field.type) for field in dataclasses.fields(cls)} for cls in (Architecture, Block)
}
_TYPED_FIELDS = {  # that no rule below looks at otherwise
    cls: [(name, kind) for name, kind in types.items() if kind in ("bool", "float")]
    for cls, types in _FIELD_TYPES.items()
}


def _plain(value: Architecture | Block) -> dict[str, Any]:
    return {name: getattr(value, name) for name in _FIELD_TYPES[type(value)]}


def _check_types(value: Architecture | Block, where: str) -> None:
    for name, kind in _TYPED_FIELDS[type(value)]:
        item = getattr(value, name)
        if isinstance(item, bool) != (kind == "bool") or not isinstance(item, (int, float)):
            raise _broken(f"{where}{name} must be a {kind}, not {item!r}")


CHOICES = {
    name: get_args(choices)
    for name, choices in (
        ("norm", Norm),
        ("norm_placement", NormPlacement),
        ("ffn", Ffn),
        ("positions", Positions),
        ("bias", Bias),
    )
}
BLOCK_LIMITS = {
    "width": limits.MAX_WIDTH,
    "layers": limits.MAX_LAYERS,
    "heads": limits.MAX_HEADS,
    "kv_heads": limits.MAX_HEADS,
    "ffn_width": limits.MAX_FFN_WIDTH,
}


def validate(a: Architecture) -> None:
    """Raise ArchitectureError naming the first rule that `a` breaks.

    A search and a profile make many thousands of architectures: a message is written only where a rule is broken.
    """

    def ranged(name: str, value: Any, low: int, high: int) -> None:
        limits.check_range(name, value, low, high, ArchitectureError)

    _check_types(a, "")
    ranged("vocab_size", a.vocab_size, 1, limits.MAX_VOCAB_SIZE)
    ranged("max_positions", a.max_positions, 1, limits.MAX_POSITIONS)
    ranged("embedding_width", a.embedding_width, 1, limits.MAX_WIDTH)
    ranged("head_dim", a.head_dim, 1, limits.MAX_HEAD_DIM)
    ranged("position_offset", a.position_offset, 0, 64)
    for name, allowed in CHOICES.items():
        if getattr(a, name) not in allowed:
            raise _broken(f"{name} is {getattr(a, name)!r}, not one of {', '.join(allowed)}")
    if not 0 < a.norm_epsilon < 1:
        raise _broken(f"norm_epsilon is {a.norm_epsilon}, outside 0 to 1")
    if not 1 < a.rotary_base < 1e12:
        raise _broken(f"rotary_base is {a.rotary_base}, outside 1 to 1e12")
    if a.positions == "rotary":
        ranged("rotary_dim", a.rotary_dim, 2, a.head_dim)
        if a.rotary_dim % 2 != 0:
            raise _broken(f"rotary_dim is {a.rotary_dim}, must be even")
    elif a.rotary_dim != 0:
        raise _broken("rotary_dim must be 0 with learned positions")
    if a.parallel_residual and a.norm_placement == "post":
        raise _broken("parallel_residual needs norm_placement pre")
    if not isinstance(a.blocks, tuple) or not a.blocks:
        raise _broken("blocks is empty, at least one is needed")
    ranged("number of blocks", len(a.blocks), 1, limits.MAX_BLOCKS)
    previous = 0
    for index, block in enumerate(a.blocks):
        _check_block(block, a.head_dim, previous, index)
        previous = block.width
    ranged("total layers", a.layers, 1, limits.MAX_LAYERS)


def _check_block(block: Block, head_dim: int, previous: int, index: int) -> None:
    """Raise ArchitectureError naming the first rule that a block breaks behind one of the width `previous`."""
    where = f"blocks[{index}]."
    _check_types(block, where)
    for name, most in BLOCK_LIMITS.items():
        value = getattr(block, name)
        if type(value) is not int or not 1 <= value <= most:
            limits.check_range(where + name, value, 1, most, ArchitectureError)
    if block.heads * head_dim != block.width:
        raise _broken(f"{where}heads {block.heads} times head_dim {head_dim} must equal its width {block.width}")
    if block.heads % block.kv_heads != 0:
        raise _broken(f"{where}kv_heads {block.kv_heads} must divide its heads {block.heads}")
    if block.width < previous:
        raise _broken(f"{where}width {block.width} is below the block before it ({previous}); widths must not decrease")


def _broken(message: str) -> ArchitectureError:
    return ArchitectureError(message, "change the architecture; its rules are in merino_edge/architecture.py")


# --- files -----------------------------------------------------------------------------------------


def save(path: Path | str, a: Architecture, **provenance: Any) -> dict[str, Any]:
    """Write the artefact, and return it. `provenance` says how it was found: score, costs, budgets, solver, seed, ...

    Raises OutputError.
    """
    payload = {"id": a.id, "architecture": a.to_dict(), **provenance}
    return artefact.write_json(path, KIND, payload, SCHEMA_VERSION)


def load(path: Path | str) -> tuple[Architecture, dict[str, Any]]:
    """The architecture in an artefact, and the whole document. Raises ArtefactError, ArchitectureError."""
    document = artefact.read_json(path, KIND, SCHEMA_VERSION, handwritten=True)
    a = Architecture.from_dict(document.get("architecture"))
    if "id" in document and document["id"] != a.id:
        raise ArtefactError(
            f"{path}: id {document['id']} is not the architecture's ({a.id})", "it was altered; make it again"
        )
    return a, document
