"""A comparison of models that were trained with the same seeds: mean losses and the intervals of their differences.

All models are compared with the first one. Models with the same seed draw the same batches, so seeds pair them. This
module knows no scores and trains nothing.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from merino_edge.errors import InputError, require
from merino_edge.search.study.report import markdown
from merino_edge.search.study.sampling import decoder_parameters
from merino_edge.search.study.scores import Trained

LEVEL = 0.95


@dataclass(frozen=True)
class Compared:
    """A model's losses in nats per token, and their mean difference to the first model's.

    `low` and `high` are the 95 % interval of Student's t over seeds. With one seed they are infinite. All three
    are None for the first model.
    """

    name: str
    losses: tuple[float, ...]
    loss: float
    difference: float | None
    low: float | None
    high: float | None


def comparison(models: Sequence[Trained], names: Sequence[str]) -> tuple[Compared, ...]:
    """Compare `models` with the first one. Raises InputError for unequal numbers of seeds, or for a single model."""
    require("scipy", "study")
    from scipy import stats

    if len(models) < 2:
        raise InputError(f"{len(models)} model cannot be compared", "give at least two")
    if len({len(model.losses) for model in models}) > 1:
        raise InputError("the models were trained with unequal numbers of seeds", "train what is missing")
    first = models[0]
    rows = [Compared(names[0], first.losses, first.loss, None, None, None)]
    for model, name in zip(models[1:], names[1:], strict=True):
        differences = [loss - base for loss, base in zip(model.losses, first.losses, strict=True)]
        mean, seeds = statistics.fmean(differences), len(differences)
        half = math.inf
        if seeds > 1:
            half = float(stats.t.ppf((1 + LEVEL) / 2, seeds - 1)) * statistics.stdev(differences) / math.sqrt(seeds)
        rows.append(Compared(name, model.losses, model.loss, mean, mean - half, mean + half))
    return tuple(rows)


def _exp(nats: float) -> float:
    """The exponential, also of a diverged training's loss."""
    return math.exp(min(nats, 700.0))  # a float ends soon after


def comparison_table(rows: Sequence[Compared], models: Sequence[Trained]) -> str:
    """A Markdown table: the first model, then the others by rising loss."""
    head = ("model", "decoder parameters", "layers", "loss", "perplexity", "loss over the first's", "perplexity over")
    pairs = list(zip(rows, models, strict=True))
    body = []
    for row, model in [pairs[0], *sorted(pairs[1:], key=lambda pair: pair[0].loss)]:
        over = times = "-"
        if row.difference is not None and row.low is not None and row.high is not None:
            over = f"{row.difference:+.3f} [{row.low:+.3f}, {row.high:+.3f}]"
            times = f"{_exp(row.difference) - 1:+.1%}"
        size = f"{decoder_parameters(model.architecture):,}"
        perplexity = f"{_exp(row.loss):.2f}"
        body.append((row.name, size, str(model.architecture.layers), f"{row.loss:.3f}", perplexity, over, times))
    return markdown(head, body)


def comparison_fields(rows: Sequence[Compared]) -> list[dict[str, Any]]:
    """The rows as JSON fields; an infinite interval is null."""
    return [{k: None if v in (math.inf, -math.inf) else v for k, v in asdict(row).items()} for row in rows]
