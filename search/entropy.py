"""The entropy of a randomly initialised network's layers, and the penalty for depth.

Closed form: no training, no data, no sampling (MeRino, AAAI 2025; paper sections 2-4). How a score is made of them
stands in `merino_edge.search.score`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from merino_edge.architecture import Block
from merino_edge.errors import InputError


@dataclass(frozen=True)
class Hyperparameters:
    """The score's constants. The paper gives `beta_depth` only through its Table 1; it leaves open
    `alpha_mha` and `alpha_ffn` (it tunes them against perplexity), `epsilon_squared`, and the form of
    the depth penalty, here `(1 - gamma) ** effectiveness_power`. The defaults of the open ones are
    those whose exact optima come closest to the paper's parameter counts under its FLOP budgets
    (docs/reproduction.md: 1.4 % on average); they are not calibrated against trained models.
    `shared_layer` is what a layer counts whose weights an earlier layer of its block has had: 1 is
    the paper's, which takes sharing for free; trained models say less (docs/study.md).
    """

    alpha_mha: float = 0.57
    alpha_ffn: float = 0.43
    epsilon_squared: float = 700.0
    beta_depth: float = 1 / 16
    effectiveness_power: float = 1.0
    shared_layer: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha_mha", "alpha_ffn", "beta_depth", "effectiveness_power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}", "give a number of at least 0")
        if not 0 < self.epsilon_squared < math.inf:
            raise InputError(f"epsilon_squared is {self.epsilon_squared}", "give a number above 0")
        if not 0 <= self.shared_layer <= 1:
            raise InputError(f"shared_layer is {self.shared_layer}", "give 0 to 1")

    def counted_layers(self, block: Block) -> float:
        """How many layers with weights of their own a block counts as; in 1024ths, so that sums of scores are exact."""
        repeated = block.layers - block.weight_layers
        return block.weight_layers + round(1024 * self.shared_layer) / 1024 * repeated


@lru_cache(maxsize=65536)
def matrix_entropy(rows: int, columns: int, epsilon_squared: float) -> float:
    """E[sum_j log(1 + s_j^2 / epsilon_squared)] in nats over the singular values s_j of a
    [rows, columns] matrix of independent N(0, 1) elements.

    The leading term is the Shannon transform of the Marchenko-Pastur law (Tulino and Verdu, 2004), the
    second the mean of its fluctuation for real elements (Bai and Silverstein, 2004), which does not
    vanish with size. What is left falls as 1 / size.
    """
    m, n = sorted((rows, columns))
    beta, g = m / n, n / epsilon_squared
    upper = math.sqrt(1 + g * (1 + math.sqrt(beta)) ** 2)  # at the largest singular value
    lower = math.sqrt(1 + g * (1 - math.sqrt(beta)) ** 2)  # at the smallest
    quarter_f = 4 * beta * (g / (upper + lower)) ** 2
    limit = n * (beta * math.log1p(g - quarter_f) + math.log1p(g * beta - quarter_f) - quarter_f / g)
    return limit + math.log(2 * math.sqrt(upper * lower) / (upper + lower))


def effectiveness_gamma(depth: int, width: int, beta_depth: float) -> float:
    """How far past its trainable depth a network of `depth` layers is, 0..1 (paper section 3)."""
    return min(1.0, beta_depth * depth / math.log2(width)) if width > 1 else 1.0


def depth_penalty(depth: int, width: int, hyperparameters: Hyperparameters) -> float:
    """The factor 0..1 on a layer's entropy. The paper leaves its form open; 1 - gamma is its plainest reading."""
    gamma = effectiveness_gamma(depth, width, hyperparameters.beta_depth)
    return float((1 - gamma) ** hyperparameters.effectiveness_power)


def layer_entropy(
    width: int, kv_width: int, ffn_width: int, gated: bool, epsilon_squared: float, cut: int | None = None
) -> tuple[float, float]:
    """Raw entropy (attention, FFN) of one layer: Q, K, V, O; and up, down and, where gated, the gate.

    With `cut`, the narrowest width that everything before has passed through, every matrix counts with at most `cut`
    dimensions on the side of the residual stream: no more can tell it anything (data-processing inequality; paper
    section 9 says why it is wanted).
    """
    stream = width if cut is None else min(width, cut)
    query, key = (matrix_entropy(stream, columns, epsilon_squared) for columns in (width, kv_width))
    return 2 * (query + key), (3 if gated else 2) * matrix_entropy(stream, ffn_width, epsilon_squared)
