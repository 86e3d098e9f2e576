"""Calibration statistics of a model: second moments of its matrices' inputs, and ranges of its KV cache.

GPTQ uses the second moments, the int8 KV cache uses the ranges.
The model draws the calibration text itself (LLM-QAT, Liu et al. 2023): a sequence begins with a random token and the
model continues it. So nothing has to be downloaded, and the method works for any tokenizer. Imports PyTorch.
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from merino_edge import atomic
from merino_edge.architecture import Architecture
from merino_edge.weights import group_by_input

if TYPE_CHECKING:
    from merino_edge.pytorch.model import KVCache

SEQUENCES, LENGTH = 16, 192  # how many sequences are drawn, and the positions of each


class CalibrationStatistics(NamedTuple):
    """What calibration text showed.

    `moments`, by weight name: the sum of x x^T [K, K] float32 over every input x of that matrix. The entry of a tied
    table is that of the head. Matrices that share their input (query, key, value; gate, up) share one array.
    `absmax`, by the name of a cache in the graph: the largest magnitude of every channel [Hkv, D] float32. For a key
    it bounds the channel wherever a rotation may turn it.
    """

    moments: dict[str, np.ndarray]
    absmax: dict[str, np.ndarray]


def save_statistics(path: Path, statistics: CalibrationStatistics) -> None:
    """Write statistics to a file, for an export that is interrupted. Arrays that are shared are written once."""
    arrays, names = dict[int, np.ndarray](), dict[str, str]()
    for kind, of_kind in statistics._asdict().items():
        for name, array in of_kind.items():
            arrays[id(array)] = array
            names[f"{kind}.{name}"] = str(list(arrays).index(id(array)))
    buffer = io.BytesIO()
    named = {"names": np.array(json.dumps(names)), **{str(i): array for i, array in enumerate(arrays.values())}}
    np.savez(buffer, **named)  # type: ignore[arg-type]
    atomic.write_bytes(path, buffer.getvalue())


def load_statistics(path: Path) -> CalibrationStatistics:
    """Read what `save_statistics` wrote. Raises OSError, ValueError."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    found = CalibrationStatistics({}, {})
    for name, index in json.loads(str(arrays["names"])).items():
        kind, _, rest = name.partition(".")
        getattr(found, kind)[rest] = arrays[index]
    return found


def collect_statistics(
    a: Architecture,
    weights: Mapping[str, np.ndarray],
    sequences: int = SEQUENCES,
    length: int = LENGTH,
    *,
    seed: int = 0,
    with_moments: bool = True,
) -> CalibrationStatistics:
    """Let the model draw `sequences` of `length` tokens and record what passes; `moments` take most of the time."""
    import torch

    from merino_edge.pytorch.model import KVCache, Model

    model = Model.from_weights(a, weights, copy=False).eval()
    length = min(length, a.max_positions)
    sums: dict[str, torch.Tensor] = {}
    linears = model.linears()
    head = "embedding.weight" if a.tied_head else "head.weight"
    units = group_by_input(name for name in linears if name != head)

    def add(name: str, x: torch.Tensor) -> None:
        x = x.flatten(0, -2)  # [B * T, K]
        if name not in sums:
            sums[name] = torch.zeros(x.shape[1], x.shape[1])
        sums[name].addmm_(x.T, x)

    def watch(name: str) -> None:
        linears[name].register_forward_pre_hook(lambda _, inputs: add(name, inputs[0]))

    if with_moments:
        for names in units:
            watch(names[0])
        model.projection_out.register_forward_hook(lambda _, inputs, x: add(head, x))  # a tied head is no module
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(a.vocab_size, (sequences, 1), generator=generator)
    cache = KVCache(a, sequences, length)
    with torch.inference_mode():
        for position in range(length):
            logits = model(tokens, cache, position, last_only=True)[:, 0]  # [B, V]
            tokens = torch.multinomial(logits.softmax(-1), 1, generator=generator)
    moments = {name: total.numpy() for name, total in sums.items()}
    if with_moments:
        moments |= {name: moments[names[0]] for names in units for name in names}
    return CalibrationStatistics(moments, cache_absmax(a, cache))


def cache_absmax(a: Architecture, cache: KVCache) -> dict[str, np.ndarray]:
    """The largest magnitude [Hkv, D] of every channel in a full cache, as in `CalibrationStatistics.absmax`."""
    absmax, half = {}, a.rotary_dim // 2
    for layer, (keys, values) in enumerate(zip(cache.keys, cache.values, strict=True)):  # [B, Hkv, T, D] each
        for kind, tensor in (("key", keys), ("value", values)):
            size = tensor.abs()
            if kind == "key" and half:  # a rotation keeps the length of the pair that it turns
                size[..., :half] = size[..., half : 2 * half] = size[..., :half].hypot(size[..., half : 2 * half])
            absmax[f"{kind}_{layer}"] = size.amax(dim=(0, 2)).numpy()
    return absmax
