"""What a model is like inside on text: second moments of its matrices' inputs, for `merino_edge.export.quantization.gptq`, and how
far its keys and values reach, for a cache of int8.

The text is the model's own (LLM-QAT, Liu et al. 2023): sequences that begin with a random token and go on as the model
draws them, so that nothing has to be downloaded and every model, of whatever vocabulary, has some. It imports PyTorch,
as parity does.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.weights import with_shared_inputs

if TYPE_CHECKING:
    from merino_edge.pytorch.model import Cache

SEQUENCES, LENGTH = 16, 192  # drawn, and positions of each


class CalibrationStatistics(NamedTuple):
    """`moments`, by weight name: sum of x x^T [K, K] float32 over every input x of that matrix, of a tied table the
    head's; matrices that share their input (query, key, value; gate, up) share one array. `reach`, by the cache's name
    in a graph: the greatest magnitude of every channel [Hkv, D] float32, wherever a rotation may turn it."""

    moments: dict[str, np.ndarray]
    reach: dict[str, np.ndarray]


def collect_statistics(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    seed: int = 0,
    with_moments: bool = True,
) -> CalibrationStatistics:
    """Let the model draw `sequences` of `length` tokens and look on; `moments` take most of the time."""
    import torch

    from merino_edge.pytorch.model import Cache, Model

    model = Model.from_weights(a, weights).eval()
    length = min(length, a.max_positions)
    moments: dict[str, torch.Tensor] = {}
    linears = model.linears()
    head = "embedding.weight" if a.tied_head else "head.weight"
    together = with_shared_inputs(name for name in linears if name != head)

    def add(name: str, x: torch.Tensor) -> None:
        x = x.flatten(0, -2)  # [B * T, K]
        if name not in moments:
            moments[name] = torch.zeros(x.shape[1], x.shape[1])
        moments[name].addmm_(x.T, x)

    def watch(name: str) -> None:
        linears[name].register_forward_pre_hook(lambda _, inputs: add(name, inputs[0]))

    if with_moments:
        for names in together:
            watch(names[0])
        model.projection_out.register_forward_hook(lambda _, inputs, x: add(head, x))  # the head is no module if tied
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(a.vocab_size, (sequences, 1), generator=generator)
    cache = Cache(a, sequences, length)
    with torch.inference_mode():
        for position in range(length):
            logits = model(tokens, cache, position, last_only=True)[:, 0]  # [B, V]
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    found = {name: moment.numpy() for name, moment in moments.items()}
    if with_moments:
        found |= {name: found[names[0]] for names in together for name in names}
    return CalibrationStatistics(found, cache_absmax(a, cache))


def cache_absmax(a: Architecture, cache: Cache) -> dict[str, np.ndarray]:
    """As `CalibrationStatistics` says, of what a full cache holds."""
    found, half = {}, a.rotary_dim // 2
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):  # [B, Hkv, T, D] each
        for kind, tensor in (("key", keys), ("value", values)):
            size = tensor.abs()
            if kind == "key" and half:  # a rotation keeps the length of what it turns together
                size[..., :half] = size[..., half : 2 * half] = size[..., :half].hypot(size[..., half : 2 * half])
            found[f"{kind}_{layer}"] = size.amax(dim=(0, 2)).numpy()
    return found
