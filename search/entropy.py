"""The score of an architecture: the entropy of its randomly initialised network, weighted for depth.

Closed form: no training, no data, no sampling (MeRino, AAAI 2025; paper sections 2-4). Everything is a
sum over blocks once the total depth is known, so a search can tabulate `block_score` and add.

It does not know budgets or devices, and it sees no bottleneck: a narrow block costs it only its own
entropy, not what later blocks can no longer know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError


@dataclass(frozen=True)
class Hyperparameters:
    """The score's constants. The paper gives `beta_depth` only through its Table 1; it leaves open
    `alpha_mha` and `alpha_ffn` (it tunes them against perplexity), `epsilon_squared`, and the form of
    the depth penalty, here `(1 - gamma) ** effectiveness_power`. The defaults of the open ones are
    those whose optima come closest to the paper's parameter counts under its FLOP budgets; they are
    not calibrated against trained models.
    """

    alpha_mha: float = 0.4
    alpha_ffn: float = 0.6
    epsilon_squared: float = 700.0
    beta_depth: float = 1 / 16
    effectiveness_power: float = 1.0

    def __post_init__(self) -> None:
        for name in ("alpha_mha", "alpha_ffn", "beta_depth", "effectiveness_power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise InputError(f"{name} is {getattr(self, name)}", "give a number of at least 0")
        if not 0 < self.epsilon_squared < math.inf:
            raise InputError(f"epsilon_squared is {self.epsilon_squared}", "give a number above 0")


@dataclass(frozen=True)
class Score:
    """`total = alpha_mha * mha + alpha_ffn * ffn`, in nats. `mha` and `ffn` are sums over all computed
    layers after the depth penalty; `raw` is the plain entropy of both, without penalty and weights."""

    total: float
    mha: float
    ffn: float
    raw: float


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


def layer_entropy(a: Architecture, block: Block, epsilon_squared: float) -> tuple[float, float]:
    """Raw entropy (attention, FFN) of one layer: Q, K, V, O; and up, down and, where gated, the gate."""
    kv_width = block.kv_heads * a.head_dim
    query = matrix_entropy(block.width, block.width, epsilon_squared)
    key = matrix_entropy(block.width, kv_width, epsilon_squared)
    ffn = matrix_entropy(block.width, block.ffn_width, epsilon_squared)
    return 2 * (query + key), (3 if a.gated else 2) * ffn


def block_score(a: Architecture, block: Block, depth: int, hyperparameters: Hyperparameters) -> Score:
    """What `block` adds to the score of a network `depth` layers deep."""
    mha_raw, ffn_raw = layer_entropy(a, block, hyperparameters.epsilon_squared)
    mha = block.layers * depth_penalty(depth, block.width, hyperparameters) * mha_raw
    ffn = block.layers * depth_penalty(depth, block.ffn_width, hyperparameters) * ffn_raw
    total = hyperparameters.alpha_mha * mha + hyperparameters.alpha_ffn * ffn
    return Score(total, mha, ffn, block.layers * (mha_raw + ffn_raw))


def score(a: Architecture, hyperparameters: Hyperparameters | None = None) -> Score:
    """The score of `a` over all computed layers, shared or not (paper section 4)."""
    constants = hyperparameters or Hyperparameters()
    parts = [block_score(a, block, a.layers, constants) for block in a.blocks]
    return Score(*(sum(getattr(part, name) for part in parts) for name in ("total", "mha", "ffn", "raw")))
