"""What training minimises, from a model's logits: the next token's surprise, and how far it is from a teacher.

Losses are sums over tokens, so that parts of a batch add up whatever they are; who calls divides by the batch's count.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from merino_edge.data.corpus import IGNORED
from merino_edge.errors import InputError
from merino_edge.training.config import Direction

SMALLEST = 1e-6  # probability that a teacher leaves to what is not stored: rounding may leave none


def next_token(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """Of logits [B, T, V] and targets [B, T]: what to minimise, and the cross-entropy within it; sums in nats.

    `z_loss` weighs the squared log of the softmax's sum, which keeps it from drifting (PaLM, section 5)."""
    flat, wanted = logits.flatten(0, 1).float(), targets.flatten()  # [B * T, V], [B * T]
    entropy = F.cross_entropy(flat, wanted, ignore_index=IGNORED, reduction="sum")
    if not z_loss:
        return entropy, entropy
    normalizer = torch.logsumexp(flat, dim=-1)[wanted != IGNORED]
    return entropy + z_loss * normalizer.square().sum(), entropy


class TopK(NamedTuple):
    """A teacher's largest log-probabilities and whose they are, each [B, T, k]."""

    logs: Tensor
    ids: Tensor


def distillation(
    logits: Tensor,
    teacher: Tensor | TopK,
    targets: Tensor,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Tensor:
    """The divergence of a student's logits [B, T, V] from a teacher's, summed over the targets [B, T] learned from.

    With p the teacher's and q the student's softmax(logits / temperature): forward, sum of p (log p - log q); reverse,
    sum of q (log q - log p); times temperature squared, which keeps the gradient's size (Hinton et al., 2015). Of a
    teacher's k largest the sum is over those and one bucket more, which holds the rest of either's probability:
    p_r = 1 - sum of p_i, no less than SMALLEST, and q_r likewise. With k = V there is no rest.
    """
    learned = targets != IGNORED
    q = (logits[learned].float() / temperature).log_softmax(-1)  # [N, V]
    if isinstance(teacher, TopK):
        logs, ids = teacher.logs[learned].float(), teacher.ids[learned]  # [N, k]
        if temperature != 1:
            raise InputError("what is stored of a teacher is of temperature 1", "leave the temperature at 1")
        if ids.shape[-1] < q.shape[-1]:
            rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(SMALLEST).log()
            rest_q = q.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            logs, q = torch.cat([logs, rest], -1), torch.cat([q.gather(1, ids), rest_q], -1)
        else:
            q = q.gather(1, ids)
        p = logs.log_softmax(-1)  # what rounding left of the sum
    else:
        p = (teacher[learned].float() / temperature).log_softmax(-1)
    of, other = (p, q) if direction == "forward" else (q, p)
    return temperature**2 * (of.exp() * (of - other)).sum()
