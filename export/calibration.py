"""What the inputs of a model's matrices look like on text: their second moments, for `merino_edge.export.gptq`.

The text is the model's own (LLM-QAT, Liu et al. 2023): sequences that begin with a random token and go on as the model
draws them, so that nothing has to be downloaded and every model, of whatever vocabulary, has some. It imports PyTorch,
as parity does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.weights import with_shared_inputs

SEQUENCES, LENGTH = 16, 192  # drawn, and positions of each


def input_moments(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
) -> dict[str, np.ndarray]:
    """By weight name: sum of x x^T [K, K] float32 over every input x of that matrix, the head left out.

    Matrices that share their input (query, key, value; gate, up) share one array.
    """
    import torch
    from torch import nn

    from merino_edge.model import Cache, Model

    model = Model.from_weights(a, weights).eval()
    length = min(length, a.max_positions)
    moments: dict[str, torch.Tensor] = {}
    linears = model.linears()
    together = with_shared_inputs(name for name in linears if name != "head.weight")

    def watch(name: str) -> None:
        def add(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            x = inputs[0].flatten(0, -2)  # [B * T, K]
            if name not in moments:
                moments[name] = torch.zeros(x.shape[1], x.shape[1])
            moments[name].addmm_(x.T, x)

        linears[name].register_forward_pre_hook(add)

    for names in together:
        watch(names[0])
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(a.vocab_size, (sequences, 1), generator=generator)
    cache = Cache(a, sequences, length)
    with torch.inference_mode():
        for position in range(length):
            logits = model(tokens, cache, position, last_only=True)[:, 0]  # [B, V]
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    found = {name: moment.numpy() for name, moment in moments.items()}
    return {name: found[names[0]] for names in together for name in names}
