"""Feed-forward networks that overflow float16, found on calibration text.

Between gate and down projection, trained models keep a few numbers in the thousands and above; float16 ends at 65504.
Targets that compute in float16 therefore compute those FFNs in float32, as they do norms, softmax and residual stream.
The inputs of attention come from a norm and stay small, so an overflow there is refused. Imports PyTorch.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.errors import UnsupportedError

SAFE = float(np.finfo(np.float16).max) / 4  # other text may reach further than the calibration text


def find_fp32_ffns(a: Architecture, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> frozenset[str]:
    """Prefixes of the FFNs ("blocks.0.layers.0.ffn.") whose values reach `SAFE` on `tokens` [T].

    Raises UnsupportedError where a matrix outside the FFNs reaches it.
    """
    import torch
    from torch import Tensor, nn

    from merino_edge.pytorch.model import Model

    model = Model.from_weights(a, weights, copy=False).eval()
    absmax: dict[str, float] = {}

    def watch(name: str, module: nn.Module) -> None:
        def record(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            reached = max(float(inputs[0].abs().max()), float(output.abs().max()))
            absmax[name] = max(reached, absmax.get(name, 0.0))

        module.register_forward_hook(record)

    for name, module in model.linears().items():
        watch(name.removesuffix(".weight"), module)
    with torch.inference_mode():
        model(torch.from_numpy(np.asarray(tokens, np.int64))[None])
    overflowing = {name: value for name, value in absmax.items() if not value < SAFE}  # so that NaN counts
    for name, value in overflowing.items():
        if ".ffn." not in name:
            raise UnsupportedError(
                f"{name} reaches {value:.3g} on calibration text, float16 ends at {np.finfo(np.float16).max:.0f}",
                "export --precision fp32",
            )
    return frozenset(f"{name.rpartition('.ffn.')[0]}.ffn." for name in overflowing)
