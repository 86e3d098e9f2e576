"""How much each matrix's rounding costs, all of them from a few backward passes: nats of KL per position.

A matrix rounded by E changes what the model says at a position by KL ~ 1/2 (g . E x)^2, where x is the matrix's input
there and g the gradient of -log p(token) by its output, for a token drawn from the model itself (the Fisher
information, as in Optimal Brain Surgeon, Hassibi and Stork 1993; positions are taken for independent). So one forward
and backward pass tells it for every matrix and every way to round it, where measuring would take a pass for each.
It imports PyTorch, as parity does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix

DRAWS = 4  # of a token at every position, each a backward pass

Unit = tuple[str, ...]  # names of matrices that are written as one


def rounding_costs(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    forms: Mapping[Unit, Sequence[Mapping[str, QuantizedMatrix]]],
    tokens: np.ndarray,
    draws: int = DRAWS,
    seed: int = 0,
) -> dict[Unit, list[float]]:
    """For every unit, the KL [nats per position] that each of its `forms` (by name of the matrix) is expected to cost
    on `tokens` [T]."""
    import torch
    from torch import Tensor, nn

    from merino_edge.pytorch.model import Model

    model = Model.from_weights(a, weights).eval()
    linears = model.linears()
    watched = [name for unit in forms for name in unit]
    inputs: dict[str, list[Tensor]] = {name: [] for name in watched}  # of each application [T, K]
    gradients: dict[str, list[Tensor]] = {name: [] for name in watched}  # of each draw and application [T, N]

    def watch(name: str) -> None:
        def enter(module: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> None:
            inputs[name].append(x[0].detach().flatten(0, -2))
            y.register_hook(lambda gradient: gradients[name].append(gradient.flatten(0, -2)))  # type: ignore[no-untyped-call]

        linears[name].register_forward_hook(enter)

    for name in watched:
        watch(name)
    log_p = model(torch.from_numpy(np.asarray(tokens, np.int64))[None])[0].log_softmax(-1)  # [T, V]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(log_p.detach().exp(), draws, replacement=True, generator=generator)  # [T, draws]
    for draw in range(draws):
        (-log_p.gather(1, drawn[:, draw, None]).sum()).backward(retain_graph=draw < draws - 1)

    def cost(choice: Mapping[str, QuantizedMatrix]) -> float:
        moved = torch.zeros(draws, len(tokens))  # of -log p, first order
        for name, form in choice.items():
            change = torch.from_numpy(form.dequantize() - np.asarray(weights[name], np.float32))  # [N, K]
            count = len(inputs[name])
            for application, x in enumerate(inputs[name]):
                y = x @ change.T  # [T, N]
                for draw in range(draws):
                    # A draw's applications come in reverse.
                    gradient = gradients[name][draw * count + count - 1 - application]
                    moved[draw] += (gradient * y).sum(-1)
        return float(moved.square().mean()) / 2

    with torch.no_grad():
        return {unit: [cost(choice) for choice in choices] for unit, choices in forms.items()}
