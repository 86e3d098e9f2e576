"""A latency table from a formula that is linear in every axis between grid points, so that interpolation is exact."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from merino_edge import artefact
from merino_edge.architecture import Architecture, Block
from merino_edge.latency.measurement import MODES, Measurement, What, add_checksum
from merino_edge.latency.table import family
from merino_edge.latency.table_file import KIND, SCHEMA_VERSION

WIDTHS, RATIOS, LENGTHS = (32, 64, 128), (1, 4), (16, 64)
MODEL = Architecture(
    vocab_size=100,
    max_positions=64,
    embedding_width=64,
    head_dim=32,
    blocks=(Block(32, 2, 1, 1, 64), Block(128, 3, 4, 4, 512)),
)


def share(shape: dict[str, int]) -> float:
    """How far the key-value heads go from one to all."""
    return (shape["kv_heads"] - 1) / (shape["heads"] - 1) if shape["heads"] > 1 else 1.0


def cost_ms(what: str, mode: str, length: int, shape: dict[str, int]) -> float:
    """Linear in every axis between grid points, so that interpolation must hit it everywhere."""
    size = {
        "layer": lambda s: s["width"] ** 2 * (1 + s["ffn_width"] / s["width"]) * (1 + share(s) / 4),
        "repeat": lambda s: 0.5 * s["width"] ** 2 * (1 + s["ffn_width"] / s["width"]) * (1 + share(s) / 4),
        "width_change": lambda s: s["before"] * s["after"],
        "end": lambda s: 7 * s["vocab_size"] * s["embedding_width"],
    }[what](shape)
    if mode == "decode" and what in ("width_change", "end"):
        return 1e-4 * size  # no length matters there
    return 1e-4 * size * (1 + length / 100) * (1 if mode == "decode" else 10)


def measurements() -> Iterator[Measurement]:
    def entries(what: What, **shape: Any) -> Iterator[Measurement]:
        for length in LENGTHS:
            for mode in MODES:
                cost = cost_ms(what, mode, length, shape)
                yield Measurement(what, mode, length, shape, (cost,), 3 * cost)

    for width in WIDTHS:
        for ratio in RATIOS:
            for kv_heads in sorted({1, width // 32}):
                heads = {"heads": width // 32, "kv_heads": kv_heads}
                yield from entries("layer", ffn="relu", width=width, ffn_width=width * ratio, **heads)
                yield from entries("repeat", ffn="relu", width=width, ffn_width=width * ratio, **heads)
    yield from entries("width_change", before=32, after=64)
    yield from entries("width_change", before=96, after=128)
    yield from entries("end", vocab_size=100, embedding_width=64)


def table_text(lines: list[Measurement] | None = None, *, finished: bool = True, **header: object) -> str:
    fields = {"family": family(MODEL), "precision": "fp32", "default_length": 64, "estimated": True, **header}
    written = [json.dumps(artefact.add_envelope(KIND, fields, SCHEMA_VERSION))]
    written += [add_checksum(m.to_line()) for m in (list(measurements()) if lines is None else lines)]
    if finished:
        written.append(
            add_checksum({"what": "validation", "decode": {"mape_percent": 1.5}, "prefill": {"mape_percent": 2.5}})
        )
    return "\n".join(written) + "\n"
