"""A latency table for the tests of the search: a real file with figures from a formula, so marked estimated."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable

import pytest

from merino_edge import artefact, counts
from merino_edge.latency_table import KIND, MODES, LatencyTable, Measurement, family, seal
from merino_edge.search.space import Space

LENGTH = 64
BYTES_PER_MS = {"decode": 1e6, "prefill": 1e5}
WriteTable = Callable[..., LatencyTable]


@pytest.fixture(scope="session")
def write_table(tmp_path_factory: pytest.TempPathFactory) -> WriteTable:
    """Write and load a table covering `space`: time is bytes over bandwidth, plus `change_ms` per width change."""

    def write(space: Space, precision: str = "fp32", change_ms: float = 0.01) -> LatencyTable:
        path = tmp_path_factory.mktemp("latencies") / "table.jsonl"
        model = space.model
        header = {"family": family(model), "precision": precision, "default_length": LENGTH, "estimated": True}
        lines = [json.dumps(artefact.stamp(KIND, header))]
        products = {x * y for x, y in itertools.combinations({*space.widths, model.embedding_width}, 2)}
        for mode in MODES:
            bandwidth = BYTES_PER_MS[mode]

            def add(what: str, cost: float, **shape: int) -> None:
                lines.append(seal(Measurement(what, mode, LENGTH, shape, (cost,)).to_line()))  # type: ignore[arg-type]  # noqa: B023

            for block in {gene.ffn_width / gene.width * 1e6 + gene.width: gene for gene in space.genes}.values():
                shape = {"width": block.width, "heads": block.heads, "kv_heads": block.kv_heads}
                cost = 0.02 + counts.layer_matrix_parameters(model, block) / bandwidth
                add("layer", cost, ffn_width=block.ffn_width, **shape)
                add("repeat", 0.7 * cost, ffn_width=block.ffn_width, **shape)
            for product in products:
                add("width_change", change_ms + product / bandwidth, before=1, after=product)
            add("end", 0.1, vocab_size=model.vocab_size, embedding_width=model.embedding_width)
        lines.append(seal({"what": "validation", "decode": {}, "prefill": {}}))
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return LatencyTable.load(path)

    return write
