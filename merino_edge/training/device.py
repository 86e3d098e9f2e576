"""PyTorch's device, its native bf16, and its CPU threads, for training and for distillation. It knows no model."""

from __future__ import annotations

from typing import Any

import torch

from merino_edge import limits
from merino_edge.training.config import check_precision


def device() -> torch.device:
    """The GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def uses_bf16(precision: str, on: torch.device) -> bool:
    """Whether to compute in bf16. "auto" means bf16 where the device multiplies matrices in it natively.

    Emulated bf16 is slower than fp32. Raises InputError for an unknown precision.
    """
    if check_precision(precision) != "auto":
        return precision == "bf16"
    if on.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # PyTorch from 2.10 on
    return bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def set_threads(threads: int | None) -> None:
    """Set the CPU threads of this process; None leaves them as they are. Raises InputError."""
    if threads is not None:
        torch.set_num_threads(limits.check_range("threads", threads, 1, limits.MAX_THREADS))
