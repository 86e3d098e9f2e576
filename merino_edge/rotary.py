"""The frequencies of rotary positions: computed here, once, for the PyTorch model and for every exported graph."""

from __future__ import annotations

import numpy as np

from merino_edge.architecture import Architecture, Rotary


def frequencies(a: Architecture, kind: Rotary = "global") -> np.ndarray:
    """Angles [R / 2] float64 by which one position turns each pair of channels, for layers of a kind of rotary."""
    exponent = np.arange(0, a.rotary_dim, 2, dtype=np.float64) / a.rotary_dim
    if kind == "local":
        return np.asarray(a.local_rotary_base**-exponent)
    base = np.asarray(a.rotary_base**-exponent)
    return base / np.asarray(a.rotary_factors) if a.rotary_factors else base
