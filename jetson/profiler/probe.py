"""Probes: small models that a profile times, whose times combine into one entry of the latency table.

The exporter builds a probe's models as it would any other. Their vocabulary has two tokens, so that embedding and head
are small, except where these are measured. In a whole model the head evicts the layers from an inner cache at every
step. So warm stacks have an eviction head: a vocabulary whose head is as large as needed for that.

| entry | models | cost |
|---|---|---|
| layer, repeat | stacks of one and of more identical layers | the slope over the number of layers |
| width_change | one with an embedding narrower or wider than its block, one without | their difference |
| end | stacks as wide as the real embedding, under the real vocabulary | extrapolated to no layers |
| calibration, model | a whole model | its time |

A probe knows no clock; `merino_edge.jetson.profiler.timer` times it.
"""

from __future__ import annotations

import dataclasses
import functools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from merino_edge.architecture import Architecture, Block
from merino_edge.counts import table_bytes
from merino_edge.latency.measurement import EMBEDDING_AND_HEAD, MODES, SHARED_LAYER, Cache, Mode, What, entry_key

TINY_VOCAB = 2
DEPTHS = (4, 3, 2)  # of a slope's deeper stack; the other has one layer
MAX_DRAWS = 10  # for each whole model: a tiny space may not have enough different ones


class Space(Protocol):
    """The choices that a table must cover; `merino_edge.search.space.Space` has this form."""

    def __hash__(self) -> int: ...

    @property
    def models(self) -> tuple[Architecture, ...]: ...  # all combinations of what is outside the blocks
    @property
    def widths(self) -> tuple[int, ...]: ...
    @property
    def ffn_ratios(self) -> tuple[float, ...]: ...  # FFN width / width
    @property
    def kv_groups(self) -> tuple[int, ...]: ...  # query heads per key-value head
    @property
    def shared(self) -> tuple[bool, ...]: ...
    @property
    def windows(self) -> tuple[int, ...]: ...  # positions that a layer attends to; 0: all
    @property
    def projections(self) -> tuple[tuple[int, int], ...]: ...
    def sample(self, rng: random.Random) -> Any: ...
    def architecture(self, genome: Any) -> Architecture: ...


@dataclass(frozen=True)
class Probe:
    """Models timed side by side in one mode at one length. The entry's cost is the weighted sum of their times."""

    what: What
    mode: Mode
    length: int
    shape: Mapping[str, Any]
    cache: Cache
    models: tuple[Architecture, ...]
    weights: tuple[float, ...]

    @property
    def key(self) -> str:
        """The key of the measurement that it makes."""
        return entry_key(self.what, self.mode, self.length, self.shape, self.cache)

    def cost(self, values: Sequence[float]) -> float:
        """The entry's cost from one round's `values`: a time or an energy of each model."""
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))


@dataclass(frozen=True)
class Stack:
    """Identical layers; the context and everything else is that of `base`."""

    base: Architecture
    width: int
    ffn_width: int
    one_kv_head: bool = False
    shared: bool = False
    window: int = 0

    def block(self, layers: int) -> Block:
        """The block of so many layers."""
        heads = self.width // self.base.head_dim
        return Block(
            self.width, layers, heads, 1 if self.one_kv_head else heads, self.ffn_width, self.shared, self.window
        )

    def model(self, layers: int, vocab_size: int, embedding_width: int) -> Architecture:
        """The whole model of that block."""
        return dataclasses.replace(
            self.base, vocab_size=vocab_size, embedding_width=embedding_width, blocks=(self.block(layers),)
        )

    def eviction_head_vocab_size(self, precision: str, byte_count: float) -> int:
        """The size of a vocabulary whose head has `byte_count` bytes."""
        row = table_bytes(self.model(1, 1, self.width), precision)
        return max(TINY_VOCAB, round(byte_count / row))

    def layers_weight_bytes(self, layers: int, precision: str) -> float:
        """The bytes of the layers' weights, without embedding and head."""
        tall, low = (self.model(n, TINY_VOCAB, self.width).weight_bytes(precision) for n in (layers + 1, 1))
        return tall - low


def layer(stack: Stack, mode: Mode, length: int, cache: Cache, *, depth: int, vocab_size: int = TINY_VOCAB) -> Probe:
    """The marginal layer of a stack with `depth` layers."""
    models = tuple(stack.model(layers, vocab_size, stack.width) for layers in (1, depth))
    block, slope = stack.block(1), 1 / (depth - 1)
    names = ("width", "heads", "kv_heads", "ffn_width")
    shape = {"ffn": stack.base.ffn, **{name: getattr(block, name) for name in names}}
    shape |= {"window": stack.window} if stack.window else {}
    return Probe(SHARED_LAYER if stack.shared else "layer", mode, length, shape, cache, models, (-slope, slope))


def width_change(base: Architecture, mode: Mode, length: int, cache: Cache, *, before: int, after: int) -> Probe:
    """One projection between two widths.

    A decode step takes the way in and the way out. In a prefill one token takes the way out, which is neglected.
    """
    stack = _small(base, after)
    models = tuple(stack.model(1, TINY_VOCAB, embedding) for embedding in (before, after))
    share = 0.5 if mode == "decode" else 1.0
    return Probe("width_change", mode, length, {"before": before, "after": after}, cache, models, (share, -share))


def embedding_and_head(
    base: Architecture, mode: Mode, length: int, cache: Cache, *, vocab_size: int, width: int
) -> Probe:
    """The embedding, the head and everything else that a step costs without layers."""
    models = tuple(_small(base, width).model(layers, vocab_size, width) for layers in (1, 3))
    shape = {"vocab_size": vocab_size, "embedding_width": width}
    return Probe(EMBEDDING_AND_HEAD, mode, length, shape, cache, models, (1.5, -0.5))


def _small(base: Architecture, width: int) -> Stack:
    """The smallest layers of a width: an extrapolation over them has the least error."""
    return Stack(base, width, base.head_dim, one_kv_head=True)


def depth_within(stack: Stack, precision: str, byte_count: float) -> int:
    """The largest of DEPTHS at which the stack's weights stay within `byte_count` bytes."""
    return next((depth for depth in DEPTHS if stack.layers_weight_bytes(depth, precision) <= byte_count), DEPTHS[-1])


def whole(what: What, mode: Mode, length: int, a: Architecture) -> Probe:
    """The whole model `a`; `what` is "calibration" or "model"."""
    return Probe(what, mode, length, {"architecture": a.to_dict()}, "warm", (a,), (1.0,))


def sample_models(
    space: Space, what: What, count: int, lengths: Sequence[int], default_length: int, *, seed: int
) -> Iterator[Probe]:
    """At most `count` different whole models drawn from the space, each in both modes.

    Every other model is timed at a random length between the measured ones, as far as it has positions.
    """
    for a, length in draw_models(space, count, tuple(lengths), default_length, seed=seed):
        yield from (whole(what, mode, length, a) for mode in MODES)


@functools.lru_cache(maxsize=8)  # plans of several details hold the same models
def draw_models(
    space: Space, count: int, lengths: tuple[int, ...], default_length: int, *, seed: int
) -> tuple[tuple[Architecture, int], ...]:
    """The different models of `sample_models`, each with its length."""
    rng = random.Random(seed)
    architecture = functools.cache(space.architecture)  # draws from a small space repeat themselves
    drawn: dict[tuple[Architecture, int], None] = {}
    for draw in range(MAX_DRAWS * count):
        length = default_length if draw % 2 == 0 else rng.randint(lengths[0], lengths[-1])
        a = architecture(space.sample(rng))
        length = min(length, a.max_positions)
        if length >= lengths[0]:
            drawn[a, length] = None
        if len(drawn) == count:
            break
    return tuple(drawn)
