"""What a calibration tries: constants of the score in one of three forms, and the scores of all settings at once.

| form | a model's score |
|---|---|
| effective | `effective`: the paper's |
| cut | `cut`: every matrix counts only as wide as the narrowest place before it |
| exit | H w^g: its effective entropy H times a power of the width w of the last block |

The last block's width is all that the head gets of what was computed; `exit_power` g says how much that counts beyond
what it adds to H. What a layer of shared weights counts is tried only where models share.

It knows no losses.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import numpy as np

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.search.entropy import Hyperparameters, effectiveness_gamma, layer_entropy
from merino_edge.search.score import RESOLUTION, Score, at_exit, effective, exit_factor, narrowest_cut
from merino_edge.statistics import Array

FORMS = ("effective", "cut", "exit")
_DEFAULT = Hyperparameters()


@dataclass(frozen=True)
class Setting:
    """Constants of a score. Only the ratio of the two alphas orders models, so alpha_ffn is 1 - alpha_mha."""

    form: str
    alpha_mha: float
    epsilon_squared: float
    beta_depth: float
    effectiveness_power: float
    exit_power: float = 0  # of `exit`
    shared_layer: float = _DEFAULT.shared_layer

    @property
    def hyperparameters(self) -> Hyperparameters:
        constants = (self.alpha_mha, 1 - self.alpha_mha, self.epsilon_squared, self.beta_depth)
        return Hyperparameters(*constants, effectiveness_power=self.effectiveness_power, shared_layer=self.shared_layer)

    def score(self) -> Score:
        """The same as a score of any architecture."""
        if self.form == "exit":
            return at_exit(self.hyperparameters, self.exit_power)
        return effective(self.hyperparameters, cut=self.form == "cut")


@dataclass(frozen=True)
class Grid:
    """Values tried for each constant, ascending. The defaults of `Hyperparameters` are among the standard ones."""

    alpha_mha: tuple[float, ...] = (0.1, 0.2, 0.3, 0.4, 0.5, _DEFAULT.alpha_mha, 0.7, 0.8, 0.9)
    epsilon_squared: tuple[float, ...] = (1, 3, 10, 30, 100, 300, _DEFAULT.epsilon_squared, 2000, 7000, 20000, 100000)
    beta_depth: tuple[float, ...] = (1 / 32, _DEFAULT.beta_depth, 1 / 8, 1 / 4)
    effectiveness_power: tuple[float, ...] = (0, 0.5, _DEFAULT.effectiveness_power, 1.5, 2, 3, 4)
    exit_power: tuple[float, ...] = (0, 0.25, 0.5, 0.75, 1, 1.5)
    shared_layer: tuple[float, ...] = (0, 0.1, 0.2, 0.3, 0.4, 0.6, 0.8, _DEFAULT.shared_layer)

    def __post_init__(self) -> None:
        for field in fields(self):
            values = getattr(self, field.name)
            if not values or list(values) != sorted(set(values)):
                raise InputError(f"the grid's {field.name} is {list(values)}", "list ascending numbers")

    def of(self, models: Sequence[Architecture]) -> Grid:
        """What of it can tell these models apart: where none shares weights, sharing is not tried."""
        shared = any(block.weight_layers < block.layers for a in models for block in a.blocks)
        return self if shared else replace(self, shared_layer=(_DEFAULT.shared_layer,))

    def axes(self, form: str) -> tuple[tuple[float, ...], ...]:
        if form not in FORMS:
            raise InputError(f"there is no form {form!r} of the score", f"choose {', '.join(FORMS)}")
        powers = self.exit_power if form == "exit" else (0.0,)
        constants = (self.alpha_mha, self.epsilon_squared, self.beta_depth, self.effectiveness_power)
        return *constants, powers, self.shared_layer

    def settings(self, form: str) -> list[Setting]:
        """[K], in the order of `scores`."""
        return [Setting(form, *values) for values in itertools.product(*self.axes(form))]

    def steps(self, form: str) -> Array:
        """[K]: how many steps of the grid each setting is from the default constants."""
        own = (
            _DEFAULT.alpha_mha,
            _DEFAULT.epsilon_squared,
            _DEFAULT.beta_depth,
            _DEFAULT.effectiveness_power,
            0,
            _DEFAULT.shared_layer,
        )
        away = []
        for values, default in zip(self.axes(form), own, strict=True):
            home = int(np.argmin(np.abs(np.subtract(values, default))))
            away.append(np.abs(np.arange(len(values)) - home))
        summed: Array = np.sum(np.meshgrid(*away, indexing="ij"), axis=0).astype(np.float64)
        return summed.ravel()


def scores(models: Sequence[Architecture], grid: Grid, form: str) -> Array:
    """[K, N]: what every setting gives every model."""
    alphas, epsilons, betas, powers, exits, shares = grid.axes(form)
    most = max(len(a.blocks) for a in models)
    shape = (len(models), most)
    layers = np.zeros((len(shares), *shape))  # [shares, N, blocks], 0 where a model has fewer blocks
    entropy = np.zeros((2, len(epsilons), *shape))  # of attention and FFN
    gamma = np.zeros((2, len(betas), *shape))
    for n, a in enumerate(models):
        cut = narrowest_cut(a) if form == "cut" else None
        for k, block in enumerate(a.blocks):
            layers[:, n, k] = [Hyperparameters(shared_layer=share).counted_layers(block) for share in shares]
            layer = (block.width, block.kv_heads * a.head_dim, block.ffn_width, a.gated)
            for e, epsilon in enumerate(epsilons):
                entropy[:, e, n, k] = layer_entropy(*layer, epsilon, cut)
            for b, beta in enumerate(betas):
                for part, width in enumerate((block.width, block.ffn_width)):
                    gamma[part, b, n, k] = effectiveness_gamma(a.layers, width, beta)
    penalty = (1 - gamma[:, :, None]) ** np.array(powers)[:, None, None]  # [2, betas, powers, N, blocks]
    parts = np.einsum("snk,cenk,cbpnk->cebpsn", layers, entropy, penalty, optimize=True)
    alpha = np.array(alphas).reshape(-1, *[1] * (parts.ndim - 1))
    total = alpha * parts[0] + (1 - alpha) * parts[1]  # [alphas, epsilons, betas, powers, shares, N]
    last = np.array([[exit_factor(power, a.blocks[-1].width) for a in models] for power in exits])
    total = total[:, :, :, :, None] * last[:, None]  # [..., powers, exits, shares, N]
    # What ties on paper ties here.
    rounded: Array = np.round(total / RESOLUTION) * RESOLUTION
    return rounded.reshape(-1, len(models))
