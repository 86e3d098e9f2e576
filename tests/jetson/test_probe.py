"""The plan's arithmetic, with a formula in place of a clock: the table must find the formula again."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import pytest

from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.jetson.probe import HELD_OUT_MODELS, make_plan, thin
from merino_edge.jetson.validation import validate
from merino_edge.latency_table import MODES, LatencyTable, Measurement, family
from merino_edge.search.space import DEMO, PAPER, Space


def law_ms(a: Architecture, mode: str, length: int) -> float:
    """An additive device: the first layer of a shared block streams its weights, further ones find them cached."""
    tokens = 1 if mode == "decode" else length
    widths = [a.embedding_width, *(b.width for b in a.blocks)]
    total = 3.0 + a.vocab_size * a.embedding_width * 1e-9
    total += sum(0.01 + x * y * 1e-6 * tokens for x, y in itertools.pairwise(widths) if x != y)
    if widths[-1] != a.embedding_width:
        total += 0.01 + widths[-1] * a.embedding_width * 1e-6  # one token leaves
    for b in a.blocks:
        layer = 0.02 + tokens * (b.width**2 * 4e-6 + b.width * b.ffn_width * 2e-6 + length * 1e-5)
        total += layer + (b.layers - 1) * layer * (0.6 if b.shared else 1.0)
    return total


def table_of(space: Space, quick: bool) -> LatencyTable:
    measured = []
    for probe in make_plan(space, "fp16", quick).probes:
        times = {mode: [law_ms(a, mode, probe.length) for a in probe.models] for mode in MODES}
        for mode in MODES:
            measured.append(Measurement(probe.what, mode, probe.length, probe.shape, (probe.cost_ms(mode, times),)))
    return LatencyTable(Path("t"), {"family": family(space.model), "default_length": 256}, measured, {}, "")


@pytest.mark.parametrize(
    "space", [PAPER, DEMO, dataclasses.replace(DEMO, shared=True)], ids=["paper", "demo", "shared"]
)
def test_an_additive_device_is_predicted_exactly(space: Space) -> None:
    """With every width on the grid. The tiny vocabulary's own head is the only thing left in a width change."""
    table, rng = table_of(space, quick=False), random.Random(5)
    for _ in range(20):
        a = space.architecture(space.sample(rng))
        for mode, length in (("decode", 256), ("prefill", 256), ("decode", space.model.max_positions // 8)):
            slack = 4 * 2 * max(*space.widths, a.embedding_width) * 1e-9  # 4 changes, 2 tokens, head of the law
            assert table.model_ms(a, mode, length) == pytest.approx(law_ms(a, mode, length), abs=slack, rel=1e-9)


@pytest.mark.parametrize("quick", [False, True])
def test_a_plan_covers_its_whole_space(quick: bool) -> None:
    for space in (PAPER, DEMO):
        table = table_of(space, quick)
        for gene in (0, len(space.genes) - 1):
            a = space.architecture((gene,) * space.blocks)
            assert table.model_ms(a, "decode") > 0
        assert {figures["models"] for figures in validate(table).values()} == {HELD_OUT_MODELS}


def test_held_out_models_are_the_same_every_time_and_some_lie_between_lengths() -> None:
    first, second = (make_plan(DEMO, "fp32", quick=True) for _ in range(2))
    assert first == second
    models = [p for p in first.probes if p.what == "model"]
    assert len({p.models[0].id for p in models}) == HELD_OUT_MODELS
    assert any(p.length not in first.grid["lengths"] for p in models)


def test_thin_keeps_the_ends() -> None:
    assert thin([1, 2, 3, 4, 5], 3) == (1, 3, 5)
    assert thin([1, 2], 3) == (1, 2)


def test_an_embedding_that_no_block_can_have_is_refused() -> None:
    space = dataclasses.replace(DEMO, model=dataclasses.replace(DEMO.model, embedding_width=250))
    with pytest.raises(InputError, match="embedding_width 250"):
        make_plan(space, "fp32", quick=True)
