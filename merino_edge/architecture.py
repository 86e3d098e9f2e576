"""The shape of a language model: `Architecture`, the only way a model's shape travels.

It describes MeRino's models and also OPT, GPT-2, GPT-NeoX (Pythia), the Llama-like families up to Gemma 3, and LFM2. It
counts its own parameters and FLOPs through `merino_edge.counts`. It knows nothing of weights, devices or PyTorch.

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
NormPlacement = Literal["pre", "post", "after", "both"]
Ffn = Literal["relu", "gelu", "gelu_tanh", "swiglu", "geglu", "geglu_tanh", "relu_squared"]
Positions = Literal["learned", "rotary"]
Bias = Literal["all", "qkv", "none"]
QkNorm = Literal["none", "head", "width"]
Rotary = Literal["global", "local", "none"]
GATED: tuple[Ffn, ...] = ("swiglu", "geglu", "geglu_tanh")


@dataclass(frozen=True)
class Block:
    """`layers` decoder layers of one shape. With `shared` they use one set of weights (paper section 5)."""

    width: int  # of the residual stream
    layers: int
    heads: int
    kv_heads: int
    ffn_width: int
    shared: bool = False
    window: int = 0  # positions that a token attends to, its own included; 0: all before it
    rotary: Rotary = "global"  # "local": by local_rotary_base; "none": no positions at all in these layers
    # Taps of a gated short convolution in place of attention (LFM2); 0: attention. With it heads mean nothing.
    convolution: int = 0

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
    # pre: x + f(norm(x)); post (OPT-350M): norm(x + f(x)), no final norm; after (OLMo 2): x + norm(f(x));
    # both (Gemma 2): x + norm(f(norm(x)))
    norm_placement: NormPlacement = "pre"
    norm_epsilon: float = 1e-5
    ffn: Ffn = "relu"
    positions: Positions = "learned"
    position_offset: int = 0  # rows of the learned table before position 0 (OPT: 2)
    rotary_dim: int = 0  # rotated leading part of each head, halves rotated together; 0: no rotary
    rotary_base: float = 10000.0
    bias: Bias = "all"  # "qkv": only query, key and value (Qwen2)
    parallel_residual: bool = False  # x + attention(norm(x)) + ffn(norm(x)) (GPT-NeoX)
    qk_norm: QkNorm = "none"  # RMS norm of query and key before the rotation, of each head or of the whole width
    rotary_factors: tuple[float, ...] = ()  # divide the frequencies of the global rotary, one for each pair
    local_rotary_base: float = 0.0  # of layers whose rotary is local, which have no factors
    attention_cap: float = 0.0  # scores become cap * tanh(score / cap); 0: none
    logit_cap: float = 0.0
    convolution_bias: bool = False  # of the matrices and the taps of convolutions

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
        return self.ffn in GATED

    @property
    def final_norm(self) -> bool:
        """Whether a norm stands between the last layer and the head."""
        return self.norm_placement != "post"

    @property
    def rotaries(self) -> tuple[Rotary, ...]:
        """The kinds of rotary positions that layers have."""
        if self.positions != "rotary":
            return ()
        used: set[str] = {block.rotary for block in self.blocks if not block.convolution}
        return tuple(kind for kind in ("global", "local") if kind in used)

    @property
    def position_rows(self) -> int:
        """Rows of the learned position table; 0 with rotary positions."""
        return self.max_positions + self.position_offset if self.positions == "learned" else 0

    @property
    def convolves(self) -> bool:
        """Whether a short convolution stands in place of attention in some layers."""
        return any(block.convolution for block in self.blocks)

    def layer_blocks(self) -> list[Block]:
        """The block of every computed layer, in order."""
        return [block for block in self.blocks for _ in range(block.layers)]

    # --- identity ---

    def to_dict(self) -> dict[str, Any]:
        """The fields as plain JSON values, in the order of the class. `LATER` ones are left out at their default."""
        return {**_plain(self), "blocks": [_plain(block) for block in self.blocks]}

    @staticmethod
    def from_dict(value: Any) -> Architecture:
        """The architecture from the form of `to_dict`. Raises ArchitectureError naming unknown or missing keys."""
        fields = _checked_fields(value, Architecture, "architecture")
        blocks = fields.get("blocks")
        if not isinstance(blocks, list):
            raise ArchitectureError("blocks must be a list", "see: merino-edge show ARTEFACT")
        built = tuple(Block(**_checked_fields(b, Block, f"blocks[{i}]")) for i, b in enumerate(blocks))
        if isinstance(factors := fields.get("rotary_factors"), list):
            fields["rotary_factors"] = tuple(factors)
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

    def kv_bytes(self, positions: int | None = None, element_bytes: int = 2, *, rings: bool = False) -> int:
        """Bytes of the KV cache for `positions` (default: all) positions (`counts.kv_bytes`)."""
        return counts.kv_bytes(self, positions, element_bytes, rings=rings)


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

# Fields that came later, with their defaults. A default is not written, so that older artefacts keep their ids.
LATER: dict[type, dict[str, Any]] = {
    Architecture: {
        "qk_norm": "none",
        "rotary_factors": (),
        "local_rotary_base": 0.0,
        "attention_cap": 0.0,
        "logit_cap": 0.0,
        "convolution_bias": False,
    },
    Block: {"window": 0, "rotary": "global", "convolution": 0},
}


def _plain(value: Architecture | Block) -> dict[str, Any]:
    later = LATER[type(value)]
    plain = {name: getattr(value, name) for name in _FIELD_TYPES[type(value)]}
    return {
        name: list(item) if isinstance(item, tuple) else item
        for name, item in plain.items()
        if name not in later or item != later[name]
    }


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
        ("qk_norm", QkNorm),
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
    _check_later(a)
    if a.parallel_residual and a.norm_placement != "pre":
        raise _broken("parallel_residual needs norm_placement pre")
    if not isinstance(a.blocks, tuple) or not a.blocks:
        raise _broken("blocks is empty, at least one is needed")
    ranged("number of blocks", len(a.blocks), 1, limits.MAX_BLOCKS)
    previous = 0
    for index, block in enumerate(a.blocks):
        _check_block(block, a, previous, index)
        previous = block.width
    ranged("total layers", a.layers, 1, limits.MAX_LAYERS)
    if all(block.convolution for block in a.blocks):
        raise _broken("all layers are convolutions, at least one needs attention")
    if a.convolution_bias and not a.convolves:
        raise _broken("convolution_bias needs layers with a convolution")


def _check_later(a: Architecture) -> None:
    """Raise ArchitectureError naming the first rule that the fields of `LATER` break."""
    if a.rotary_factors != ():
        factors = a.rotary_factors
        if a.positions != "rotary" or not isinstance(factors, tuple) or len(factors) != a.rotary_dim // 2:
            raise _broken(f"rotary_factors must be {a.rotary_dim // 2} numbers, one for each pair of rotary_dim")
        for factor in factors:
            if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 1e-6 < factor < 1e6:
                raise _broken(f"rotary_factors holds {factor!r}, which is no number between 1e-6 and 1e6")
    if a.local_rotary_base and not (a.positions == "rotary" and 1 < a.local_rotary_base < 1e12):
        raise _broken(f"local_rotary_base is {a.local_rotary_base}; it needs rotary positions and 1 to 1e12")
    for name, cap in (("attention_cap", a.attention_cap), ("logit_cap", a.logit_cap)):
        if cap and not 1e-3 < cap < 1e6:
            raise _broken(f"{name} is {cap}, outside 0.001 to 1e6")


def _check_block(block: Block, a: Architecture, previous: int, index: int) -> None:
    """Raise ArchitectureError naming the first rule that a block of `a` breaks behind one of the width `previous`."""
    where = f"blocks[{index}]."
    _check_types(block, where)
    for name, most in BLOCK_LIMITS.items():
        value = getattr(block, name)
        if type(value) is not int or not 1 <= value <= most:
            limits.check_range(where + name, value, 1, most, ArchitectureError)
    if block.heads * a.head_dim > limits.MAX_WIDTH:
        raise _broken(f"{where}heads {block.heads} times head_dim {a.head_dim} is over {limits.MAX_WIDTH}")
    if block.window or type(block.window) is not int:
        limits.check_range(where + "window", block.window, 0, limits.MAX_POSITIONS, ArchitectureError)
    if block.convolution or type(block.convolution) is not int:
        _check_convolution(block, where)
    if block.rotary != "global":
        if block.rotary not in get_args(Rotary):
            raise _broken(f"{where}rotary is {block.rotary!r}, not one of {', '.join(get_args(Rotary))}")
        if a.positions != "rotary" or (block.rotary == "local" and not a.local_rotary_base):
            raise _broken(f"{where}rotary {block.rotary} needs rotary positions, and local a local_rotary_base")
    if block.heads % block.kv_heads != 0:
        raise _broken(f"{where}kv_heads {block.kv_heads} must divide its heads {block.heads}")
    if block.width < previous:
        raise _broken(f"{where}width {block.width} is below the block before it ({previous}); widths must not decrease")


def _check_convolution(block: Block, where: str) -> None:
    limits.check_range(where + "convolution", block.convolution, 2, limits.MAX_TAPS, ArchitectureError)
    if block.window or block.rotary != "global":
        raise _broken(f"{where}convolution goes with neither a window nor a rotary of its own")


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
