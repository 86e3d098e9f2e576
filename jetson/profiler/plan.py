"""The plan of a profile: which probes it takes, along which axes, and how finely.

`Detail` is a step of a ladder from two values on an axis to all that matter. `merino_edge.jetson.profiler.time_budget`
climbs it as far as the time allows. Layers are measured on a star around one reference (merino_edge.latency.grids).
This module knows no clock.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from merino_edge import counts, forms
from merino_edge.architecture import Architecture, Ffn
from merino_edge.counts import table_bytes
from merino_edge.errors import InputError
from merino_edge.jetson.profiler import probe
from merino_edge.jetson.profiler.probe import Probe, Space, Stack
from merino_edge.latency.measurement import MODES, Cache, Mode

DEFAULT_LENGTH = 256  # positions of a cost for which no length is given
MAX_DEFAULT_LENGTH = 1024  # the longest that is measured unless lengths are given
DECODE_LENGTHS = 3  # at most: a step's cost is linear in the positions
HELD_OUT, QUICK_HELD_OUT = 50, 10
CALIBRATION, QUICK_CALIBRATION = 48, 8
CALIBRATION_DRAWS = 40  # models drawn for each calibration model
GUESTS = 64  # at most so many guests of a machine share its last cache
KERNEL_ROWS = 16  # tokens of a prompt that matrix kernels take at once
SIZE_SAMPLES = 101  # models drawn to see how large a space's models are

CacheCapacity = Callable[[int, int], int]  # (positions in use, context) -> cache positions that a step reads


@dataclass(frozen=True)
class Detail:
    """The largest number of values on each axis. The first and the last value are always among them."""

    widths: int
    ffn_ratios: int
    lengths: int
    embeddings_and_heads: int  # vocabulary sizes, and embedding widths
    projections: int
    rounds: int  # at least; a finer plan gives nothing with fewer


LADDER = (
    Detail(2, 2, 1, 2, 2, rounds=4),
    Detail(3, 2, 1, 2, 2, rounds=6),
    Detail(3, 2, 2, 2, 2, rounds=8),
    Detail(4, 2, 2, 2, 2, rounds=8),
    Detail(5, 3, 2, 2, 3, rounds=10),
    Detail(7, 3, 2, 3, 3, rounds=16),
    Detail(9, 3, 3, 3, 4, rounds=32),
    Detail(9, 3, 5, 3, 4, rounds=32),
)
MAX_ROUNDS = 240  # where time is left over


def thin(values: Sequence[Any], count: int) -> tuple[Any, ...]:
    """At most `count` of `values`, evenly picked: the last always, the first where `count` is at least 2."""
    if len(values) <= count:
        return tuple(values)
    if count == 1:
        return (values[-1],)
    return tuple(values[round(i * (len(values) - 1) / (count - 1))] for i in range(count))


def nearest(values: Sequence[int], wanted: int) -> int:
    """The value nearest to `wanted`."""
    return min(values, key=lambda value: abs(value - wanted))


@dataclass(frozen=True)
class Axes:
    """The values at which parts are measured. They stand in the table's header."""

    lengths: tuple[int, ...]  # of prompts
    capacities: tuple[int, ...]  # cache positions that a decode step reads
    widths: tuple[int, ...]
    ffn_ratios: tuple[float, ...]
    ffn: tuple[Ffn, ...]
    one_kv_head: tuple[bool, ...]  # True: one key-value head; False: one for each query head; cost is linear between
    repeats: tuple[bool, ...]  # False: layers with weights of their own; True: layers that share them
    projections: tuple[tuple[int, int], ...]
    vocab_sizes: tuple[int, ...]
    embedding_widths: tuple[int, ...]
    caches: tuple[Cache, ...]
    windows: tuple[int, ...] = ()  # of layers with one, beside those without

    @staticmethod
    def of(
        space: Space,
        detail: Detail,
        caches: tuple[Cache, ...],
        cache_capacity: CacheCapacity,
        lengths: Sequence[int],
    ) -> Axes:
        """The axes that cover `space` at `lengths`. Raises InputError where a length or a width cannot be measured."""
        positions = max(model.max_positions for model in space.models)
        if not all(0 < length <= positions for length in lengths):
            raise InputError(
                f"lengths {list(lengths)} are not within the space's {positions} positions", "ask for less"
            )
        head_dim = space.models[0].head_dim
        embedding_widths = sorted({model.embedding_width for model in space.models})
        if odd := [width for width in embedding_widths if width % head_dim]:
            raise InputError(f"embedding_width {odd[0]} is no multiple of head_dim", "change the space")
        by_product = {x * y: (x, y) for x, y in sorted(space.projections, key=lambda pair: (pair[0] * pair[1], pair))}
        # A context shorter than a bucket has fewer cache positions.
        contexts = {min(model.max_positions, max(lengths)) for model in space.models} | {max(lengths)}
        capacities = {cache_capacity(min(length, context), context) for length in lengths for context in contexts}
        return Axes(
            tuple(sorted(set(lengths))),
            thin(sorted(capacities), DECODE_LENGTHS),
            thin(space.widths, detail.widths),
            thin(space.ffn_ratios, detail.ffn_ratios),
            tuple(sorted({model.ffn for model in space.models})),
            (False, True) if space.kv_groups != (1,) else (False,),
            (False, True) if True in space.shared else (False,),
            thin(list(by_product.values()), detail.projections),
            thin(sorted({model.vocab_size for model in space.models}), detail.embeddings_and_heads),
            thin(embedding_widths, detail.embeddings_and_heads),
            caches,
            # A window as long as all that is measured hides nothing.
            tuple(w for w in space.windows if 0 < w < max(*lengths, *capacities)),
        )

    def union(self, other: Axes) -> Axes:
        """The values of both on each axis."""
        names = [field.name for field in dataclasses.fields(self)]
        both = {name: {*getattr(self, name), *getattr(other, name)} for name in names}
        return Axes(**{name: tuple(sorted(values)) for name, values in both.items()})

    def to_dict(self) -> dict[str, Any]:
        """The axes as the table's header holds them."""
        return {
            name: [list(x) if isinstance(x, tuple) else x for x in v]
            for name, v in dataclasses.asdict(self).items()
            if v or name != "windows"  # so that tables without windows are as they were
        }

    @staticmethod
    def from_header(header: Mapping[str, Any]) -> Axes | None:
        """The axes of a begun table; None where a version began it that had other axes."""
        header = {"windows": [], **header}
        names = [field.name for field in dataclasses.fields(Axes)]
        if not all(isinstance(header.get(name), list) for name in names) or forms.problem(dict(header), Axes):
            return None
        values: dict[str, Any] = {
            name: tuple(tuple(x) if isinstance(x, list) else x for x in header[name]) for name in names
        }
        return Axes(**values)


@dataclass(frozen=True)
class Plan:
    """All probes of a profile, and the axes that they cover."""

    axes: Axes
    quick: bool
    default_length: int
    reference: Mapping[str, Any]  # of the star: {"ffn", "ratio", "decode", "prefill"}
    probes: tuple[Probe, ...]
    rounds: int

    @property
    def grid(self) -> dict[str, Any]:
        """What the probes cover, for the table's header."""
        fields = {"quick": self.quick, "default_length": self.default_length, "reference": dict(self.reference)}
        return {**self.axes.to_dict(), **fields}


def make_plan(
    space: Space,
    precision: str,
    *,
    quick: bool = False,
    lengths: Sequence[int] | None = None,
    begun: Mapping[str, Any] | None = None,
    detail: Detail = LADDER[-1],
    cache_bytes: int = 0,
    eviction_head_bytes: int = 0,
    cache_capacity: CacheCapacity = lambda positions, context: positions,
    also: Sequence[Architecture] = (),
) -> Plan:
    """The probes that cover `space`, and whole models to calibrate and to check the table. Raises InputError.

    `lengths` replace the usual ones. `begun` is the header of a table to extend. `cache_bytes` is the size of the
    processor's last cache, 0 where no step is timed with cold caches. Warm layers get an eviction head of
    `eviction_head_bytes`, or as large as the smallest head of the space. `also` are models to measure as a whole.
    """
    begun_axes = None if begun is None else Axes.from_header(begun)
    if begun is not None and begun_axes is None:
        raise InputError("the table was begun by an older version and cannot be continued", "choose another --out")
    positions = max(model.max_positions for model in space.models)
    if begun_axes is not None and lengths is None:
        lengths = [length for length in begun_axes.lengths if length <= positions] or None
    top = min(positions, DEFAULT_LENGTH if quick else MAX_DEFAULT_LENGTH)
    parts = (4, 1) if quick or detail.lengths < 3 else thin((16, 8, 4, 2, 1), detail.lengths)
    shortest, *inner, longest = (max(1, top // part) for part in parts)
    usual = lengths or [shortest, *map(_typical, inner), longest]
    axes = Axes.of(space, detail, _caches(space, precision, cache_bytes), cache_capacity, usual)
    default = min(DEFAULT_LENGTH, axes.lengths[-1]) if lengths is None else axes.lengths[len(axes.lengths) // 2]
    reference: Mapping[str, Any] = {
        "ffn": axes.ffn[0],
        "ratio": axes.ffn_ratios[0],
        "decode": nearest(axes.capacities, cache_capacity(default, max(axes.lengths))),
        "prefill": nearest(axes.lengths, default),
    }
    if begun_axes is not None and begun is not None:
        axes, default, quick = axes.union(begun_axes), begun["default_length"], begun["quick"]
        reference = begun["reference"]
    # The entries depend on the axes alone. The positions only have to hold the longest length.
    base = dataclasses.replace(space.models[0], max_positions=max(axes.lengths[-1], axes.capacities[-1]))
    eviction_head_bytes = min(eviction_head_bytes, *(table_bytes(model, precision) for model in space.models))
    layers = _layers(base, axes, reference, precision, cache_bytes=cache_bytes, eviction_head_bytes=eviction_head_bytes)
    probes = [*layers, *_other_parts(base, axes, reference)]
    between = sorted({*axes.lengths, default})
    counts = (QUICK_CALIBRATION, QUICK_HELD_OUT) if quick else (CALIBRATION, HELD_OUT)
    probes += _calibration(space, precision, counts[0], between, default)
    probes += probe.sample_models(space, "model", counts[1], between, default, seed=0)
    probes += _public(also, sorted({axes.lengths[0], default, axes.lengths[-1]}))
    return Plan(axes, quick, default, reference, tuple({p.key: p for p in probes}.values()), detail.rounds)


def _typical(length: int) -> int:
    """The length nearby that costs per token what most lengths do.

    Kernels take tokens by sixteen, and a multiple of sixteen costs up to 6 % less per token.
    """
    return length if length < KERNEL_ROWS else length // KERNEL_ROWS * KERNEL_ROWS + KERNEL_ROWS // 2


def _calibration(space: Space, precision: str, count: int, lengths: Sequence[int], default_length: int) -> list[Probe]:
    """Whole models in decode. Most are of the smaller half, where it is unknown how much the caches hold."""
    drawn = probe.draw_models(space, CALIBRATION_DRAWS * count, tuple(lengths), default_length, seed=1)
    by_size = sorted(drawn, key=lambda one: one[0].weight_bytes(precision))
    small, large = by_size[: len(by_size) // 2], by_size[len(by_size) // 2 :]
    few = count // 3
    chosen = (*thin(small, count - few), *thin(large, few))
    return [probe.whole("calibration", "decode", length, a) for a, length in chosen]


def _public(models: Sequence[Architecture], lengths: Sequence[int]) -> Iterator[Probe]:
    """Whole models that need not be of the space, with no more positions than are measured."""
    for a, mode, length in itertools.product(models, MODES, lengths):
        if length <= a.max_positions:
            positions = min(a.max_positions, lengths[-1])
            yield probe.whole("public", mode, length, dataclasses.replace(a, max_positions=positions))


def _caches(space: Space, precision: str, cache_bytes: int) -> tuple[Cache, ...]:
    """The cache states to measure: warm for models well within the processor's caches, cold for far larger ones."""
    rng = random.Random(0)
    sizes = sorted(counts.step_bytes(space.architecture(space.sample(rng)), precision, 0) for _ in range(SIZE_SAMPLES))
    if not cache_bytes or sizes[-1] < cache_bytes / GUESTS:
        return ("warm",)
    return ("cold",) if sizes[0] > 2 * cache_bytes else ("cold", "warm")


def _layers(
    base: Architecture,
    axes: Axes,
    reference: Mapping[str, Any],
    precision: str,
    *,
    cache_bytes: int,
    eviction_head_bytes: int,
) -> Iterator[Probe]:
    """The star of layers.

    Every FFN is measured at the reference's capacity with all key-value heads. The reference's FFN is measured at every
    capacity and share of key-value heads. In a prefill every FFN is measured at every length, without shared layers.
    Layers with a window are measured as those with the reference's FFN are.
    """
    within = cache_bytes / 4 if cache_bytes else float("inf")

    core = (reference["ffn"], reference["ratio"])
    for width, repeats in itertools.product(axes.widths, axes.repeats):
        shares = [share for share in axes.one_kv_head if not (share and width == base.head_dim)]
        kinds = [*itertools.product(axes.ffn, axes.ffn_ratios, (0,)), *((*core, window) for window in axes.windows)]
        for (ffn, ratio, window), share in itertools.product(kinds, shares):
            layer_base = dataclasses.replace(base, ffn=ffn)
            stack = Stack(layer_base, width, round(width * ratio), one_kv_head=share, shared=repeats, window=window)
            depth = probe.depth_within(stack, precision, within)
            central = (ffn, ratio) == core
            if not central and share:
                continue
            for capacity, cache in itertools.product(axes.capacities, axes.caches):
                if central or capacity == reference["decode"]:
                    vocab_size = stack.eviction_head_vocab_size(
                        precision, eviction_head_bytes if cache == "warm" else 0
                    )
                    yield probe.layer(stack, "decode", capacity, cache, depth=depth, vocab_size=vocab_size)
            if not repeats:
                for length in axes.lengths:
                    yield probe.layer(stack, "prefill", length, "warm", depth=min(depth, 3))


def _other_parts(base: Architecture, axes: Axes, reference: Mapping[str, Any]) -> Iterator[Probe]:
    """Projections, and embeddings with heads."""
    steps: list[tuple[Mode, int, Cache]] = [("decode", reference["decode"], cache) for cache in axes.caches]
    steps += [("prefill", length, "warm") for length in axes.lengths]
    for mode, length, cache in steps:
        for before, after in axes.projections:
            yield probe.width_change(base, mode, length, cache, before=before, after=after)
        for vocab_size, width in itertools.product(axes.vocab_sizes, axes.embedding_widths):
            yield probe.embedding_and_head(base, mode, length, cache, vocab_size=vocab_size, width=width)
