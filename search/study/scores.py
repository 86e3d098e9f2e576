"""What trained models say about training-free scores: every score's agreement with quality, on the same models.

A study trains architectures of one vocabulary for equal tokens; quality is -log perplexity, the negative validation
loss in nats. This module turns architectures and losses into a table of scores (`merino_edge.search.study.rank_correlation` says
how they are compared, `study_calibration` fits constants, `study_report` writes it down). It trains nothing, and knows
no file, no clock and no weights: scores that need weights come in as numbers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.search.score import Score, parse_score
from merino_edge.search.study.rank_correlation import LEAST, Agreement, agreement, difference
from merino_edge.search.study.sampling import decoder_parameters
from merino_edge.statistics import Array, Mask

DEFAULT = "effective entropy"
ALIKE = 1.5  # models whose decoder parameters differ by at most this factor are of like size

# Score by name of the table: what `--score` calls it.
SPECS = {
    DEFAULT: "effective",
    "raw entropy": "effective:effectiveness_power=0",
    "entropy behind the cut": "cut",
    "entropy at the exit": "exit",
    "decoder parameters": "parameters",
    "FLOPs": "flops",
}
ALL_PARAMETERS = Score("all parameters", whole=lambda a: a.parameters)  # embeddings too


@dataclass(frozen=True)
class Trained:
    """An architecture and what its trainings ended at, one per seed: validation loss, nats per token."""

    architecture: Architecture
    losses: tuple[float, ...]

    def __post_init__(self) -> None:
        if not self.losses or not all(math.isfinite(loss) for loss in self.losses):
            raise InputError(
                f"architecture {self.architecture.id} has losses {list(self.losses)}", "leave it out, and say so"
            )

    @property
    def loss(self) -> float:
        """The mean over seeds."""
        return math.fsum(self.losses) / len(self.losses)


@dataclass(frozen=True)
class Row:
    """One score of the table. `over_default`: how much better it agrees than the default score; None of that itself."""

    name: str
    scores: Array  # [N]
    agreement: Agreement
    over_default: Agreement | None


def losses(trained: Sequence[Trained]) -> Array:
    """[N], nats per token. Raises InputError where the models cannot be compared."""
    if len(trained) < LEAST:
        raise InputError(f"{len(trained)} models are too few to rank", f"train at least {LEAST}")
    if len({model.architecture.id for model in trained}) < len(trained):
        raise InputError("an architecture stands twice among the models", "give all its losses together")
    sizes = sorted({model.architecture.vocab_size for model in trained})
    if len(sizes) > 1:
        raise InputError(f"the models have vocabularies of {sizes}", "losses per token compare only over one")
    return np.array([model.loss for model in trained])


def like_size(models: Sequence[Architecture], factor: float = ALIKE) -> Mask:
    """[N, N]: which pairs of different models have decoder parameters within `factor` of each other."""
    sizes = np.log([decoder_parameters(a) for a in models])
    near: Mask = np.abs(sizes[:, None] - sizes[None, :]) <= math.log(factor)
    np.fill_diagonal(near, False)
    return near


def built_in(models: Sequence[Architecture]) -> dict[str, Array]:
    """Every score that needs no weights, by name, [N] each."""
    scores = {name: parse_score(spec) for name, spec in SPECS.items()} | {ALL_PARAMETERS.spec: ALL_PARAMETERS}
    return {name: np.array([score.total(a) for a in models], np.float64) for name, score in scores.items()}


def table(
    trained: Sequence[Trained], others: Mapping[str, npt.ArrayLike] | None = None, seed: int = 0
) -> tuple[Row, ...]:
    """Every built-in score and `others` (by name, [N] in the models' order), the default one first.

    `seed` draws the bootstrap, the same for every row. Raises InputError, MissingExtraError.
    """
    loss, models = losses(trained), [model.architecture for model in trained]
    scores, alike = built_in(models), like_size(models)
    for name, values in (others or {}).items():
        if name in scores:
            raise InputError(f"there is a score {name!r} already", "name it otherwise")
        scores[name] = np.asarray(values, np.float64)
    default = scores[DEFAULT]
    return tuple(
        Row(
            name,
            values,
            agreement(values, loss, alike, seed),
            None if name == DEFAULT else difference(values, default, loss, alike, seed),
        )
        for name, values in scores.items()
    )


def repeatability(trained: Sequence[Trained], seed: int = 0) -> Agreement | None:
    """How the models' order by one half of the training seeds agrees with their order by the other: what no score can
    be expected to exceed by much. None where a model has one seed only."""
    losses(trained)
    if min(len(model.losses) for model in trained) < 2:
        return None
    first, second = (
        [float(np.mean(model.losses[half])) for model in trained] for half in (slice(0, None, 2), slice(1, None, 2))
    )
    return agreement(-np.array(first), second, like_size([model.architecture for model in trained]), seed)
