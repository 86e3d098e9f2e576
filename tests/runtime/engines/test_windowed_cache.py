"""Layers with a window keep only that much of their cache, and what is computed stays the same."""

from __future__ import annotations

import math
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from helpers.random_model import random_model
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError, UnsupportedError
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.export.targets import LOWERINGS
from merino_edge.pytorch.model import Model
from merino_edge.runtime import prompt_cache
from merino_edge.runtime.engines import released_windows
from merino_edge.runtime.engines.cache_memory import PAGE, CacheMemory
from merino_edge.runtime.engines.onnx_engine import SLACK, OnnxEngine
from merino_edge.runtime.engines.released_windows import RELEASED_AT_ONCE
from merino_edge.runtime.session import Session

WINDOW, CONTEXT = 20, 600
A = Architecture(
    96, CONTEXT, 64, 64, (Block(64, 2, 2, 1, 64, window=WINDOW, rotary="local"), Block(64, 1, 2, 2, 64)),
    norm="rmsnorm", ffn="geglu_tanh", positions="rotary", rotary_dim=64, local_rotary_base=100.0, bias="none",
    norm_placement="both", qk_norm="head",
)  # fmt: skip
WEIGHTS = random_model(A)
TOKENS = np.random.default_rng(0).integers(0, A.vocab_size, CONTEXT)


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_released_pages_read_as_zeros_and_give_their_memory_back() -> None:
    memory = CacheMemory((1, 2, 40 * PAGE, 4), np.float32)
    memory.array[:] = 1.0
    before = _resident_bytes()
    memory.release(0, 30 * PAGE)
    assert before - _resident_bytes() > 0.9 * 2 * 30 * PAGE * 16
    assert not memory.array[:, :, : 30 * PAGE].any() and memory.array[:, :, 30 * PAGE :].all()
    memory.release(31 * PAGE, 31 * PAGE + 1)  # no whole page
    assert memory.array[:, :, 30 * PAGE :].all()


@pytest.mark.parametrize("lowering", LOWERINGS)
def test_a_long_sequence_is_computed_as_without_a_cache(lowering: str) -> None:
    engine = OnnxEngine(to_bytes(build_model(A, WEIGHTS, "fp32", CONTEXT, lowering=lowering)), A, CONTEXT, threads=1)
    with torch.no_grad():
        expected = Model.from_weights(A, WEIGHTS)(torch.from_numpy(TOKENS)[None])[0].numpy()
    start = 0
    for length in (150, 1, 200, 8, 1, 40, 100, 99, 1):
        got = engine.forward(TOKENS[start : start + length], start)
        start += length
        np.testing.assert_allclose(got, expected[start - 1], atol=1e-4 * np.abs(expected).max())
    assert engine.least_start > CONTEXT - WINDOW - SLACK - RELEASED_AT_ONCE
    for back in (1, 8, SLACK):  # draft tokens that were refused
        rows = engine.forward_rows(TOKENS[CONTEXT - back :], CONTEXT - back, back)
        np.testing.assert_allclose(rows, expected[CONTEXT - back :], atol=1e-4 * np.abs(expected).max())
    with pytest.raises(InputError, match="start at 0"):
        engine.forward(TOKENS[300:301], 300)


def test_a_session_starts_again_where_the_windows_have_left() -> None:
    engine = OnnxEngine(to_bytes(build_model(A, WEIGHTS, "fp32", CONTEXT)), A, CONTEXT, threads=1)
    session = Session(engine)
    session.prefill(TOKENS[:500].tolist())
    assert prompt_cache.is_held(session, 500) and not prompt_cache.is_held(session, 300)  # after an answer of 200
    other = [*TOKENS[:100].tolist(), 5, 6, 7]
    with torch.no_grad():
        expected = Model.from_weights(A, WEIGHTS)(torch.tensor([other]))[0, -1].numpy()
    np.testing.assert_allclose(session.prefill(other), expected, atol=1e-4 * np.abs(expected).max())  # type: ignore[arg-type]
    kept = engine.read_cache(len(other))  # as a prompt cache file
    fresh = OnnxEngine(to_bytes(build_model(A, WEIGHTS, "fp32", CONTEXT)), A, CONTEXT, threads=1)
    fresh.write_cache(kept)
    assert fresh.least_start == len(other) - 2  # further back, a file may hold released pages
    again = fresh.forward(np.array(other[-1:]), len(other) - 1)
    np.testing.assert_allclose(again, expected, atol=1e-4 * np.abs(expected).max())


def test_after_a_long_answer_a_session_goes_on_at_the_end_of_the_prompt() -> None:
    graph = to_bytes(build_model(A, WEIGHTS, "fp32", CONTEXT))
    session, fresh = (Session(OnnxEngine(graph, A, CONTEXT, threads=1)) for _ in "12")
    session.prefill(TOKENS[:200].tolist())
    for token in TOKENS[200:500].tolist():
        session.step(token)
    longer = TOKENS[:510].tolist()
    assert session.first_to_run(longer) == 200
    np.testing.assert_array_equal(session.prefill(longer), np.copy(fresh.prefill(longer)))  # type: ignore[arg-type]
    np.testing.assert_array_equal(session.step(7), fresh.step(7))


def test_an_answer_of_any_length_gives_memory_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(released_windows, "MOST_KEPT", 100)
    engine = OnnxEngine(to_bytes(build_model(A, WEIGHTS, "fp32", CONTEXT)), A, CONTEXT, threads=1)
    session = Session(engine)
    session.prefill(TOKENS[:100].tolist())
    for token in TOKENS[100:590].tolist():
        session.step(token)
    assert engine.least_start > 590 - SLACK - RELEASED_AT_ONCE - 1


def test_where_memory_is_short_the_sequence_so_far_stays() -> None:
    """The second of a larger bucket's caches finds no room."""
    room = [math.inf]  # caches that still find room

    def limited(*of: Any) -> CacheMemory:
        room[0] -= 1
        if room[0] == 0:
            raise MemoryError
        return CacheMemory(*of)

    graph = to_bytes(build_model(A, WEIGHTS, "fp32", CONTEXT, lowering="native"))
    engine = OnnxEngine(graph, A, CONTEXT, threads=1, memory=limited)
    engine.forward(TOKENS[:250], 0)
    wanted = engine.forward(TOKENS[250:251], 250).copy()
    room[0] = 2
    with pytest.raises(UnsupportedError, match="no memory for a cache of 512"):
        engine.forward(TOKENS[251:260], 251)
    np.testing.assert_array_equal(engine.forward(TOKENS[250:251], 250), wanted)
    engine.forward(TOKENS[251:260], 251)  # now there is
    assert engine.capacity == 512


def test_without_windows_every_position_stays() -> None:
    a = replace(A, blocks=tuple(replace(block, window=0) for block in A.blocks))
    engine = OnnxEngine(to_bytes(build_model(a, WEIGHTS, "fp32", CONTEXT)), a, CONTEXT, threads=1)
    engine.forward(TOKENS, 0)
    assert engine.least_start == 0


def test_memory_of_six_layers_of_gemma_3_1b_at_8192_positions() -> None:
    """A layer without a window to five with one of 512: within 10 % of what these need."""
    block = Block(64, 5, 4, 1, 32, window=512, rotary="local")
    a = replace(A, head_dim=256, rotary_dim=256, max_positions=8192, blocks=(block, Block(64, 1, 4, 1, 32)))
    engine = OnnxEngine(to_bytes(build_model(a, random_model(a), "fp32", 8192)), a, 8192, threads=1)
    engine.forward(TOKENS[:1], 0)
    before = _resident_bytes()
    engine.mark_filled(8191)  # which writes every position of every layer
    filled = _resident_bytes() - before
    engine.forward(TOKENS[:1], 8191)
    position_bytes = 2 * 256 * 4  # key and value, float32
    assert filled > 0.9 * 6 * 8191 * position_bytes
    assert _resident_bytes() - before < 1.1 * (5 * 512 + 8192) * position_bytes
