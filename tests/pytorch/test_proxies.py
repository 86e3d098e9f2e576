"""Proxies: they equal NumPy from the definitions, with gradients by differences, and ignore what must not matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest
import torch

from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.pytorch import proxies
from merino_edge.pytorch.model import Model
from merino_edge.pytorch.proxies import PROXIES

TINY = Architecture(
    vocab_size=7,
    max_positions=6,
    embedding_width=4,
    head_dim=3,
    blocks=(Block(3, 1, 1, 1, 5), Block(6, 1, 2, 2, 4)),
    tied_head=False,
)
SMALL = Architecture(vocab_size=40, max_positions=32, embedding_width=16, head_dim=8, blocks=(Block(16, 2, 2, 2, 32),))
TOKENS = torch.tensor([[1, 5, 2, 0, 6], [3, 3, 4, 1, 2]])  # [B, T]
LONG = torch.randint(0, 40, (8, 32), generator=torch.Generator().manual_seed(0))
Weights = dict[str, np.ndarray]


def tiny_weights(seed: int = 0) -> Weights:
    """Large random weights, biases and norms included, so that everything matters."""
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.5, value.shape) for name, value in Model(TINY).to_weights().items()}


def tiny_model(weights: Weights) -> Model:
    model = Model(TINY).double()
    model.load_state_dict({name: torch.tensor(value) for name, value in weights.items()})
    return model


# --- the tiny model in NumPy -----------------------------------------------------------------------


def normed(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    deviation = x - x.mean(-1, keepdims=True)
    return deviation / np.sqrt((deviation**2).mean(-1, keepdims=True) + 1e-5) * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(w: Weights, name: str, x: np.ndarray) -> np.ndarray:
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def logits(w: Weights, embedded: np.ndarray, hidden: list[np.ndarray] | None = None) -> np.ndarray:
    """Logits [T, V] from embeddings [T, E] of one sequence. `hidden` gets each FFN's [T, F] before the nonlinearity."""
    length = len(embedded)
    x = linear(w, "projection_in", embedded) + w["positions.weight"][:length]
    for index, block in enumerate(TINY.blocks):
        if index:
            x = linear(w, f"blocks.{index}.projection", x)
        layer = f"blocks.{index}.layers.0"
        y = normed(w, f"{layer}.attention_norm", x)
        q, k, v = (linear(w, f"{layer}.attention.{name}", y) for name in ("query", "key", "value"))
        heads = []
        for h in range(block.heads):
            part = slice(h * TINY.head_dim, (h + 1) * TINY.head_dim)
            score = np.where(np.tri(length) > 0, q[:, part] @ k[:, part].T / np.sqrt(TINY.head_dim), -np.inf)
            share = np.exp(score - score.max(-1, keepdims=True))
            heads.append(share / share.sum(-1, keepdims=True) @ v[:, part])
        x = x + linear(w, f"{layer}.attention.output", np.concatenate(heads, axis=1))
        up = linear(w, f"{layer}.ffn.up", normed(w, f"{layer}.ffn_norm", x))
        if hidden is not None:
            hidden.append(up)
        x = x + linear(w, f"{layer}.ffn.down", np.maximum(up, 0))
    return linear(w, "head", linear(w, "projection_out", normed(w, "final_norm", x)))


def ones(w: Weights) -> float:
    """The sum of outputs for an input of all ones."""
    length = TOKENS.shape[1]
    return float(logits(w, np.tile(w["embedding.weight"].sum(0), (length, 1))).sum())


def cross_entropy(w: Weights) -> float:
    losses = []
    for sequence in TOKENS.numpy():
        out = logits(w, w["embedding.weight"][sequence[:-1]])
        out = out - out.max(-1, keepdims=True)
        losses += list(np.log(np.exp(out).sum(-1)) - out[np.arange(len(out)), sequence[1:]])
    return float(np.mean(losses))


def gradients(w: Weights, function: Callable[[Weights], float], step: float = 1e-6) -> Weights:
    """The gradient of every matrix of the decoder, by central differences."""
    found = {}
    for name, value in w.items():
        if name.startswith("blocks.") and value.ndim == 2:
            found[name] = np.zeros_like(value)
            for place in np.ndindex(value.shape):
                high, low = ({**w, name: value.copy()} for _ in range(2))
                high[name][place] += step
                low[name][place] -= step
                found[name][place] = (function(high) - function(low)) / (2 * step)
    return found


def nuclear(value: np.ndarray) -> float:
    return float(np.linalg.svd(value, compute_uv=False).sum())


# --- against NumPy ---------------------------------------------------------------------------------


def test_numpy_computes_the_same_model() -> None:
    w = tiny_weights()
    expected = tiny_model(w)(TOKENS).detach().numpy()
    for row, sequence in enumerate(TOKENS.numpy()):
        np.testing.assert_allclose(logits(w, w["embedding.weight"][sequence]), expected[row], atol=1e-10)


def test_saliencies_are_their_definitions() -> None:
    w = tiny_weights()
    model = tiny_model(w)
    positive = {name: np.abs(value) for name, value in w.items()}
    g = gradients(positive, ones)
    saliency = {name: float(np.abs(g[name] * positive[name]).sum()) for name in g}
    assert len(g) == 13  # six of each layer, and the projection between the blocks
    assert proxies.synflow(model, TOKENS) == pytest.approx(sum(saliency.values()), rel=1e-6)
    diversity = sum(nuclear(g[name]) * nuclear(positive[name]) for name in g if ".attention." in name)
    expected = diversity + sum(value for name, value in saliency.items() if ".ffn." in name)
    assert proxies.dss(model, TOKENS) == pytest.approx(expected, rel=1e-6)
    of_loss = gradients(w, cross_entropy)
    expected = sum(np.abs(of_loss[name] * w[name]).sum() for name in of_loss)
    assert proxies.snip(model, TOKENS) == pytest.approx(expected, rel=1e-6)


def test_zerolm_is_half_the_nuclear_norms_of_attention_and_ffn() -> None:
    w = tiny_weights()
    expected = 0.5 * sum(nuclear(value) for name, value in w.items() if ".layers." in name and value.ndim == 2)
    assert proxies.zerolm(tiny_model(w), TOKENS) == pytest.approx(expected, rel=1e-9)


def test_pca_counts_the_components_of_hidden_activations() -> None:
    w, hidden = tiny_weights(), [[], []]
    for sequence in TOKENS.numpy():
        found: list[np.ndarray] = []
        logits(w, w["embedding.weight"][sequence], found)
        for layer, values in zip(hidden, found, strict=True):
            layer.append(values)
    expected = 0
    for layer in hidden:
        eigenvalues = np.sort(np.linalg.eigvalsh(np.cov(np.concatenate(layer), rowvar=False)))[::-1]
        expected += next(k for k in range(1, len(eigenvalues) + 1) if eigenvalues[:k].sum() >= 0.99 * eigenvalues.sum())
    model = tiny_model(w)
    assert proxies.pca(model, TOKENS) == expected
    assert proxies.w_pca(model, TOKENS) == expected * TINY.parameters


def test_components_of_known_variances() -> None:
    sines = torch.linalg.qr(torch.randn(64, 5, generator=torch.Generator().manual_seed(1)).double())[0]
    sines = torch.linalg.qr(sines - sines.mean(0))[0]  # orthonormal and centred
    values = sines * torch.tensor([10.0, 5, 2, 1, 0]).double() + 3
    shares = np.cumsum([100, 25, 4, 1]) / 130
    for k, share in enumerate(shares, start=1):
        assert proxies.components(values, share - 1e-6) == k
    assert proxies.components(torch.ones(9, 4)) == 0
    rotation = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(2)).double())[0]
    assert proxies.components(values @ rotation) == proxies.components(values)
    assert proxies.components(torch.randn(6, 50, generator=torch.Generator().manual_seed(3)), 1 - 1e-9) == 5


# --- what must not matter, and what must -----------------------------------------------------------

FAMILIES = {
    "OPT-like": SMALL,
    "Llama-like": dataclasses.replace(
        SMALL, norm="rmsnorm", positions="rotary", rotary_dim=8, bias="none", ffn="swiglu", tied_head=False
    ),
    "grouped, shared, widths": dataclasses.replace(
        SMALL, blocks=(Block(8, 1, 1, 1, 16), Block(16, 3, 2, 1, 32, shared=True)), norm_placement="post"
    ),
}


@pytest.mark.parametrize("name", PROXIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_proxy_is_positive_deterministic_and_leaves_no_trace(name: str, family: str) -> None:
    a, proxy = FAMILIES[family], PROXIES[name]
    model = Model(a, 3).requires_grad_(requires_grad=False)
    before = model.to_weights()
    value = proxy(model, LONG)
    assert 0 < value < float("inf")
    assert proxy(model, LONG) == value == proxy(Model(a, 3), LONG)
    assert all((before[key] == after).all() for key, after in model.to_weights().items())
    for parameter in model.parameters():
        assert parameter.grad is None and not parameter.requires_grad
    assert not any(module._forward_hooks for module in model.modules())


@pytest.mark.parametrize("name", ["DSS", "SynFlow", "ZeroLM-style"])
def test_proxies_without_data_see_no_tokens(name: str) -> None:
    model = Model(SMALL)
    assert PROXIES[name](model, LONG) == PROXIES[name](model, LONG.flip(0).roll(5, 1))


@pytest.mark.parametrize("name", ["SNIP", "PCA", "W-PCA"])
def test_the_order_of_sequences_does_not_matter(name: str) -> None:
    model = Model(SMALL).double()
    assert PROXIES[name](model, LONG) == pytest.approx(PROXIES[name](model, LONG.flip(0)), rel=1e-12)


@pytest.mark.parametrize("name", ["ZeroLM-style", "PCA", "W-PCA"])
def test_deeper_and_wider_score_more_where_the_definition_says_so(name: str) -> None:
    """These proxies sum quantities that grow with width. Gradients need not grow with it."""
    proxy, head_dim = PROXIES[name], SMALL.head_dim
    for sizes in (((2, 1), (2, 2), (2, 4)), ((1, 2), (2, 2), (4, 2))):  # (heads, layers)
        values = []
        for heads, layers in sizes:
            block = Block(heads * head_dim, layers, heads, heads, 2 * heads * head_dim)
            values.append(proxy(Model(dataclasses.replace(SMALL, blocks=(block,))), LONG))
        assert values == sorted(values) and values[0] < values[-1]


def test_scores_are_means_over_seeds() -> None:
    each = [proxies.scores(SMALL, LONG, (seed,)) for seed in (0, 1)]
    both = proxies.scores(SMALL, LONG, (0, 1))
    assert list(both) == list(PROXIES)
    for name, value in both.items():
        assert value == pytest.approx((each[0][name] + each[1][name]) / 2)


@pytest.mark.parametrize("shape", [(4,), (2, 1), (0, 5)])
def test_tokens_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InputError, match="minibatch"):
        proxies.snip(Model(SMALL), torch.zeros(shape, dtype=torch.long))
