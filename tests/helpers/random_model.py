"""Random weights with which every part of a model matters."""

from __future__ import annotations

import math

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.weights import weight_shapes


def random_model(a: Architecture, strength: float = 1.5) -> dict[str, np.ndarray]:
    """Random weights. No norm or bias has its neutral value, so that a forgotten one shows."""
    rng = np.random.default_rng(0)
    weights = {}
    for name, shape in weight_shapes(a).items():
        center = 1.0 if name.endswith("norm.weight") else 0.0
        spread = 0.2 if len(shape) == 1 else strength / math.sqrt(shape[-1])
        weights[name] = (center + spread * rng.standard_normal(shape)).astype(np.float32)
    return weights
