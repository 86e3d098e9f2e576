"""The public models beside what a search finds: their own score, and what they cost by the same table.

A table covers one kind of layer, the public models are of several. Where a model differs from what was measured in
parts that hardly cost time (norm, biases, positions, tied head, an ungated activation), the table answers for the
nearest it knows and the answer says what was taken instead. Where it differs in more, there is no answer but a reason.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from merino_edge.architecture import Architecture, Block
from merino_edge.errors import InputError
from merino_edge.latency.step import Step
from merino_edge.latency.table import FAMILY, LatencyTable
from merino_edge.presets import preset
from merino_edge.search.budget import Metric
from merino_edge.search.costs import CostModel
from merino_edge.search.score import Score
from merino_edge.search.space import Vocabulary

PUBLIC = ("opt-125m", "opt-350m", "gpt2", "pythia-70m", "pythia-160m", "cerebras-gpt-111m", "smollm2-135m")
MOST_STRETCH = 1.5  # of a head beyond the measured ones, in elements


@dataclass(frozen=True)
class Reference:
    """A public model in the picture. `value` is None where it cannot be said; `notes` say what was taken instead, or
    why not."""

    name: str
    architecture: Architecture
    score: float
    value: float | None
    notes: tuple[str, ...]


def references(metric: Metric, score: Score, cost_model: CostModel) -> list[Reference]:
    """Every public model with its score and its value of `metric`."""
    found = []
    for name in PUBLIC:
        a = preset(name)
        value, notes = value_of(a, metric, cost_model)
        found.append(Reference(name, a, score.total(a), value, notes))
    return found


def value_of(a: Architecture, metric: Metric, cost_model: CostModel) -> tuple[float | None, tuple[str, ...]]:
    """`metric` of a model that need not be of the table's kind: (value, what was taken instead) or (None, why not)."""
    vocabulary = Vocabulary(a.vocab_size)
    try:
        if cost_model.positions(metric, vocabulary) > a.max_positions:
            return None, (f"it has {a.max_positions} positions",)
        if not metric.kind.latency:
            return cost_model.metric_cost(metric, vocabulary).value(a), ()
        table = cost_model.table
        assert isinstance(table, LatencyTable)
        return _latency(a, cost_model.step(metric, vocabulary), table)
    except InputError as error:
        return None, (error.message,)


def _latency(a: Architecture, step: Step, table: LatencyTable) -> tuple[float, tuple[str, ...]]:
    """The table's answer for the nearest model it covers, the head stretched by its size. Raises InputError."""
    near, notes = _nearest(a, step, table)
    vocab_sizes, embedding_widths = table.axes("end", step)[-2:]
    vocab_size = int(min(max(a.vocab_size, vocab_sizes[0]), vocab_sizes[-1]))
    width = int(min(max(a.embedding_width, embedding_widths[0]), embedding_widths[-1]))
    stretch = a.vocab_size * a.embedding_width / (vocab_size * width)
    if not 1 / MOST_STRETCH <= stretch <= MOST_STRETCH:
        raise InputError(f"the table has no head near {a.vocab_size} x {a.embedding_width}")
    if stretch != 1:
        notes = (*notes, f"head {stretch:.2f} times that of {vocab_size} x {width}")
    near = dataclasses.replace(near, vocab_size=vocab_size, embedding_width=width)
    head = table.embedding_and_head_cost(dataclasses.replace(near, blocks=(_as_wide(near, width),)), step)
    return table.model_cost(near, step) + (stretch - 1) * head, notes


def _as_wide(a: Architecture, width: int) -> Block:
    """A block between which and the embedding there is no projection."""
    return Block(width, 1, width // a.head_dim, width // a.head_dim, width)


def _nearest(a: Architecture, step: Step, table: LatencyTable) -> tuple[Architecture, tuple[str, ...]]:
    """`a` with the table's kind of layer. Raises InputError where heads differ, which every cost depends on."""
    family = table.header["family"]
    if a.head_dim != family["head_dim"]:
        raise InputError(f"the table has heads of {family['head_dim']}, not {a.head_dim}")
    other = {name: family[name] for name in FAMILY if getattr(a, name) != family[name]}
    notes = [f"{name} {value}" for name, value in other.items()]
    if a.ffn not in table.ffns(step):
        alike = [ffn for ffn in table.ffns(step) if (ffn == "swiglu") == a.gated]
        if not alike:
            raise InputError(f"the table has no {'gated' if a.gated else 'ungated'} FFN")
        other["ffn"] = alike[0]
        notes.append(f"ffn {alike[0]}")
    return dataclasses.replace(a, **other), tuple(notes)
