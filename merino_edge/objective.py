"""What training minimises, from a model's logits: the next token's surprise, and what may be added to it.

Losses are sums over tokens, so that parts of a batch add up whatever they are; who calls divides by the batch's count.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from merino_edge.data import IGNORED


def next_token(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of logits [B, T, V] and targets [B, T]: what to minimise, and the cross-entropy within it; sums in nats.

    `z_loss` weighs the squared log of the softmax's sum, which keeps it from drifting (PaLM, section 5)."""
    flat, wanted = logits.flatten(0, 1).float(), targets.flatten()  # [B * T, V], [B * T]
    entropy = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    if not z_loss:
        return entropy, entropy
    normalizer = torch.logsumexp(flat, dim=-1)[wanted != IGNORED]
    return entropy + z_loss * normalizer.square().sum(), entropy
