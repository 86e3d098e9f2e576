"""A latency table for the tests of the search: a real file whose values follow a formula, so marked estimated."""

from __future__ import annotations

import dataclasses
import itertools
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from merino_edge import artefact, counts
from merino_edge.architecture import Architecture
from merino_edge.latency.measurement import MODES, Measurement, Mode, What, add_checksum
from merino_edge.latency.step import Step
from merino_edge.latency.step_time import COLD, WARM, Piece, StepTimeModel, rounded, single
from merino_edge.latency.table import LatencyTable, family
from merino_edge.latency.table_file import KIND, SCHEMA_VERSION, load_table
from merino_edge.search.space import Space

LENGTHS = (16, 256)
BYTES_PER_MS = {"decode": 1e6, "prefill": 1e5}
MJ_PER_MS = 7.5
WriteTable = Callable[..., LatencyTable]


# The alternatives that a step-time model may have, as indices of its pieces. The last piece of one is the coldest.
ALTERNATIVES: tuple[tuple[tuple[int, ...], ...], ...] = (
    ((0, 1),),
    ((0, 1, 2),),
    ((0, 1), (0, 2)),
    ((0,), (2,)),
    ((0, 1), (2,)),
)


def entries(
    space: Space, *, projection_ms: float, energy: bool, cold: bool, slowness: float = 1.0
) -> Iterator[Measurement]:
    """The lines of a table that covers `space`.

    A time is bytes over bandwidth, more for longer caches, plus `projection_ms` per width projection. With `cold` there
    are also decode steps whose weights no hardware cache holds. Attention heads add little to those. `slowness` is a
    factor on all times.
    """
    model = space.models[0]

    def entry(what: What, mode: Mode, length: int, cost: float, **shape: object) -> Measurement:
        cost *= slowness * (1 + length / 1000)
        return Measurement(what, mode, length, shape, (cost,), MJ_PER_MS * cost if energy else None)

    for mode, length in itertools.product(MODES, LENGTHS):
        seen = set()
        for ffn, choice in itertools.product(space.ffn, space.block_choices):
            for kv_heads, window in itertools.product({1, choice.heads}, {0, choice.window}):
                shape = {"ffn": ffn, "width": choice.width, "heads": choice.heads, "kv_heads": kv_heads}
                shape |= {"window": window} if window else {}
                if (key := (*shape.values(), choice.ffn_width)) not in seen:
                    seen.add(key)
                    matrices = 3 if ffn == "swiglu" else 2
                    elements = choice.width * (
                        2 * choice.width + 2 * kv_heads * model.head_dim + matrices * choice.ffn_width
                    )
                    cost = 0.02 + elements / BYTES_PER_MS[mode]
                    cost *= 0.8 if window else 1.0
                    yield entry("layer", mode, length, cost, ffn_width=choice.ffn_width, **shape)
                    yield entry("repeat", mode, length, 0.7 * cost, ffn_width=choice.ffn_width, **shape)
                    if cold and mode == "decode":
                        swept = cost + choice.width * (choice.width + 2 * choice.ffn_width) / BYTES_PER_MS[mode]
                        for what, time in (("layer", swept), ("repeat", 0.9 * swept)):
                            line = entry(what, mode, length, time, ffn_width=choice.ffn_width, **shape)  # type: ignore[arg-type]
                            yield dataclasses.replace(line, cache="cold")
        for product in {x * y for x, y in space.projections}:
            yield entry(
                "width_change", mode, length, projection_ms + product / BYTES_PER_MS[mode], before=1, after=product
            )
        for vocabulary, width in itertools.product(space.vocabularies, space.embedding_widths):
            cost = 0.1 + vocabulary.size * width / 1e6
            yield entry("end", mode, length, cost, vocab_size=vocabulary.size, embedding_width=width)


def header_of(space: Space, precision: str, cache_buckets: int | None) -> dict[str, Any]:
    """The header, without its envelope."""
    header = {"family": family(space.models[0]), "precision": precision, "default_length": 64, "estimated": True}
    header["device"] = {"name": "Formula Board", "compatible": ["formula,one"]}
    return header if cache_buckets is None else {**header, "cache_buckets": cache_buckets}


def write_formula_table(
    folder: Path,
    space: Space,
    precision: str = "fp32",
    *,
    projection_ms: float = 0.01,
    energy: bool = False,
    step_time: StepTimeModel | None = None,
    cache_buckets: int | None = None,
    decode: dict[str, float] | None = None,
    slowness: float = 1.0,
) -> LatencyTable:
    """Write and load a table that covers `space`."""
    path, header = folder / "table.jsonl", header_of(space, precision, cache_buckets)
    lines = [json.dumps(artefact.add_envelope(KIND, header, SCHEMA_VERSION))]
    lines += [
        add_checksum(m.to_line())
        for m in entries(
            space, projection_ms=projection_ms, energy=energy, cold=step_time is not None, slowness=slowness
        )
    ]
    if step_time is not None:
        lines.append(add_checksum({"what": "faces", "decode": step_time.to_dict()}))
    lines.append(add_checksum({"what": "validation", "decode": decode or {}, "prefill": {}}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return load_table(path)


def write_piecewise_table(
    folder: Path,
    space: Space,
    precision: str = "fp32",
    seed: int = 0,
    *,
    projection_ms: float = 0.01,
    energy: bool = False,
    cache_buckets: int | None = None,
) -> LatencyTable:
    """The same, with a decode step that is piecewise linear.

    The pieces of colder caches are steeper. They cross at architectures within `space`.
    """
    rng = random.Random(seed)
    lines = list(entries(space, projection_ms=projection_ms, energy=energy, cold=True))
    table = LatencyTable(folder / "unwritten", header_of(space, precision, cache_buckets), lines, {}, "")

    def cost(piece: Piece, a: Architecture) -> float:
        return table.with_step_time(single(piece)).model_cost(a, Step("decode", 64))

    def through(piece: Piece, value: Piece, a: Architecture) -> Piece:
        return piece._replace(offset_ms=rounded(cost(value, a) - cost(piece, a)))

    steep = through(Piece(2.5, rounded(0.001), 0.0), WARM, space.architecture(space.sample(rng)))
    cold = through(COLD, steep, space.architecture(space.sample(rng)))
    step_time = StepTimeModel((WARM, steep, cold), rng.choice(ALTERNATIVES))
    return write_formula_table(
        folder,
        space,
        precision,
        projection_ms=projection_ms,
        energy=energy,
        step_time=step_time,
        cache_buckets=cache_buckets,
    )


@pytest.fixture(scope="session")
def write_table(tmp_path_factory: pytest.TempPathFactory) -> WriteTable:
    """A function that writes and loads a table that covers a space."""
    return lambda *arguments, **options: write_formula_table(
        tmp_path_factory.mktemp("latencies"), *arguments, **options
    )


@pytest.fixture(scope="session")
def write_piecewise(tmp_path_factory: pytest.TempPathFactory) -> WriteTable:
    """The same, with a decode step that is piecewise linear."""
    return lambda *arguments, **options: write_piecewise_table(
        tmp_path_factory.mktemp("latencies"), *arguments, **options
    )


def whole_cost(key: str, a: Architecture, table: LatencyTable | None, bytes_per_token: float | None) -> float:
    """A metric of a whole architecture by its definition, from counts and from the table's sums over whole models."""
    name, _, at = key.partition("@")
    if name == "parameters":
        return a.parameters
    if name == "flops":
        return a.flops()
    if name == "kv_mb":
        return a.kv_bytes(int(at) if at else None) / 1e6
    if name == "weight_mb":
        return a.weight_bytes(at) / 1e6
    if name == "peak_mb":
        return counts.peak_bytes(a, "int8", int(at)) / 1e6
    assert table is not None
    if name == "first_token_ms":
        assert bytes_per_token is not None
        return table.model_cost(a, Step("prefill", -(-int(at) // bytes_per_token).__trunc__()))
    step = Step("prefill" if name == "prefill_ms" else "decode", int(at), "mj" if name == "energy_mj" else "ms")
    cost = table.model_cost(a, step)
    if name == "text_ms":
        assert bytes_per_token is not None
        return cost * 100 / bytes_per_token
    return cost
