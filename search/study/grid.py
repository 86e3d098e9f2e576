"""The grid of settings that a calibration tries, and the scores of all settings at once.

A setting has one of three forms:

| form | a model's score |
|---|---|
| effective | `effective`: the paper's |
| cut | `cut`: every matrix counts only as wide as the narrowest width before it |
| exit | H w^g: effective entropy H times a power of the last block's width w |

The head sees only the last block's width. `exit_power` g is how much this width counts in addition to its part in H.
The share of a repeated layer is tried only if some model shares weights. This module knows no losses.
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
    """The constants of one score. Only the ratio of both alphas affects the order, so alpha_ffn is 1 - alpha_mha."""

    form: str
    alpha_mha: float
    epsilon_squared: float
    beta_depth: float
    effectiveness_power: float
    exit_power: float = 0  # of form `exit`
    shared_layer: float = _DEFAULT.shared_layer

    @property
    def hyperparameters(self) -> Hyperparameters:
        """The constants as the score takes them."""
        constants = (self.alpha_mha, 1 - self.alpha_mha, self.epsilon_squared, self.beta_depth)
        return Hyperparameters(*constants, effectiveness_power=self.effectiveness_power, shared_layer=self.shared_layer)

    def score(self) -> Score:
        """This setting as a score of architectures."""
        if self.form == "exit":
            return at_exit(self.hyperparameters, self.exit_power)
        return effective(self.hyperparameters, cut=self.form == "cut")


@dataclass(frozen=True)
class Grid:
    """The values tried for each constant, ascending. The standard grid includes the defaults of `Hyperparameters`."""

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
        """The part of the grid that can distinguish `models`: without shared weights, sharing is not varied."""
        shared = any(block.weight_layers < block.layers for a in models for block in a.blocks)
        return self if shared else replace(self, shared_layer=(_DEFAULT.shared_layer,))

    def axes(self, form: str) -> tuple[tuple[float, ...], ...]:
        """The values of each constant that a form varies. Raises InputError for an unknown form."""
        if form not in FORMS:
            raise InputError(f"there is no form {form!r} of the score", f"choose {', '.join(FORMS)}")
        powers = self.exit_power if form == "exit" else (0.0,)
        constants = (self.alpha_mha, self.epsilon_squared, self.beta_depth, self.effectiveness_power)
        return *constants, powers, self.shared_layer

    def settings(self, form: str) -> list[Setting]:
        """All K settings of a form, in the order of `scores`."""
        return [Setting(form, *values) for values in itertools.product(*self.axes(form))]

    def steps(self, form: str) -> Array:
        """The number of grid steps between each setting and the default constants, [K]."""
        defaults = (
            _DEFAULT.alpha_mha,
            _DEFAULT.epsilon_squared,
            _DEFAULT.beta_depth,
            _DEFAULT.effectiveness_power,
            0,
            _DEFAULT.shared_layer,
        )
        distances = []
        for values, default in zip(self.axes(form), defaults, strict=True):
            nearest = int(np.argmin(np.abs(np.subtract(values, default))))
            distances.append(np.abs(np.arange(len(values)) - nearest))
        summed: Array = np.sum(np.meshgrid(*distances, indexing="ij"), axis=0).astype(np.float64)
        return summed.ravel()


def scores(models: Sequence[Architecture], grid: Grid, form: str) -> Array:
    """The score of every setting for every model, [K, N]."""
    alphas, epsilons, betas, powers, exits, shares = grid.axes(form)
    max_blocks = max(len(a.blocks) for a in models)
    shape = (len(models), max_blocks)
    layers = np.zeros((len(shares), *shape))  # [shares, N, blocks], 0 where a model has fewer blocks
    entropy = np.zeros((2, len(epsilons), *shape))  # of attention and FFN
    gamma = np.zeros((2, len(betas), *shape))
    for n, a in enumerate(models):
        cut = narrowest_cut(a) if form == "cut" else None
        for k, block in enumerate(a.blocks):
            layers[:, n, k] = [Hyperparameters(shared_layer=share).counted_layers(block) for share in shares]
            layer = (block.width, block.kv_heads * a.head_dim, block.ffn_width)
            for e, epsilon in enumerate(epsilons):
                entropy[:, e, n, k] = layer_entropy(*layer, epsilon, gated=a.gated, cut=cut)
            for b, beta in enumerate(betas):
                for part, width in enumerate((block.width, block.ffn_width)):
                    gamma[part, b, n, k] = effectiveness_gamma(a.layers, width, beta)
    penalty = (1 - gamma[:, :, None]) ** np.array(powers)[:, None, None]  # [2, betas, powers, N, blocks]
    parts = np.einsum("snk,cenk,cbpnk->cebpsn", layers, entropy, penalty, optimize=True)
    alpha = np.array(alphas).reshape(-1, *[1] * (parts.ndim - 1))
    total = alpha * parts[0] + (1 - alpha) * parts[1]  # [alphas, epsilons, betas, powers, shares, N]
    last = np.array([[exit_factor(power, a.blocks[-1].width) for a in models] for power in exits])
    total = total[:, :, :, :, None] * last[:, None]  # [..., powers, exits, shares, N]
    # Equal scores must be equal on any machine.
    rounded: Array = np.round(total / RESOLUTION) * RESOLUTION
    return rounded.reshape(-1, len(models))
