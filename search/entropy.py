"""The entropy of a randomly initialised network's layers, and the penalty for depth.

Both have a closed form (MeRino, AAAI 2025; paper sections 2-4). No training, no data and no sampling is needed.
`merino_edge.search.score` makes scores of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from merino_edge.architecture import Block
from merino_edge.errors import InputError


@dataclass(frozen=True)
class Hyperparameters:
    """The constants of the score.

    The paper gives `beta_depth` only through its Table 1. It leaves four things open: `alpha_mha` and `alpha_ffn` (it
    tunes them against perplexity), `epsilon_squared`, and the form of the depth penalty. The penalty here is
    `(1 - gamma) ** effectiveness_power`. The defaults of the open constants are those whose exact optima come closest
    to the paper's parameter counts under its FLOP budgets (docs/reproduction.md: 1.4 % on average). They are not
    calibrated against trained models.

    A layer may share its weights with an earlier layer of its block. Such a layer counts as `shared_layer` layers. The
    paper's value is 1, which makes sharing free. Trained models suggest less (docs/study.md).
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
        """The number of layers that a block counts as. It is a multiple of 1/1024, so that sums are exact."""
        repeated = block.layers - block.weight_layers
        return block.weight_layers + round(1024 * self.shared_layer) / 1024 * repeated


@lru_cache(maxsize=65536)
def matrix_entropy(rows: int, columns: int, epsilon_squared: float) -> float:
    """The mean of sum_j log(1 + s_j^2 / epsilon_squared) over the singular values s_j of a random matrix, in nats.

    The matrix is [rows, columns] with independent N(0, 1) elements. The leading term is the Shannon transform of the
    Marchenko-Pastur law (Tulino and Verdu, 2004). The second term is the mean of its fluctuation for real elements
    (Bai and Silverstein, 2004), which does not vanish with size. The remaining error falls as 1 / size.
    """
    m, n = sorted((rows, columns))
    beta, g = m / n, n / epsilon_squared
    upper = math.sqrt(1 + g * (1 + math.sqrt(beta)) ** 2)  # at the largest singular value
    lower = math.sqrt(1 + g * (1 - math.sqrt(beta)) ** 2)  # at the smallest
    quarter_f = 4 * beta * (g / (upper + lower)) ** 2
    limit = n * (beta * math.log1p(g - quarter_f) + math.log1p(g * beta - quarter_f) - quarter_f / g)
    return limit + math.log(2 * math.sqrt(upper * lower) / (upper + lower))


def effectiveness_gamma(depth: int, width: int, beta_depth: float) -> float:
    """How far a network of `depth` layers is past its trainable depth, from 0 to 1 (paper section 3)."""
    return min(1.0, beta_depth * depth / math.log2(width)) if width > 1 else 1.0


def depth_penalty(depth: int, width: int, hyperparameters: Hyperparameters) -> float:
    """The factor on a layer's entropy, from 0 to 1. The paper does not give its form; 1 - gamma is the plainest one."""
    gamma = effectiveness_gamma(depth, width, hyperparameters.beta_depth)
    return float((1 - gamma) ** hyperparameters.effectiveness_power)


def layer_entropy(
    width: int, kv_width: int, ffn_width: int, epsilon_squared: float, *, gated: bool, cut: int | None = None
) -> tuple[float, float]:
    """The raw entropy of one layer's attention (Q, K, V, O) and FFN (up, down, and the gate if `gated`), in nats.

    `cut` is the narrowest width that every signal has passed through. With it, every matrix counts with at most `cut`
    dimensions on its residual-stream side. No more dimensions can carry information (data-processing inequality). Paper
    section 9 says why this is useful.
    """
    stream = width if cut is None else min(width, cut)
    query, key = (matrix_entropy(stream, columns, epsilon_squared) for columns in (width, kv_width))
    return 2 * (query + key), (3 if gated else 2) * matrix_entropy(stream, ffn_width, epsilon_squared)
