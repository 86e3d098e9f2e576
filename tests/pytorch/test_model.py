"""The PyTorch model: names and counts, cached == uncached, shared == unshared, causal, isometric projections."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.architectures import architectures, random_tokens
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import ArtefactError, InputError
from merino_edge.presets import PRESETS, preset
from merino_edge.pytorch.model import KVCache, Model
from merino_edge.weights import weight_shapes

FLOAT64_NOISE = 1e-10  # logits here are of order 1, float64 keeps 16 digits


def random_model(a: Architecture, seed: int = 0) -> Model:
    """A float64 model whose every weight matters: biases and norms are random too."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(a).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return model


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_built_as_counted(name: str) -> None:
    a = preset(name)
    with torch.device("meta"):
        model = Model(a)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == weight_shapes(a)
    assert sum(parameter.numel() for parameter in model.parameters()) == a.parameters


@settings(max_examples=40, deadline=None)
@given(architectures())
def test_any_architecture_is_built_as_counted(a: Architecture) -> None:
    model = Model(a)
    assert {key: tuple(value.shape) for key, value in model.state_dict().items()} == weight_shapes(a)
    assert sum(parameter.numel() for parameter in model.parameters()) == a.parameters


@settings(max_examples=30, deadline=None)
@given(architectures(), st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(1, 2))
def test_cached_equals_uncached_for_any_split(a: Architecture, lengths: list[int], batch: int) -> None:
    model, total = random_model(a), sum(lengths)
    tokens = random_tokens(a, batch, total)
    cache, start, parts = KVCache(a, batch, dtype=torch.float64), 0, []
    with torch.no_grad():
        expected = model(tokens)
        for length in lengths:
            parts.append(model(tokens[:, start : start + length], cache, start))
            start += length
        stepwise = [model(tokens[:, i : i + 1], cache, i) for i in range(total)]  # rewound: the same cache again
        last = model(tokens, last_only=True)
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, rtol=0, atol=FLOAT64_NOISE)
    torch.testing.assert_close(torch.cat(stepwise, dim=1), expected, rtol=0, atol=FLOAT64_NOISE)
    torch.testing.assert_close(last, expected[:, -1:], rtol=0, atol=FLOAT64_NOISE)


@settings(max_examples=15, deadline=None)
@given(architectures(), st.integers(1, 11))
def test_a_later_token_changes_nothing_before_it(a: Architecture, where: int) -> None:
    model, tokens = random_model(a), random_tokens(a, 1, 12)
    changed = tokens.clone()
    changed[0, where] = (changed[0, where] + 1) % a.vocab_size
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    torch.testing.assert_close(after[:, :where], before[:, :where], rtol=0, atol=FLOAT64_NOISE)
    assert (after[:, where] - before[:, where]).abs().max() > 1e-6


@settings(max_examples=15, deadline=None)
@given(architectures())
def test_shared_equals_unshared_with_equal_weights(a: Architecture) -> None:
    shared = dataclasses.replace(a, blocks=tuple(dataclasses.replace(b, shared=True) for b in a.blocks))
    unshared = dataclasses.replace(a, blocks=tuple(dataclasses.replace(b, shared=False) for b in a.blocks))
    model, copy = random_model(shared), Model(unshared).double()
    weights = model.state_dict()

    def source(name: str) -> str:  # blocks.B.layers.L.rest -> blocks.B.layers.0.rest
        parts = name.split(".")
        return ".".join([*parts[:3], "0", *parts[4:]]) if parts[2:3] == ["layers"] else name

    copy.load_state_dict({name: weights[source(name)] for name in copy.state_dict()})
    tokens = random_tokens(a, 2, 9)
    with torch.no_grad():
        torch.testing.assert_close(copy(tokens), model(tokens), rtol=0, atol=0)


def test_width_projections_keep_lengths() -> None:
    a = Architecture(64, 16, 24, 8, (Block(8, 1, 1, 1, 16), Block(32, 1, 4, 4, 16), Block(32, 1, 4, 4, 16)))
    weights = Model(a, seed=3).to_weights()
    projections = {name: weight for name, weight in weights.items() if "projection" in name}
    assert set(projections) == {"projection_in.weight", "blocks.1.projection.weight", "projection_out.weight"}
    for weight in projections.values():
        narrow = weight if weight.shape[0] <= weight.shape[1] else weight.T
        np.testing.assert_allclose(narrow @ narrow.T, np.eye(len(narrow)), atol=1e-6)


def test_initialisation_follows_the_seed() -> None:
    a = Architecture(64, 16, 16, 8, (Block(16, 2, 2, 2, 32),))
    first, again, other = (Model(a, seed).to_weights() for seed in (1, 1, 2))
    assert all(np.array_equal(first[name], again[name]) for name in first)
    assert not np.array_equal(first["embedding.weight"], other["embedding.weight"])


@settings(max_examples=10, deadline=None)
@given(architectures())
def test_weights_survive_a_round_trip(a: Architecture) -> None:
    model = Model(a, seed=5)
    copy = Model.from_weights(a, model.to_weights())
    tokens = random_tokens(a, 1, 8)
    with torch.no_grad():
        assert torch.equal(copy(tokens), model(tokens))


def test_a_copy_has_memory_of_its_own_and_a_model_that_is_only_run_has_none() -> None:
    a = Architecture(64, 16, 16, 8, (Block(16, 1, 2, 2, 32),))
    weights = Model(a).to_weights()
    copy, shared = (Model.from_weights(a, weights, copy=copied) for copied in (True, False))
    weights["embedding.weight"][:] = 7
    assert (shared.embedding.weight == 7).all()
    assert not (copy.embedding.weight == 7).any()


def test_what_does_not_fit_is_refused() -> None:
    a = Architecture(64, 16, 16, 8, (Block(16, 1, 2, 2, 32),))
    model = Model(a)
    with pytest.raises(InputError, match="17 tokens"):
        model(torch.zeros(1, 17, dtype=torch.int64))
    with pytest.raises(InputError, match="do not fit 4 positions"):
        model(torch.zeros(1, 3, dtype=torch.int64), KVCache(a, capacity=4), start=2)
    with pytest.raises(InputError):
        model(torch.zeros(1, 1, dtype=torch.int64), start=1)  # nothing to read what came before from
    weights = model.to_weights()
    with pytest.raises(ArtefactError, match=r"missing weight embedding\.weight"):
        Model.from_weights(a, {name: weight for name, weight in weights.items() if name != "embedding.weight"})
