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
import itertools
import random
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merino_edge.architecture import Architecture, Block, Ffn
from merino_edge.errors import InputError
from merino_edge.measurement import Mode, What

TINY_VOCAB = 2
DEFAULT_LENGTH = 256  # positions a cost is for when nobody says
HELD_OUT_MODELS = 10


class Space(Protocol):
    """The choices a table must cover: `merino_edge.search.space.Space`, or anything shaped like it."""

    @property
    def models(self) -> tuple[Architecture, ...]: ...  # everything but the blocks, in every allowed combination
    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def ffn_ratios(self) -> tuple[float, ...]: ...  # FFN width / width
    @property
    def kv_groups(self) -> tuple[int, ...]: ...  # query heads per key-value head
    @property
    def shared(self) -> tuple[bool, ...]: ...
    @property
    def projections(self) -> tuple[tuple[int, int], ...]: ...
    def sample(self, rng: random.Random) -> Any: ...
    def architecture(self, genome: Any) -> Architecture: ...


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


def thin(values: Sequence[Any], count: int) -> tuple[Any, ...]:
    """At most `count` of `values`, evenly picked, first and last always among them."""
    if len(values) <= count:
        return tuple(values)
    return tuple(values[round(i * (len(values) - 1) / (count - 1))] for i in range(count))


@dataclass(frozen=True)
class Axes:
    """What is measured of layers, width changes and ends: every combination. In a table's header."""

    lengths: tuple[int, ...]
    widths: tuple[int, ...]
    ffn_ratios: tuple[float, ...]
    ffn: tuple[Ffn, ...]
    one_kv_head: tuple[bool, ...]  # beside as many key-value heads as query heads; cost is linear between
    repeats: tuple[bool, ...]  # layers with own weights, and further layers of shared ones
    projections: tuple[tuple[int, int], ...]
    vocab_sizes: tuple[int, ...]
    embedding_widths: tuple[int, ...]

    @staticmethod
    def of(space: Space, quick: bool, lengths: Sequence[int] | None = None) -> Axes:
        """What covers `space`. In full: up to nine widths, three FFN ratios (cost is linear in it), three lengths up to
        1024. Quick: up to four widths, the outer two ratios, two lengths up to 256. Raises InputError."""
        positions = max(model.max_positions for model in space.models)
        top = min(positions, 256 if quick else 1024)
        if lengths is not None and not all(0 < length <= positions for length in lengths):
            raise InputError(
                f"lengths {list(lengths)} are not within the space's {positions} positions", "ask for less"
            )
        head_dim = space.models[0].head_dim
        embedding_widths = sorted({model.embedding_width for model in space.models})
        if odd := [width for width in embedding_widths if width % head_dim]:
            raise InputError(f"embedding_width {odd[0]} is no multiple of head_dim", "change the space")
        by_product = {x * y: (x, y) for x, y in sorted(space.projections, key=lambda pair: (pair[0] * pair[1], pair))}
        return Axes(
            tuple(sorted(set(lengths or (max(1, top // part) for part in ((4, 1) if quick else (16, 4, 1)))))),
            thin(space.widths, 4 if quick else 9),
            thin(space.ffn_ratios, 2 if quick else 3),
            tuple(sorted({model.ffn for model in space.models})),
            (False, True) if space.kv_groups != (1,) else (False,),
            (False, True) if True in space.shared else (False,),
            thin(list(by_product.values()), 4),
            thin(sorted({model.vocab_size for model in space.models}), 3),
            thin(embedding_widths, 3),
        )

    def union(self, other: Axes) -> Axes:
        """Both, so that every combination stays measured."""
        names = [field.name for field in dataclasses.fields(self)]
        both = {name: {*getattr(self, name), *getattr(other, name)} for name in names}
        return Axes(**{name: tuple(sorted(values)) for name, values in both.items()})

    def to_dict(self) -> dict[str, Any]:
        return {
            name: [list(x) if isinstance(x, tuple) else x for x in v] for name, v in dataclasses.asdict(self).items()
        }

    @staticmethod
    def from_header(header: Mapping[str, Any]) -> Axes | None:
        """Of a begun table; None where it was begun by a version that measured other axes."""
        names = [field.name for field in dataclasses.fields(Axes)]
        if not all(isinstance(header.get(name), list) for name in names):
            return None
        found: dict[str, Any] = {
            name: tuple(tuple(x) if isinstance(x, list) else x for x in header[name]) for name in names
        }
        return Axes(**found)


@dataclass(frozen=True)
class Plan:
    """All probes of a profile, and what they cover, for the table's header."""

    axes: Axes
    quick: bool
    default_length: int
    probes: tuple[Probe, ...]

    @property
    def grid(self) -> dict[str, Any]:
        return {**self.axes.to_dict(), "quick": self.quick, "default_length": self.default_length}


def make_plan(
    space: Space,
    precision: str,
    quick: bool,
    lengths: Sequence[int] | None = None,
    begun: Mapping[str, Any] | None = None,
) -> Plan:
    """The probes that cover `space`, and whole models to check them with. `lengths`: instead of the usual ones;
    `begun`: the header of a table that is to be extended. Raises InputError."""
    known = None if begun is None else Axes.from_header(begun)
    if begun is not None and known is None:
        raise InputError("the table was begun by an older version and cannot be continued", "choose another --out")
    if known is not None and lengths is None:
        positions = max(model.max_positions for model in space.models)
        lengths = [length for length in known.lengths if length <= positions] or None
    axes = Axes.of(space, quick, lengths)
    default = min(DEFAULT_LENGTH, axes.lengths[-1]) if lengths is None else axes.lengths[len(axes.lengths) // 2]
    if known is not None and begun is not None:
        axes, default, quick = axes.union(known), begun["default_length"], begun["quick"]
    rng = random.Random(0)
    typical_bytes = statistics.median(space.architecture(space.sample(rng)).weight_bytes(precision) for _ in range(101))
    # What is measured depends on the axes alone; the positions only have to hold the longest.
    base = dataclasses.replace(space.models[0], max_positions=max(axes.lengths))
    probes: list[Probe] = []
    for length in axes.lengths:
        layers = itertools.product(axes.ffn, axes.widths, axes.ffn_ratios, axes.one_kv_head, axes.repeats)
        for ffn, width, ratio, one_kv_head, repeats in layers:
            if one_kv_head and width == base.head_dim:
                continue  # a single head is both
            stack = _Stack(dataclasses.replace(base, ffn=ffn), width, round(width * ratio), one_kv_head, repeats)
            # no deeper than models are: a stack that overflows a cache they fit in would mislead
            fits = stack.model(6, base.vocab_size, base.embedding_width).weight_bytes(precision) <= typical_bytes
            probes.append(_layer(stack, length, (2, 6) if fits else (1, 3)))
        probes += [_width_change(base, length, *pair) for pair in axes.projections]
        for vocab_size, width in itertools.product(axes.vocab_sizes, axes.embedding_widths):
            probes.append(_end(base, length, vocab_size, width))
    probes += held_out(space, sorted({*axes.lengths, default}), default)
    return Plan(axes, quick, default, tuple(probes))


# --- probes ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Stack:
    """Identical layers."""

    base: Architecture
    width: int
    ffn_width: int
    one_kv_head: bool = False
    shared: bool = False

    def block(self, layers: int) -> Block:
        heads = self.width // self.base.head_dim
        return Block(self.width, layers, heads, 1 if self.one_kv_head else heads, self.ffn_width, self.shared)

    def model(self, layers: int, vocab_size: int, embedding_width: int) -> Architecture:
        return dataclasses.replace(
            self.base, vocab_size=vocab_size, embedding_width=embedding_width, blocks=(self.block(layers),)
        )


def _layer(stack: _Stack, length: int, depths: tuple[int, int]) -> Probe:
    models = tuple(stack.model(layers, TINY_VOCAB, stack.width) for layers in depths)
    block, slope = stack.block(1), 1 / (depths[1] - depths[0])
    shape = {
        "ffn": stack.base.ffn,
        "width": block.width,
        "heads": block.heads,
        "kv_heads": block.kv_heads,
        "ffn_width": block.ffn_width,
    }
    return Probe("repeat" if stack.shared else "layer", length, shape, models, (-slope, slope))


def _width_change(base: Architecture, length: int, before: int, after: int) -> Probe:
    stack = _Stack(base, after, after)
    models = tuple(stack.model(2, TINY_VOCAB, embedding) for embedding in (before, after))
    return Probe("width_change", length, {"before": before, "after": after}, models, (0.5, -0.5))


def _end(base: Architecture, length: int, vocab_size: int, width: int) -> Probe:
    models = tuple(_Stack(base, width, width).model(layers, vocab_size, width) for layers in (1, 3))
    return Probe("end", length, {"vocab_size": vocab_size, "embedding_width": width}, models, (1.5, -0.5))


def held_out(space: Space, lengths: Sequence[int], default_length: int, seed: int = 0) -> list[Probe]:
    """Different whole models drawn from the space, every other one at a length between the measured ones, as far as it
    has positions."""
    rng = random.Random(seed)
    probes: dict[tuple[Architecture, int], Probe] = {}
    for draw in range(10 * HELD_OUT_MODELS):  # a tiny space may not have as many
        length = default_length if draw % 2 == 0 else rng.randint(lengths[0], lengths[-1])
        a = space.architecture(space.sample(rng))
        length = min(length, a.max_positions)
        if len(probes) < HELD_OUT_MODELS and length >= lengths[0]:
            probes[a, length] = Probe("model", length, {"architecture": a.to_dict()}, (a,), (1.0,))
    return list(probes.values())
