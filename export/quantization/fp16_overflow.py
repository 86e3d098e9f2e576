"""Which feed-forward networks float16 is too small for, found on calibration text.

Trained models keep a few numbers of thousands and more between gate and down projection, and float16 ends at 65504.
Targets that compute in float16 compute those networks in float32 instead, as they do norms, softmax and residual
stream everywhere. What attention multiplies by comes from a norm and stays small; there an overflow is refused. It
imports PyTorch, as parity does.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.errors import UnsupportedError

# Text that was not looked at may go further.
SAFE = float(np.finfo(np.float16).max) / 4


def find_fp32_ffns(a: Architecture, weights: Mapping[str, np.ndarray], tokens: np.ndarray) -> frozenset[str]:
    """Prefixes of the FFNs ("blocks.0.layers.0.ffn.") that reach `SAFE` on `tokens` [T].

    Raises UnsupportedError where anything else does.
    """
    import torch
    from torch import Tensor, nn

    from merino_edge.pytorch.model import Model

    model = Model.from_weights(a, weights).eval()
    largest: dict[str, float] = {}

    def watch(name: str, module: nn.Module) -> None:
        def see(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            seen = max(float(inputs[0].abs().max()), float(output.abs().max()))
            largest[name] = max(seen, largest.get(name, 0.0))

        module.register_forward_hook(see)

    for name, module in model.linears().items():
        watch(name.removesuffix(".weight"), module)
    with torch.inference_mode():
        model(torch.from_numpy(np.asarray(tokens, np.int64))[None])
    found = {name: value for name, value in largest.items() if not value < SAFE}
    for name, value in found.items():
        if ".ffn." not in name:
            raise UnsupportedError(
                f"{name} reaches {value:.3g} on calibration text, float16 ends at {np.finfo(np.float16).max:.0f}",
                "export --precision fp32",
            )
    return frozenset(f"{name.rpartition('.ffn.')[0]}.ffn." for name in found)
