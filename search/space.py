"""What a search may choose: `Space`, blocks of non-decreasing width, each with a depth and an FFN ratio.

A genome is one gene per block, a gene an index into `Space.genes`, the blocks there are; genes are
ordered by width, so a genome is valid exactly when its widths do not decrease. A space knows neither
score nor cost.

File form, kind "space", schema 1 (`model` is an architecture's fields without `blocks`):

    {"kind": "space", "schema_version": 1, "name": "paper", "blocks": 4, "widths": [64, ...],
     "ffn_ratios": [1, 1.5, ...], "layers": [1, 2, 3, 4], "shared": true,
     "model": {"vocab_size": 50272, "max_positions": 2048, "embedding_width": 768, "head_dim": 64, ...}}
"""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations_with_replacement, product
from pathlib import Path
from typing import Any

from merino_edge import artefact, limits
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError, InputError

KIND = "space"
SCHEMA_VERSION = 1
Genome = tuple[int, ...]


@dataclass(frozen=True)
class Space:
    """`blocks` blocks, each of one of `widths`, `ffn_ratios` (FFN width / width) and `layers`.

    `model` gives everything else; its own blocks are ignored. Raises InputError where a choice is
    empty, not ascending, or makes no whole FFN width or number of heads, ArchitectureError where the
    model breaks a rule.
    """

    name: str
    blocks: int
    widths: tuple[int, ...]
    ffn_ratios: tuple[float, ...]
    layers: tuple[int, ...]
    shared: bool
    model: Architecture

    def __post_init__(self) -> None:
        limits.check_range("blocks", self.blocks, 1, limits.MAX_BLOCKS)
        for name, high in (("widths", limits.MAX_WIDTH), ("ffn_ratios", 64), ("layers", limits.MAX_LAYERS)):
            choices = getattr(self, name)
            kinds = (int, float) if name == "ffn_ratios" else (int,)
            numbers = all(isinstance(x, kinds) and not isinstance(x, bool) and 0 < x <= high for x in choices)
            if not choices or not numbers or list(choices) != sorted(set(choices)):
                raise InputError(f"space {self.name}: {name} {list(choices)}", f"list ascending numbers up to {high}")
        count = len(self.widths) * self.genes_per_width
        limits.check_range("widths x FFN ratios x layers", count, 1, limits.MAX_GENES)
        for gene in (0, count - 1):
            self.architecture((gene,) * self.blocks)  # the smallest and the largest must both be allowed

    # --- genes ---

    @cached_property
    def genes(self) -> tuple[Block, ...]:
        """Every block there is, ordered by width, then FFN ratio, then layers."""
        return tuple(self._block(*choice) for choice in product(self.widths, self.ffn_ratios, self.layers))

    def _block(self, width: int, ratio: float, layers: int) -> Block:
        ffn_width, heads = width * ratio, width // self.model.head_dim
        if ffn_width != int(ffn_width) or heads * self.model.head_dim != width:
            raise InputError(
                f"space {self.name}: width {width} with FFN ratio {ratio} and head_dim {self.model.head_dim}",
                "choose widths that head_dim divides, and ratios that give whole FFN widths",
            )
        return Block(width, layers, heads, heads, int(ffn_width), self.shared)

    @property
    def genes_per_width(self) -> int:
        return len(self.ffn_ratios) * len(self.layers)

    @property
    def size(self) -> int:
        """How many architectures there are (widths non-decreasing)."""
        return math.comb(len(self.widths) + self.blocks - 1, self.blocks) * int(self.genes_per_width**self.blocks)

    def width_indices(self, genome: Genome) -> Genome:
        """Into `widths`, one per block."""
        per_width = self.genes_per_width
        return tuple([gene // per_width for gene in genome])

    def architecture(self, genome: Genome) -> Architecture:
        return dataclasses.replace(self.model, blocks=tuple(self.genes[gene] for gene in genome))

    def genomes(self) -> Iterator[Genome]:
        """Every genome, once: for exhaustive search of small spaces."""
        per_width = self.genes_per_width
        for widths in combinations_with_replacement(range(len(self.widths)), self.blocks):
            yield from product(*(range(width * per_width, (width + 1) * per_width) for width in widths))

    def sample(self, rng: random.Random) -> Genome:
        """A genome drawn uniformly."""
        picks = sorted(rng.sample(range(len(self.widths) + self.blocks - 1), self.blocks))
        per_width = self.genes_per_width
        return tuple((pick - i) * per_width + rng.randrange(per_width) for i, pick in enumerate(picks))

    def mutate(self, genome: Genome, rng: random.Random) -> Genome:
        """`genome` with one block drawn anew: width within the neighbours', FFN ratio and depth (paper section 6)."""
        index, per_width = int(rng.random() * len(genome)), self.genes_per_width
        low = genome[index - 1] // per_width if index else 0
        high = genome[index + 1] // per_width + 1 if index + 1 < len(genome) else len(self.widths)
        gene = int((low + rng.random() * (high - low)) * per_width)  # genes of one width stand together
        return (*genome[:index], gene, *genome[index + 1 :])

    # --- files ---

    def to_dict(self) -> dict[str, Any]:
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        model = {name: value for name, value in self.model.to_dict().items() if name != "blocks"}
        return {**fields, **{k: list(fields[k]) for k in ("widths", "ffn_ratios", "layers")}, "model": model}

    @staticmethod
    def from_dict(value: Any, where: str = "space") -> Space:
        """From `to_dict`'s form. Raises ArtefactError, InputError, ArchitectureError."""
        if not isinstance(value, dict):
            raise ArtefactError(f"{where} holds no space", "name one: --space paper, demo, or a space file")
        names = {field.name for field in dataclasses.fields(Space)}
        given = set(value) - {"kind", "schema_version", "tool_version", "sha256"}
        if given != names:
            raise ArtefactError(
                f"{where}: keys missing or unknown: {', '.join(sorted(given ^ names))}",
                f"it needs {', '.join(sorted(names))}",
            )
        choices = {key: value[key] for key in ("widths", "ffn_ratios", "layers")}
        if not isinstance(value["model"], dict) or not all(isinstance(x, list) for x in choices.values()):
            raise ArtefactError(
                f"{where}: model must be an object; widths, ffn_ratios and layers lists", "correct the file"
            )
        if not isinstance(value["name"], str) or not isinstance(value["shared"], bool):
            raise ArtefactError(f"{where}: name must be a string and shared true or false", "correct the file")
        head_dim = value["model"].get("head_dim")
        block = {"width": head_dim, "layers": 1, "heads": 1, "kv_heads": 1, "ffn_width": 1}
        model = Architecture.from_dict({**value["model"], "blocks": [block]})
        tuples = {key: tuple(items) for key, items in choices.items()}
        return Space(name=value["name"], blocks=value["blocks"], shared=value["shared"], model=model, **tuples)


# The paper's Table 5 (paper section 5); layers as OPT's.
PAPER = Space(
    name="paper",
    blocks=4,
    widths=(64, 128, 256, 384, 512, 640, 768, 896, 1024),
    ffn_ratios=(1, 1.5, 2, 2.5, 3, 3.5, 4),
    layers=(1, 2, 3, 4),
    shared=True,
    model=Architecture(
        vocab_size=50272,
        max_positions=2048,
        embedding_width=768,
        head_dim=64,
        blocks=(Block(width=64, layers=1, heads=1, kv_heads=1, ffn_width=64),),
    ),
)

# Small enough to train on two CPU cores in minutes; layers as Llama's.
DEMO = Space(
    name="demo",
    blocks=3,
    widths=(128, 192, 256),  # none below half the embedding: a narrow first block is a bottleneck the score cannot see
    ffn_ratios=(1, 2, 3, 4),
    layers=(1, 2, 3),
    shared=False,
    model=Architecture(
        vocab_size=4096,
        max_positions=256,
        embedding_width=256,
        head_dim=32,
        blocks=(Block(width=128, layers=1, heads=4, kv_heads=4, ffn_width=128),),
        norm="rmsnorm",
        ffn="swiglu",
        positions="rotary",
        rotary_dim=32,
        bias="none",
    ),
)

SPACES = {space.name: space for space in (PAPER, DEMO)}


def load_space(name_or_path: str) -> Space:
    """A built-in space by name, or a space file. Raises ArtefactError, InputError, ArchitectureError."""
    if name_or_path in SPACES:
        return SPACES[name_or_path]
    path = Path(name_or_path)
    if not path.suffix and not path.exists():
        raise InputError(f"there is no space {name_or_path!r}", f"choose {', '.join(SPACES)} or give a space file")
    return Space.from_dict(artefact.read_json(path, KIND, SCHEMA_VERSION, by_hand=True), name_or_path)
