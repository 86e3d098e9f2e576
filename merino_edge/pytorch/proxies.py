"""Training-free scores of a randomly initialised `Model` that need its weights: `PROXIES`, by name.

Each takes a model and tokens [B, T] int64 and gives a number, larger meant to be better; the same model and tokens give
the same number. They are published proxies, restated for these decoders; every docstring names the source, what it
measures and where it departs. "Decoder" is what stands between the first block's first matrix and the last block's
last: the layers and the projections between blocks, without embeddings, positions, head and the outer projections.
Only matrices count, no norms and no biases. A shared layer's weights count once, with the gradient of all its uses.

How they compare with trained models is `merino_edge.search.study.scores`'s business; this module trains nothing.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.pytorch.model import Model

Proxy = Callable[[Model, Tensor], float]

PCA_SHARE = 0.99  # of the variance that the components hold (eta of W-PCA)
ATTENTION_SHARE = 0.5  # of ZeroLM's sum; its alpha


def scores(architecture: Architecture, tokens: Tensor, seeds: Sequence[int] = (0,)) -> dict[str, float]:
    """Every proxy of `architecture`, the mean over initialisations by `seeds`."""
    found: dict[str, list[float]] = {name: [] for name in PROXIES}
    for seed in seeds:
        model = Model(architecture, seed)
        for name, proxy in PROXIES.items():
            found[name].append(proxy(model, tokens))
    return {name: math.fsum(values) / len(values) for name, values in found.items()}


# --- what they share -------------------------------------------------------------------------------


def _decoder_weights(model: Model) -> dict[str, Tensor]:
    """The decoder's matrices by name, those between blocks included."""
    return {name: linear.weight for name, linear in model.linears().items() if name.startswith("blocks.")}


def _is_attention(name: str) -> bool:
    return ".attention." in name


def _is_ffn(name: str) -> bool:
    return ".ffn." in name


def _checked(tokens: Tensor) -> None:
    if tokens.ndim != 2 or min(tokens.shape) < 1 or tokens.shape[1] < 2:
        raise InputError(f"tokens of shape {list(tokens.shape)} make no minibatch", "give [B, T] with T of at least 2")


def _gradients(model: Model, loss: Callable[[Model], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each decoder matrix and the loss's gradient by it; the model keeps no trace."""
    weights = _decoder_weights(model)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(model), list(weights.values()))
    return {name: (weight.detach(), g) for (name, weight), g in zip(weights.items(), gradients, strict=True)}


def _linearised(model: Model, length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Decoder matrices and gradients of the sum of outputs for an input of all ones, every parameter replaced by its
    magnitude (as SynFlow does, so that nothing cancels); float64, since magnitudes grow with every layer.

    A vision model's input of ones enters its first matrix; here that is the table of embeddings, so a position's input
    is the sum of all of them. One sequence of `length` positions.
    """
    positive = copy.deepcopy(model).double().requires_grad_()
    with torch.no_grad():
        for parameter in positive.parameters():
            parameter.abs_()

    def ones(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return positive.embedding.weight.sum(0).expand_as(output)

    positive.embedding.register_forward_hook(ones)
    tokens = torch.zeros(1, length, dtype=torch.long, device=positive.embedding.weight.device)
    return _gradients(positive, lambda m: m(tokens).sum())


def _saliency(pairs: dict[str, tuple[Tensor, Tensor]]) -> float:
    return math.fsum(float((weight * gradient).abs().sum()) for weight, gradient in pairs.values())


# --- proxies ---------------------------------------------------------------------------------------


def dss(model: Model, tokens: Tensor) -> float:
    """DSS-score: synaptic diversity of attention plus synaptic saliency of the FFN (Zhou et al., Training-free
    Transformer Architecture Search, CVPR 2022).

        sum over attention's W of |dL/dW|_nuclear |W|_nuclear  +  sum over the FFN's W of sum |dL/dW * W|

    L: the sum of outputs for an input of all ones, parameters by magnitude (`_linearised`; `tokens` give T alone).
    Of the source's Q, K, V as one matrix, here each is one: nuclear norms of [W, W] and [W, Wkv]. Departs: it was
    defined for vision encoders with a class token; the head and the first matrix, which its code also counts, do not
    count here. Where all positions have one input (rotary models) the values mixed are equal, so Q and K get no
    gradient and add nothing.
    """
    _checked(tokens)
    pairs = _linearised(model, tokens.shape[1])
    nuclear = torch.linalg.matrix_norm
    diversity = math.fsum(
        float(nuclear(gradient, "nuc") * nuclear(weight, "nuc"))
        for name, (weight, gradient) in pairs.items()
        if _is_attention(name)
    )
    return diversity + _saliency({name: pair for name, pair in pairs.items() if _is_ffn(name)})


def synflow(model: Model, tokens: Tensor) -> float:
    """SynFlow: sum |dR/dW * W| over the decoder, R the sum of outputs for an input of all ones with parameters by
    magnitude (Tanaka et al., NeurIPS 2020; as a proxy: Abdelfattah et al., ICLR 2021).

    `tokens` give T alone. Departs: norms stay, so gradients have both signs and magnitudes are summed (the source has
    networks without norms, or fixes them); embeddings and head do not count.
    """
    _checked(tokens)
    return _saliency(_linearised(model, tokens.shape[1]))


def snip(model: Model, tokens: Tensor) -> float:
    """SNIP: sum |dL/dW * W| over the decoder, L the mean next-token cross-entropy on `tokens`, in nats (Lee et al.,
    ICLR 2019; as a proxy: Abdelfattah et al., ICLR 2021).

    Departs: the source normalises by the sum to prune; a proxy needs the sum itself.
    """
    _checked(tokens)

    def loss(m: Model) -> Tensor:
        logits = m(tokens[:, :-1])  # [B, T-1, V]
        return F.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())

    was = [parameter.requires_grad for parameter in model.parameters()]
    try:
        return _saliency(_gradients(model.requires_grad_(), loss))
    finally:
        for parameter, needed in zip(model.parameters(), was, strict=True):
            parameter.requires_grad_(needed)


def zerolm(model: Model, tokens: Tensor) -> float:
    """ZeroLM-style capacity from weight statistics, attention and FFN apart (Chen et al., ZeroLM: Data-Free Transformer
    Architecture Search for Language Models, arXiv 2503.18646, 2025).

        alpha sum over attention's W of |W|_nuclear  +  (1 - alpha) sum over the FFN's W of |W|_nuclear

    The source states a capacity of each module from its weights' singular values, and a balance alpha between the two
    kinds of modules. Uncertain: which function of the singular values (their sum here), and alpha, which it finds from
    a sample of benchmarked models or from the correlation of the two parts; here it is 0.5, without fitting. The
    sizes of random weights enter: a branch's last matrix is drawn smaller the deeper the model. `tokens` are not used.
    """
    with torch.no_grad():
        norms = {
            name: float(torch.linalg.matrix_norm(weight.double(), "nuc"))
            for name, weight in _decoder_weights(model).items()
        }
    attention = math.fsum(norm for name, norm in norms.items() if _is_attention(name))
    ffn = math.fsum(norm for name, norm in norms.items() if _is_ffn(name))
    return ATTENTION_SHARE * attention + (1 - ATTENTION_SHARE) * ffn


def pca(model: Model, tokens: Tensor) -> float:
    """How many principal components hold `PCA_SHARE` of the variance of the FFN's hidden activations, summed over
    computed layers (Wang, W-PCA, ICLR 2025: its PCA part).

    Of each layer: H = up(x), before the nonlinearity, [B*T, F] over all positions of `tokens`, centred; the least k
    whose k largest eigenvalues of H's covariance sum to the share. At most min(width, F, B*T - 1), so give more
    positions than the widest layer has numbers. Departs: of a gated FFN, which the source has not, it is `up`, not the
    gate; eta is the source's 0.99 for every layer.
    """
    _checked(tokens)
    found: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        found.append(components(output.detach().flatten(0, 1)))

    ups = [linear for name, linear in model.linears().items() if name.endswith("ffn.up.weight")]
    hooks = [up.register_forward_hook(count) for up in ups]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return float(sum(found))


def w_pca(model: Model, tokens: Tensor) -> float:
    """W-PCA: `pca` times the number of parameters (Wang, W-PCA Based Gradient-Free Proxy for Efficient Search of
    Lightweight Language Models, ICLR 2025). Parameters are all that are stored, embeddings included, as in the source.
    """
    return pca(model, tokens) * model.architecture.parameters


def components(values: Tensor, share: float = PCA_SHARE) -> int:
    """How many principal components of `values` [N, D] hold `share` of the variance; 0 where nothing varies."""
    centred = values.double() - values.double().mean(0)
    tall = centred.shape[0] >= centred.shape[1]
    gram = centred.T @ centred if tall else centred @ centred.T  # the covariance's eigenvalues, times N - 1
    held = torch.linalg.eigvalsh(gram).clamp(min=0).flip(0).cumsum(0)
    return int((held < share * held[-1]).sum()) + 1 if held[-1] > 0 else 0


PROXIES: dict[str, Proxy] = {
    "DSS": dss,
    "SynFlow": synflow,
    "SNIP": snip,
    "ZeroLM-style": zerolm,
    "PCA": pca,
    "W-PCA": w_pca,
}
