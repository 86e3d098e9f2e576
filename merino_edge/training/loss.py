"""Losses: next-token cross-entropy with z-loss, and the distillation loss against a teacher.

A loss is a sum over tokens, so the micro-batches of a batch can be added up. The caller divides by the batch's tokens.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from merino_edge.data.corpus import IGNORED
from merino_edge.errors import InputError
from merino_edge.training.config import Direction

MIN_REST = 1e-6  # smallest probability of the tokens that are not stored; rounding may leave less


def next_token_loss(logits: Tensor, targets: Tensor, z_loss: float = 0.0) -> tuple[Tensor, Tensor]:
    """The loss and the cross-entropy in it, from logits [B, T, V] and targets [B, T]. Both are sums in nats.

    The z-loss is the squared log of the softmax's normaliser, times the coefficient `z_loss`. It keeps the normaliser
    from drifting (PaLM, section 5).
    """
    flat, labels = logits.flatten(0, 1).float(), targets.flatten()  # [B * T, V], [B * T]
    entropy = F.cross_entropy(flat, labels, ignore_index=IGNORED, reduction="sum")
    if not z_loss:
        return entropy, entropy
    log_normaliser = torch.logsumexp(flat, dim=-1)[labels != IGNORED]
    return entropy + z_loss * log_normaliser.square().sum(), entropy


class TopK(NamedTuple):
    """A teacher's k largest log-probabilities and their token ids, each [B, T, k]."""

    logs: Tensor
    ids: Tensor


def distillation_loss(
    logits: Tensor,
    teacher: Tensor | TopK,
    targets: Tensor,
    temperature: float = 1.0,
    direction: Direction = "forward",
) -> Tensor:
    """The KL divergence between a student's logits [B, T, V] and a teacher, summed over the targets [B, T].

    p is the teacher's and q the student's softmax(logits / temperature):

        forward  T^2 sum of p (log p - log q)       reverse  T^2 sum of q (log q - log p)

    The temperature squared keeps the scale of the gradient (Hinton et al., 2015). Ignored targets do not count. For a
    `TopK` teacher the sum is over its k tokens and one bucket for all other tokens: p_r = 1 - sum of p_i (at least
    MIN_REST) and q_r likewise. With k = V there is no such bucket. Raises InputError for a `TopK` teacher with another
    temperature than 1.
    """
    learned = targets != IGNORED
    q = (logits[learned].float() / temperature).log_softmax(-1)  # [N, V]
    if isinstance(teacher, TopK):
        logs, ids = teacher.logs[learned].float(), teacher.ids[learned]  # [N, k]
        if temperature != 1:
            raise InputError("what is stored of a teacher is of temperature 1", "leave the temperature at 1")
        if ids.shape[-1] < q.shape[-1]:
            rest = (1 - logs.exp().sum(-1, keepdim=True)).clamp_min(MIN_REST).log()
            rest_q = q.scatter(1, ids, -torch.inf).logsumexp(-1, keepdim=True)
            logs, q = torch.cat([logs, rest], -1), torch.cat([q.gather(1, ids), rest_q], -1)
        else:
            q = q.gather(1, ids)
        p = logs.log_softmax(-1)  # rounding may have changed their sum
    else:
        p = (teacher[learned].float() / temperature).log_softmax(-1)
    first, second = (p, q) if direction == "forward" else (q, p)
    return temperature**2 * (first.exp() * (first - second)).sum()
