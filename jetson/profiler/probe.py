"""What a profile times: probes, small models whose times combine into one entry of the latency table.

Every probe is made of whole models that the exporter builds as it would any other, with a vocabulary of two tokens
so that the ends are small, except where the ends are what is measured, and where a stack would find itself in caches
that a whole model's head sweeps every step: there it has a head as large ("company").

| entry | models | cost |
|---|---|---|
| layer, repeat | stacks of one and of more identical layers | slope over the number of layers |
| width_change | one with an embedding narrower or wider than its block, one without | their difference |
| end | stacks as wide as the real embedding, under the real vocabulary | what is left at no layers |
| calibration, model | a whole model | its time |

A probe knows no clock; `merino_edge.jetson.profiler.profiler` times it.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merino_edge.architecture import Architecture, Block
from merino_edge.counts import table_bytes
from merino_edge.latency.measurement import MODES, Cache, Mode, What, entry_key

TINY_VOCAB = 2
DEPTHS = (4, 3, 2)  # of the deeper stack of a slope; the other has one layer
MAX_DRAWS = 10  # tries per whole model: a tiny space may not have as many


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
    """Models timed side by side in one mode at one length; their times, each times its weight, sum to the entry."""

    what: What
    mode: Mode
    length: int
    shape: Mapping[str, Any]
    cache: Cache
    models: tuple[Architecture, ...]
    weights: tuple[float, ...]

    @property
    def key(self) -> str:
        """That of the measurement it makes."""
        return entry_key(self.what, self.mode, self.length, self.shape, self.cache)

    def cost(self, values: Sequence[float]) -> float:
        """The entry's cost from one round: a time or an energy per model."""
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))


@dataclass(frozen=True)
class Stack:
    """Identical layers, with the context and everything else of `base`."""

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

    def eviction_head_vocab_size(self, precision: str, byte_count: float) -> int:
        """The vocabulary whose head has so many bytes."""
        row = table_bytes(self.model(1, 1, self.width), precision)
        return max(TINY_VOCAB, round(byte_count / row))

    def layers_weight_bytes(self, layers: int, precision: str) -> float:
        """Bytes of the layers' weights."""
        tall, low = (self.model(n, TINY_VOCAB, self.width).weight_bytes(precision) for n in (layers + 1, 1))
        return tall - low


def layer(stack: Stack, mode: Mode, length: int, cache: Cache, depth: int, vocab_size: int = TINY_VOCAB) -> Probe:
    """The marginal layer of a stack of `depth`."""
    models = tuple(stack.model(layers, vocab_size, stack.width) for layers in (1, depth))
    block, slope = stack.block(1), 1 / (depth - 1)
    names = ("width", "heads", "kv_heads", "ffn_width")
    shape = {"ffn": stack.base.ffn, **{name: getattr(block, name) for name in names}}
    return Probe("repeat" if stack.shared else "layer", mode, length, shape, cache, models, (-slope, slope))


def width_change(base: Architecture, mode: Mode, length: int, cache: Cache, before: int, after: int) -> Probe:
    """One projection. A decode step takes the way in and the way out; of a prefill only one token takes the way out,
    which is neglected."""
    stack = _small(base, after)
    models = tuple(stack.model(1, TINY_VOCAB, embedding) for embedding in (before, after))
    share = 0.5 if mode == "decode" else 1.0
    return Probe("width_change", mode, length, {"before": before, "after": after}, cache, models, (share, -share))


def end(base: Architecture, mode: Mode, length: int, cache: Cache, vocab_size: int, width: int) -> Probe:
    """What stands above and below the layers."""
    models = tuple(_small(base, width).model(layers, vocab_size, width) for layers in (1, 3))
    shape = {"vocab_size": vocab_size, "embedding_width": width}
    return Probe("end", mode, length, shape, cache, models, (1.5, -0.5))


def _small(base: Architecture, width: int) -> Stack:
    """The least layers of a width: what is extrapolated over them disturbs least."""
    return Stack(base, width, base.head_dim, one_kv_head=True)


def depth_within(stack: Stack, precision: str, byte_count: float) -> int:
    """The deepest stack whose weights stay within so many bytes, of DEPTHS."""
    return next((depth for depth in DEPTHS if stack.layers_weight_bytes(depth, precision) <= byte_count), DEPTHS[-1])


def whole(what: What, mode: Mode, length: int, a: Architecture) -> Probe:
    return Probe(what, mode, length, {"architecture": a.to_dict()}, "warm", (a,), (1.0,))


def drawn(
    space: Space, what: What, count: int, lengths: Sequence[int], default_length: int, seed: int
) -> Iterator[Probe]:
    """Different whole models drawn from the space in both modes, every other one at a length between the measured ones,
    as far as it has positions."""
    rng = random.Random(seed)
    known: set[tuple[Architecture, int]] = set()
    for draw in range(MAX_DRAWS * count):
        length = default_length if draw % 2 == 0 else rng.randint(lengths[0], lengths[-1])
        a = space.architecture(space.sample(rng))
        length = min(length, a.max_positions)
        if length >= lengths[0] and (a, length) not in known:
            known.add((a, length))
            yield from (whole(what, mode, length, a) for mode in MODES)
        if len(known) == count:
            return
