"""How well a training uses its machine: FLOPs per token, and MFU against what a matrix product reaches there.

MFU (PaLM, appendix B) is usually a share of a data sheet's figure. Ours is of the largest rate that PyTorch's matrix
product shows on this very device, at this precision and number of threads: a CPU has no such data sheet, and a GPU's
assumes clocks that it may not be given. A matrix product reaches 70 to 90 % of a data sheet.
"""

from __future__ import annotations

import time

import torch

from merino_edge import counts
from merino_edge.architecture import Architecture

SIZES = {"cpu": 1024, "cuda": 8192}  # of the square matrices
ROUNDS = 5


def training_flops_per_token(a: Architecture, sequence: int) -> float:
    """Forward and backward, the head included: three times the forward pass's."""
    return 3 * counts.flops(a, sequence, head=True) / sequence


def matmul_flops_per_second(device: torch.device, *, bf16: bool) -> float:
    """The fastest of a few products of large square matrices on this device."""
    size = SIZES.get(device.type, 1024)
    left = torch.ones(size, size, dtype=torch.bfloat16 if bf16 else torch.float32, device=device)
    fastest_s = float("inf")
    for _ in range(ROUNDS):
        began = time.perf_counter()
        product = left @ left
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        fastest_s = min(fastest_s, time.perf_counter() - began)
    return 2 * product.shape[0] ** 3 / fastest_s
