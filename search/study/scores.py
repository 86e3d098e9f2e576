"""The rank correlation of training-free scores with the quality of trained models.

A study trains architectures of one vocabulary on equal numbers of tokens. Quality is the negative validation loss in
nats. This module turns architectures and losses into a table of scores. `rank_correlation` compares them, `calibration`
fits constants, and `report` writes the results. It trains nothing, and it knows no file, no clock and no weights. The
values of scores that need weights are passed in.
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
from merino_edge.search.study.rank_correlation import MIN_MODELS, Agreement, agreement, difference
from merino_edge.search.study.sampling import decoder_parameters
from merino_edge.statistics import Array, Mask

PAPER = "effective entropy"
ALIKE = 1.5  # models are of like size if their decoder parameters differ by at most this factor

# The table's name of each built-in score, and its `--score` form.
SPECS = {
    PAPER: "paper",
    "raw entropy": "effective:effectiveness_power=0",
    "entropy behind the cut": "cut",
    "entropy at the exit": "exit",
    "calibrated": "calibrated",
    "counting": "counting",
    "decoder parameters": "parameters",
    "FLOPs": "flops",
}
ALL_PARAMETERS = Score("all parameters", whole=lambda a: a.parameters)  # including embeddings


@dataclass(frozen=True)
class Trained:
    """An architecture and its final validation losses in nats per token, one per seed.

    Raises InputError if there is no loss, or one is not finite.
    """

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
    """One score of the table.

    `over_paper` is its correlation minus that of the paper's score. It is None for the paper's score.
    """

    name: str
    scores: Array  # [N]
    agreement: Agreement
    over_paper: Agreement | None


def losses(trained: Sequence[Trained]) -> Array:
    """The mean losses [N], in nats per token. Raises InputError if the models cannot be compared."""
    if len(trained) < MIN_MODELS:
        raise InputError(f"{len(trained)} models are too few to rank", f"train at least {MIN_MODELS}")
    if len({model.architecture.id for model in trained}) < len(trained):
        raise InputError("an architecture stands twice among the models", "give all its losses together")
    sizes = sorted({model.architecture.vocab_size for model in trained})
    if len(sizes) > 1:
        raise InputError(f"the models have vocabularies of {sizes}", "losses per token compare only over one")
    return np.array([model.loss for model in trained])


def like_size(models: Sequence[Architecture], factor: float = ALIKE) -> Mask:
    """A mask [N, N] of the pairs of different models whose decoder parameters are within `factor` of each other."""
    sizes = np.log([decoder_parameters(a) for a in models])
    near: Mask = np.abs(sizes[:, None] - sizes[None, :]) <= math.log(factor)
    np.fill_diagonal(near, val=False)
    return near


def builtin_scores(models: Sequence[Architecture]) -> dict[str, Array]:
    """The values [N] of every score that needs no weights, by name."""
    scores = {name: parse_score(spec) for name, spec in SPECS.items()} | {ALL_PARAMETERS.spec: ALL_PARAMETERS}
    return {name: np.array([score.total(a) for a in models], np.float64) for name, score in scores.items()}


def table(
    trained: Sequence[Trained], others: Mapping[str, npt.ArrayLike] | None = None, seed: int = 0
) -> tuple[Row, ...]:
    """A row for every built-in score and for each of `others`, the paper's score first.

    `others` maps names to values [N] in the models' order. `seed` seeds the bootstrap, the same for every row. Raises
    InputError or MissingExtraError.
    """
    loss, models = losses(trained), [model.architecture for model in trained]
    scores, alike = builtin_scores(models), like_size(models)
    for name, values in (others or {}).items():
        if name in scores:
            raise InputError(f"there is a score {name!r} already", "name it otherwise")
        scores[name] = np.asarray(values, np.float64)
    paper = scores[PAPER]
    return tuple(
        Row(
            name,
            values,
            agreement(values, loss, alike, seed=seed),
            None if name == PAPER else difference(values, paper, loss, alike, seed=seed),
        )
        for name, values in scores.items()
    )


def repeatability(trained: Sequence[Trained], seed: int = 0) -> Agreement | None:
    """The rank correlation between two halves of the training seeds.

    No score can be expected to exceed it by much. It is None if a model has only one seed.
    """
    losses(trained)
    if min(len(model.losses) for model in trained) < 2:
        return None
    first, second = (
        [float(np.mean(model.losses[half])) for model in trained] for half in (slice(0, None, 2), slice(1, None, 2))
    )
    return agreement(-np.array(first), second, like_size([model.architecture for model in trained]), seed=seed)
