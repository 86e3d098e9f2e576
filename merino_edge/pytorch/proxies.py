"""Zero-cost proxies: training-free scores of a randomly initialised `Model`, in `PROXIES` by name.

A proxy takes a model and tokens [B, T] int64 and gives a number; a larger one should mean a better model. The same
model and tokens give the same number. All are published proxies, restated for these decoders. Each docstring names the
source and what departs from it. "Decoder" means the layers and the projections between blocks, without embeddings,
positions, head and outer projections. Only matrices count, not norms or biases. Shared weights count once, with the
gradient of all their uses. `merino_edge.search.study.scores` compares proxies with trained models.
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
    """The mean of every proxy over initialisations of `architecture` by `seeds`."""
    by_proxy: dict[str, list[float]] = {name: [] for name in PROXIES}
    for seed in seeds:
        model = Model(architecture, seed)
        for name, proxy in PROXIES.items():
            by_proxy[name].append(proxy(model, tokens))
    return {name: math.fsum(values) / len(values) for name, values in by_proxy.items()}


# --- common parts ----------------------------------------------------------------------------------


def _decoder_weights(model: Model) -> dict[str, Tensor]:
    """The decoder's matrices by name, including those between blocks."""
    return {name: linear.weight for name, linear in model.linears().items() if name.startswith("blocks.")}


def _is_attention(name: str) -> bool:
    return ".attention." in name


def _is_ffn(name: str) -> bool:
    return ".ffn." in name


def _checked(tokens: Tensor) -> None:
    if tokens.ndim != 2 or min(tokens.shape) < 1 or tokens.shape[1] < 2:
        raise InputError(f"tokens of shape {list(tokens.shape)} make no minibatch", "give [B, T] with T of at least 2")


def _gradients(model: Model, loss: Callable[[Model], Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    """Each decoder matrix and the gradient of the loss. The model stays unchanged."""
    weights = _decoder_weights(model)
    with torch.enable_grad():
        gradients = torch.autograd.grad(loss(model), list(weights.values()))
    return {name: (weight.detach(), g) for (name, weight), g in zip(weights.items(), gradients, strict=True)}


def _linearised(model: Model, length: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Decoder matrices and gradients of the sum of outputs, as in SynFlow, for one sequence of `length` positions.

    Every parameter is replaced by its magnitude, so that nothing cancels. The input is all ones. In a vision model the
    ones enter the first matrix. That is the embedding table here, so a position's input is the sum of all embeddings.
    The computation is in float64, because magnitudes grow with every layer.
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
    """DSS-score: synaptic diversity of attention plus synaptic saliency of the FFN.

    Source: Zhou et al., Training-free Transformer Architecture Search, CVPR 2022.

        sum over attention's W of |dL/dW|_nuclear |W|_nuclear  +  sum over the FFN's W of sum |dL/dW * W|

    L is the sum of outputs for an input of all ones, with parameters by magnitude (`_linearised`). `tokens` give T.
    The source has Q, K and V as one matrix. Here each is a matrix of its own: nuclear norms of [W, W] and [W, Wkv].
    Departs: the source defines it for vision encoders with a class token. Its code also counts the head and the first
    matrix, which do not count here. In rotary models all positions have the same input, so attention mixes equal
    values. Then Q and K get no gradient and add nothing.
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
    """SynFlow: sum |dR/dW * W| over the decoder.

    R is the sum of outputs for an input of all ones, with parameters by magnitude. `tokens` give T. Sources: Tanaka
    et al., NeurIPS 2020; as a proxy, Abdelfattah et al., ICLR 2021. Departs: the source has networks without norms, or
    fixes them. Norms stay here, so gradients have both signs, and their magnitudes are summed. Embeddings and head do
    not count.
    """
    _checked(tokens)
    return _saliency(_linearised(model, tokens.shape[1]))


def snip(model: Model, tokens: Tensor) -> float:
    """SNIP: sum |dL/dW * W| over the decoder, where L is the mean next-token cross-entropy on `tokens` in nats.

    Sources: Lee et al., ICLR 2019; as a proxy, Abdelfattah et al., ICLR 2021. Departs: the source normalises by the sum
    in order to prune. A proxy needs the sum itself.
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
    """ZeroLM-style capacity from weight statistics, with attention and FFN apart.

    Source: Chen et al., ZeroLM: Data-Free Transformer Architecture Search for Language Models, arXiv 2503.18646, 2025.

        alpha sum over attention's W of |W|_nuclear  +  (1 - alpha) sum over the FFN's W of |W|_nuclear

    The source derives a capacity of each module from its weights' singular values, and a balance alpha between the two
    kinds of modules. Two points are uncertain. The first is the function of the singular values; here it is their sum.
    The second is alpha, which the source fits to benchmarked models or to the correlation of the two parts. Here it is
    0.5 without a fit. The scale of random weights matters: in deeper models a branch's last matrix is drawn smaller.
    `tokens` are not used.
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
    """The number of principal components that hold `PCA_SHARE` of the variance of the FFN's hidden activations.

    It is summed over computed layers. Source: the PCA part of Wang, W-PCA, ICLR 2025. In a layer H = up(x), before the
    nonlinearity, is [B*T, F] over all positions of `tokens`, centred. The result is the smallest k for which the k
    largest eigenvalues of H's covariance sum to the share. It is at most min(width, F, B*T - 1), so give more positions
    than the widest layer is wide. Departs: the source has no gated FFN, where `up` is used here and not the gate. Eta
    is the source's 0.99 for every layer.
    """
    _checked(tokens)
    counts: list[int] = []

    def count(module: torch.nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        counts.append(components(output.detach().flatten(0, 1)))

    ups = [linear for name, linear in model.linears().items() if name.endswith("ffn.up.weight")]
    hooks = [up.register_forward_hook(count) for up in ups]
    try:
        with torch.no_grad():
            model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return float(sum(counts))


def w_pca(model: Model, tokens: Tensor) -> float:
    """W-PCA: `pca` times the number of stored parameters, embeddings included, as in the source.

    Source: Wang, W-PCA Based Gradient-Free Proxy for Efficient Search of Lightweight Language Models, ICLR 2025.
    """
    return pca(model, tokens) * model.architecture.parameters


def components(values: Tensor, share: float = PCA_SHARE) -> int:
    """The number of principal components of `values` [N, D] that hold `share` of the variance; 0 where none varies."""
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
