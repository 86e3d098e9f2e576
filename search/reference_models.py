"""Public models as references for a search: their own score, and their cost by the same table.

A table covers one kind of layer, but public models have several. A model may differ from the table's kind in parts that
hardly cost time: norm, biases, positions, tied head, or an ungated activation. Then the table's nearest model gives the
value, and the notes name what was replaced. If a model differs in more, the notes give the reason why there is no
value. A model that was measured as a whole (`profile --also`) has that value.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from merino_edge.architecture import GATED, Architecture, Block
from merino_edge.errors import InputError
from merino_edge.latency.step import Step
from merino_edge.latency.table import FAMILY, LATER_FAMILY, LatencyTable
from merino_edge.presets import preset
from merino_edge.search.budget import Metric
from merino_edge.search.costs import CostModel
from merino_edge.search.score import Score
from merino_edge.search.space import Vocabulary

PUBLIC = ("opt-125m", "opt-350m", "gpt2", "pythia-70m", "pythia-160m", "cerebras-gpt-111m", "smollm2-135m")
MAX_STRETCH = 1.5  # largest ratio of a head's elements to those of the nearest measured head


@dataclass(frozen=True)
class Reference:
    """A public model beside a search's results.

    `notes` name the parts that were replaced. If `value` is None, they give the reason.
    """

    name: str
    architecture: Architecture
    score: float
    value: float | None
    notes: tuple[str, ...]


def references(metric: Metric, score: Score, cost_model: CostModel) -> list[Reference]:
    """Every public model with its score and its value of `metric`."""
    models = []
    for name in PUBLIC:
        a = preset(name)
        value, notes = value_of(a, metric, cost_model)
        models.append(Reference(name, a, score.total(a), value, notes))
    return models


def value_of(a: Architecture, metric: Metric, cost_model: CostModel) -> tuple[float | None, tuple[str, ...]]:
    """`metric` of a model that may not be of the table's kind.

    Returns (value, notes on replaced parts), or (None, the reason).
    """
    vocabulary = Vocabulary(a.vocab_size)
    try:
        if cost_model.positions(metric, vocabulary) > a.max_positions:
            return None, (f"it has {a.max_positions} positions",)
        if not metric.kind.latency:
            return cost_model.metric_cost(metric, vocabulary).value(a), ()
        table = cost_model.table
        assert isinstance(table, LatencyTable)
        step = cost_model.step(metric, vocabulary)
        measured = table.measured_cost(a, step)
        return (measured, ()) if measured is not None else _latency(a, step, table)
    except InputError as error:
        return None, (error.message,)


def _latency(a: Architecture, step: Step, table: LatencyTable) -> tuple[float, tuple[str, ...]]:
    """The latency of the nearest model that the table covers, with the head scaled by its size. Raises InputError."""
    near, notes = _nearest(a, step, table)
    vocab_sizes, embedding_widths = table.axes("end", step)[-2:]
    vocab_size = int(min(max(a.vocab_size, vocab_sizes[0]), vocab_sizes[-1]))
    width = int(min(max(a.embedding_width, embedding_widths[0]), embedding_widths[-1]))
    stretch = a.vocab_size * a.embedding_width / (vocab_size * width)
    if not 1 / MAX_STRETCH <= stretch <= MAX_STRETCH:
        raise InputError(f"the table has no head near {a.vocab_size} x {a.embedding_width}")
    if stretch != 1:
        notes = (*notes, f"head {stretch:.2f} times that of {vocab_size} x {width}")
    near = dataclasses.replace(near, vocab_size=vocab_size, embedding_width=width)
    head = table.embedding_and_head_cost(dataclasses.replace(near, blocks=(_as_wide(near, width),)), step)
    return table.model_cost(near, step) + (stretch - 1) * head, notes


def _as_wide(a: Architecture, width: int) -> Block:
    """A block as wide as the embedding, so that no projection stands between them."""
    return Block(width, 1, width // a.head_dim, width // a.head_dim, width)


def _nearest(a: Architecture, step: Step, table: LatencyTable) -> tuple[Architecture, tuple[str, ...]]:
    """`a` with the table's kind of layer. Raises InputError where the head dimension differs."""
    family = table.header["family"]
    if a.head_dim != family["head_dim"]:
        raise InputError(f"the table has heads of {family['head_dim']}, not {a.head_dim}")
    of_table = {**LATER_FAMILY, **family}
    replaced = {name: of_table[name] for name in (*FAMILY, *LATER_FAMILY) if getattr(a, name) != of_table[name]}
    notes = [f"{name} {value}" for name, value in replaced.items()]
    if a.ffn not in table.ffns(step):
        same_gating = [ffn for ffn in table.ffns(step) if (ffn in GATED) == a.gated]
        if not same_gating:
            raise InputError(f"the table has no {'gated' if a.gated else 'ungated'} FFN")
        replaced["ffn"] = same_gating[0]
        notes.append(f"ffn {same_gating[0]}")
    return dataclasses.replace(a, **replaced), tuple(notes)
