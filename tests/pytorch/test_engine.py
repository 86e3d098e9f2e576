"""The PyTorch engine: it conforms, cached == uncached, and it equals the exported graph's engine."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import engine_conformance as conformance
from helpers.architectures import architectures, random_tokens
from helpers.engine_conformance import EngineConformance, NewEngine
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import UnsupportedError
from merino_edge.export.graph import build_model, to_bytes
from merino_edge.pytorch.engine import TorchEngine
from merino_edge.pytorch.model import Model
from merino_edge.runtime.engines.onnx_engine import OnnxEngine

A = Architecture(60, 48, 64, 32, (Block(64, 2, 2, 1, 96, shared=True), Block(96, 1, 3, 3, 64)))


def lively(a: Architecture, seed: int = 0) -> Model:
    """A float32 model whose logits are of order 1."""
    model, generator = Model(a, seed), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


class TestPyTorch(EngineConformance):
    @pytest.fixture
    def tolerance(self) -> float:
        return 1e-5

    @pytest.fixture
    def new_engine(self) -> NewEngine:
        return lambda: TorchEngine(Model.from_weights(conformance.ARCHITECTURE, conformance.WEIGHTS))


@settings(max_examples=25, deadline=None)
@given(architectures(), st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_cached_equals_uncached(a: Architecture, lengths: list[int]) -> None:
    model, total = lively(a), sum(lengths)
    tokens = random_tokens(a, 1, total)
    with torch.no_grad():
        expected = model(tokens)[0].numpy()  # [T, V]
    scale = max(1.0, float(np.abs(expected).max()))
    with contextlib.closing(TorchEngine(model)) as engine:
        start = 0
        for length in lengths:
            logits = engine.forward(tokens[0, start : start + length].numpy(), start)
            start += length
            np.testing.assert_allclose(logits, expected[start - 1], rtol=0, atol=1e-5 * scale)
        again = engine.forward(tokens[0, total - 1 :].numpy(), total - 1)  # a rewind by one
        np.testing.assert_allclose(again, expected[-1], rtol=0, atol=1e-5 * scale)


def test_it_computes_what_the_exported_graph_computes() -> None:
    model = lively(A, seed=4)
    tokens = random_tokens(A, 1, 20)[0].numpy()
    graph = to_bytes(build_model(A, model.to_weights(), "fp32", A.max_positions))
    other = OnnxEngine(graph, A, A.max_positions, 1)
    with contextlib.closing(other), contextlib.closing(TorchEngine(model)) as engine:
        for start, end in ((0, 12), (12, 13), (13, 20), (5, 6)):
            mine, theirs = engine.forward(tokens[start:end], start), other.forward(tokens[start:end], start)
            np.testing.assert_allclose(mine, theirs, rtol=0, atol=1e-5 * np.abs(theirs).max())


def test_half_precision_is_half_throughout_and_close() -> None:
    model = lively(A)
    tokens = random_tokens(A, 1, 9)[0].numpy()
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)[None])[0, -1].numpy()
    with contextlib.closing(TorchEngine(model, "fp16")) as engine:
        logits = engine.forward(tokens, 0)
        assert {p.dtype for p in model.parameters()} == {torch.float16}
    difference = np.abs(logits - expected).max() / np.abs(expected).max()
    assert 1e-6 < difference < 0.02


def test_threads_are_those_asked_for() -> None:
    before = torch.get_num_threads()
    try:
        for threads in (2, 1):
            TorchEngine(Model(A), threads=threads).close()
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)


def test_a_precision_it_lacks_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="no int4"):
        TorchEngine(Model(A), "int4")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_cuda_is_refused() -> None:
    with pytest.raises(UnsupportedError, match="finds no CUDA GPU"):
        TorchEngine(Model(A), device="cuda")
