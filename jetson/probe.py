"""What a profile times: probes, small models whose times combine into one entry of the latency table.

Every probe is made of whole models that the exporter builds as it would any other, with a vocabulary of two tokens
so that the ends are small, except where the ends are what is measured:

| entry | models | cost |
|---|---|---|
| layer, repeat | stacks of few and of more identical layers | slope over the number of layers |
| width_change | one with an embedding narrower or wider than its block, one without | their difference: in and out |
| end | stacks as wide as the real embedding, under the real vocabulary | what is left at no layers |

A probe knows no clock; `merino_edge.jetson.profiler` times it.
"""

from __future__ import annotations

import dataclasses
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, Protocol

from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.latency_table import Mode, What

TINY_VOCAB = 2
DEFAULT_LENGTH = 256  # positions a cost is for when nobody says
HELD_OUT_MODELS = 10


class Space(Protocol):
    """The choices a table must cover: `merino_edge.search.space.Space`, or anything shaped like it."""

    @property
    def model(self) -> Architecture: ...  # everything but the blocks
    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def ffn_ratios(self) -> tuple[float, ...]: ...  # FFN width / width
    @property
    def shared(self) -> bool: ...
    def sample(self, rng: random.Random) -> tuple[int, ...]: ...
    def architecture(self, genome: tuple[int, ...]) -> Architecture: ...


@dataclass(frozen=True)
class Probe:
    """Models timed side by side at one length; their times, each times its weight, sum to the entry."""

    what: What
    length: int
    shape: Mapping[str, Any]
    models: tuple[Architecture, ...]
    weights: tuple[float, ...]

    @property
    def has_head(self) -> bool:
        """Whether its models end in the real head, as whole models do."""
        return self.what in ("end", "model")

    def cost_ms(self, mode: Mode, times_ms: Mapping[Mode, Sequence[float]]) -> float:
        """The entry's cost from one round of times, one per model and mode."""
        cost = {m: sum(w * t for w, t in zip(self.weights, times, strict=True)) for m, times in times_ms.items()}
        if self.what == "width_change" and mode == "prefill":
            # the way in is taken by every token, the way out by the last one only, as in decode
            return 2 * cost["prefill"] - cost["decode"]
        return cost[mode]


@dataclass(frozen=True)
class Plan:
    """All probes of a profile. `grid` says what they cover, for the table's header."""

    grid: dict[str, Any]
    probes: tuple[Probe, ...]


def thin(values: Sequence[Any], count: int) -> tuple[Any, ...]:
    """At most `count` of `values`, evenly picked, first and last always among them."""
    if len(values) <= count:
        return tuple(values)
    return tuple(values[round(i * (len(values) - 1) / (count - 1))] for i in range(count))


def make_plan(space: Space, precision: str, quick: bool) -> Plan:
    """The probes that cover `space`, and whole models to check them with. Raises InputError.

    In full: every width, three FFN ratios (cost is linear in it), three lengths up to 1024. Quick: at most four
    widths, the outer two ratios, two lengths up to 256.
    """
    top = min(space.model.max_positions, 256 if quick else 1024)
    lengths = sorted({max(1, top // part) for part in ((4, 1) if quick else (16, 4, 1))})
    if space.model.embedding_width % space.model.head_dim:
        raise InputError(
            f"embedding_width {space.model.embedding_width} is no multiple of head_dim", "change the space"
        )
    widths = thin(space.widths, 4) if quick else space.widths
    ratios = thin(space.ffn_ratios, 2 if quick else 3)
    rng = random.Random(0)
    typical = [space.architecture(space.sample(rng)).weight_bytes(precision) for _ in range(101)]
    typical_bytes = statistics.median(typical)
    probes: list[Probe] = []
    for length in lengths:
        for width in widths:
            for ratio in ratios:
                for shared in (False, True) if space.shared else (False,):
                    ffn_width = round(width * ratio)
                    # no deeper than models are: a stack that overflows a cache they fit in would mislead
                    fits = _stack(space.model, width, ffn_width, 6).weight_bytes(precision) <= typical_bytes
                    depths = (2, 6) if fits else (1, 3)
                    probes.append(_layer(space.model, length, width, ffn_width, shared, depths))
        probes += [_width_change(space.model, length, *pair) for pair in _width_pairs(space)]
        probes.append(_end(space.model, length))
    default = min(DEFAULT_LENGTH, top)
    probes += held_out(space, sorted({*lengths, default}), default)
    grid = {
        "lengths": lengths,
        "widths": list(widths),
        "ffn_ratios": list(ratios),
        "quick": quick,
        "default_length": default,
    }
    return Plan(grid, tuple(probes))


def _stack(base: Architecture, width: int, ffn_width: int, layers: int, shared: bool = False) -> Architecture:
    heads = width // base.head_dim
    block = Block(width, layers, heads, heads, ffn_width, shared)
    return dataclasses.replace(base, blocks=(block,))


def _layer(base: Architecture, length: int, width: int, ffn_width: int, shared: bool, depths: tuple[int, int]) -> Probe:
    base = dataclasses.replace(base, vocab_size=TINY_VOCAB, embedding_width=width)
    models = tuple(_stack(base, width, ffn_width, layers, shared) for layers in depths)
    block, slope = models[0].blocks[0], 1 / (depths[1] - depths[0])
    shape = {"width": width, "heads": block.heads, "kv_heads": block.kv_heads, "ffn_width": ffn_width}
    return Probe("repeat" if shared else "layer", length, shape, models, (-slope, slope))


def _width_pairs(space: Space) -> tuple[tuple[int, int], ...]:
    """Up to four pairs of different widths whose products span all that occur."""
    widths = sorted({*space.widths, space.model.embedding_width})
    pairs = sorted(combinations(widths, 2), key=lambda pair: (pair[0] * pair[1], pair))
    by_product = {before * after: (before, after) for before, after in pairs}
    return thin(list(by_product.values()), 4)


def _width_change(base: Architecture, length: int, before: int, after: int) -> Probe:
    base = dataclasses.replace(base, vocab_size=TINY_VOCAB)
    models = tuple(
        _stack(dataclasses.replace(base, embedding_width=embedding), after, after, 2) for embedding in (before, after)
    )
    return Probe("width_change", length, {"before": before, "after": after}, models, (0.5, -0.5))


def _end(base: Architecture, length: int) -> Probe:
    width = base.embedding_width
    models = tuple(_stack(base, width, width, layers) for layers in (1, 3))
    return Probe("end", length, {"vocab_size": base.vocab_size, "embedding_width": width}, models, (1.5, -0.5))


def held_out(space: Space, lengths: Sequence[int], default_length: int, seed: int = 0) -> list[Probe]:
    """Different whole models drawn from the space, every other one at a length between the measured ones."""
    rng = random.Random(seed)
    probes: dict[tuple[Architecture, int], Probe] = {}
    for draw in range(10 * HELD_OUT_MODELS):  # a tiny space may not have as many
        length = default_length if draw % 2 == 0 else rng.randint(lengths[0], lengths[-1])
        a = space.architecture(space.sample(rng))
        if len(probes) < HELD_OUT_MODELS:
            probes[a, length] = Probe("model", length, {"architecture": a.to_dict()}, (a,), (1.0,))
    return list(probes.values())
