"""A table in pieces gives the logits of the whole table, and no piece is larger than the target takes."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helpers.random_model import random_model
from merino_edge.architecture import Architecture, Block
from merino_edge.export.graph import build_stored, to_bytes
from merino_edge.export.lowerings.table_pieces import row_ranges
from merino_edge.export.operators import find_unsupported
from merino_edge.export.quantization.stored_weights import random_stored, store
from merino_edge.export.targets import LARGEST_WEIGHT_BYTES, PLATFORMS, Target
from merino_edge.export.tensorrt import build_engine
from merino_edge.runtime.engines.onnx_engine import OnnxEngine
from merino_edge.tensorrt_library import RTX

A = Architecture(200, 64, 64, 32, (Block(64, 1, 2, 1, 96),), norm="rmsnorm", ffn="swiglu", bias="none")
MODELS = {"tied": A, "untied": replace(A, tied_head=False)}
MOST = 7000  # bytes: a float16 table of 200 x 64 has 25,600, an int8 one 12,800
FORMS = [("jetpack-6.2", p, "primitive") for p in ("fp32", "fp16", "int8", "int4")] + [("rtx", "fp16", "native")]


@given(st.integers(1, 999), st.integers(1, 9), st.integers(9, 3000))
def test_pieces_are_all_rows_in_order_and_as_few_as_fit(rows: int, row_bytes: int, most: int) -> None:
    ranges = row_ranges(rows, rows * row_bytes, most)
    assert [row for first, end in ranges for row in range(first, end)] == list(range(rows))
    assert len(ranges) <= math.ceil(rows * row_bytes / most)
    assert max(end - first for first, end in ranges) * row_bytes < most + row_bytes  # a row is never cut
    assert row_ranges(rows, rows * row_bytes, None) == [(0, rows)]


@pytest.mark.parametrize(("name", "precision", "lowering"), FORMS)
@pytest.mark.parametrize("a", MODELS.values(), ids=MODELS)
def test_logits_are_those_of_the_whole_table(a: Architecture, name: str, precision: str, lowering: str) -> None:
    whole = Target.named(name, precision, lowering)
    pieces = replace(whole, platform=replace(whole.platform, largest_weight_bytes=MOST))
    stored = store(a, random_model(a), whole)
    graphs = {target: to_bytes(build_stored(a, stored, target, 64)) for target in (whole, pieces)}
    tensors = {t.name: t for t in onnx.load_from_string(graphs[pieces]).graph.initializer}
    tables = [t for key, t in tensors.items() if "embedding.weight" in key or "head.weight" in key]
    assert len([t for t in tables if "scale" not in t.name]) >= 4
    assert max(onnx.numpy_helper.to_array(t).nbytes for t in tables) <= MOST
    full, cut = (OnnxEngine(graph, a, 64, 1) for graph in graphs.values())
    tokens = np.random.default_rng(0).permutation(200)[:60]
    rounding = 1e-6 if precision == "fp32" else 1e-3  # ONNX Runtime rounds the joined pieces to float16
    for start, end in ((0, 50), (50, 51), (51, 59)):
        rows = min(end - start, 8)
        expected, got = (engine.forward_rows(tokens[start:end], start, rows) for engine in (full, cut))
        np.testing.assert_allclose(got, expected, rtol=0, atol=rounding * np.abs(expected).max())
    assert find_unsupported(build_stored(a, stored, pieces, 64), (10, 3) if name != "rtx" else (10, 16)) == []


@pytest.mark.parametrize(("name", "precision", "lowering"), FORMS)
@pytest.mark.parametrize("a", MODELS.values(), ids=MODELS)
def test_it_compiles(a: Architecture, name: str, precision: str, lowering: str) -> None:
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    whole = Target.named(name, precision, lowering)
    target = replace(whole, platform=replace(whole.platform, largest_weight_bytes=MOST))
    graph = to_bytes(build_stored(a, store(a, random_model(a), target), target, 64))
    assert build_engine(RTX, graph, 64, "SM86").plan


@pytest.mark.parametrize("precision", ["fp16", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_the_compiler_does_not_join_the_pieces(tied: bool, precision: str) -> None:
    """It did, and stored a head of 150,000 words three times."""
    pytest.importorskip(RTX, reason="the extra [rtx] has no package for this machine")
    a = replace(A, vocab_size=40_000, embedding_width=128, tied_head=tied)
    table_bytes = 40_000 * 128 * 2
    plans = []
    for most in (None, table_bytes // 3):
        whole = Target.named("jetpack-6.2", precision)
        target = replace(whole, platform=replace(whole.platform, largest_weight_bytes=most))
        graph = to_bytes(build_stored(a, random_stored(a, target), target, 64))
        plans.append(len(build_engine(RTX, graph, 64, "SM86").plan))
    assert plans[1] < plans[0] + table_bytes // 4


def test_a_head_of_150_000_words_is_cut_where_boards_refuse_large_allocations() -> None:
    rows, width = 151_936, 896  # of Qwen2.5-0.5B
    ranges = row_ranges(rows, rows * width * 2, PLATFORMS["jetpack-6.2"].largest_weight_bytes)
    assert len(ranges) == 2 and (ranges[0][1] - ranges[0][0]) * width * 2 <= LARGEST_WEIGHT_BYTES
    assert all(p.largest_weight_bytes is None for name, p in PLATFORMS.items() if name != "jetpack-6.2")
