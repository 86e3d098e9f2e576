"""Sensitivity of a model to the rounding of each matrix, in nats of KL per position, from a few backward passes.

A matrix with rounding error E changes the model's distribution at a position by KL ~ 1/2 (g . E x)^2. Here x is the
matrix's input there. g is the gradient of -log p(token) by the matrix's output, for a token drawn from the model.
This is the Fisher information, as in Optimal Brain Surgeon (Hassibi and Stork 1993); positions count as independent.
So one forward and a few backward passes serve every matrix and every way to round it. Measuring would take a pass for
each. Imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix

SAMPLES = 4  # tokens drawn at every position, each a backward pass

Unit = tuple[str, ...]  # names of the matrices that the graph writes as one product


def rounding_costs(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    forms: Mapping[Unit, Sequence[Mapping[str, QuantizedMatrix]]],
    tokens: np.ndarray,
    *,
    samples: int = SAMPLES,
    seed: int = 0,
) -> dict[Unit, list[float]]:
    """The KL [nats per position] that each of a unit's `forms` is expected to cost on `tokens` [T].

    A form is a way to round the unit: a quantised matrix for each of its names.
    """
    import torch
    from torch import Tensor, nn

    from merino_edge.pytorch.model import Model

    model = Model.from_weights(a, weights, copy=False).eval()
    linears = model.linears()
    watched = [name for unit in forms for name in unit]
    inputs: dict[str, list[Tensor]] = {name: [] for name in watched}  # of each application [T, K]
    gradients: dict[str, list[Tensor]] = {name: [] for name in watched}  # of each sample and application [T, N]

    def watch(name: str) -> None:
        def record(module: nn.Module, x: tuple[Tensor, ...], y: Tensor) -> None:
            inputs[name].append(x[0].detach().flatten(0, -2))
            y.register_hook(lambda gradient: gradients[name].append(gradient.flatten(0, -2)))  # type: ignore[no-untyped-call]

        linears[name].register_forward_hook(record)

    for name in watched:
        watch(name)
    log_p = model(torch.from_numpy(np.asarray(tokens, np.int64))[None])[0].log_softmax(-1)  # [T, V]
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.multinomial(log_p.detach().exp(), samples, replacement=True, generator=generator)  # [T, samples]
    for sample in range(samples):
        (-log_p.gather(1, drawn[:, sample, None]).sum()).backward(retain_graph=sample < samples - 1)

    def cost(form: Mapping[str, QuantizedMatrix]) -> float:
        change = torch.zeros(samples, len(tokens))  # of -log p, first order
        for name, matrix in form.items():
            error = torch.from_numpy(matrix.dequantize() - np.asarray(weights[name], np.float32))  # [N, K]
            count = len(inputs[name])
            for application, x in enumerate(inputs[name]):
                y = x @ error.T  # [T, N]
                for sample in range(samples):
                    # The backward pass reaches a sample's applications in reverse.
                    gradient = gradients[name][sample * count + count - 1 - application]
                    change[sample] += (gradient * y).sum(-1)
        return float(change.square().mean()) / 2

    with torch.no_grad():
        return {unit: [cost(form) for form in unit_forms] for unit, unit_forms in forms.items()}
