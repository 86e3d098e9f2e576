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
from merino_edge.latency_table import LatencyTable, Step, family
from merino_edge.measurement import MODES, Measurement
from merino_edge.search.space import Genome, Space
from merino_edge.search.spaces import DEMO, EDGE, PAPER


def law_ms(a: Architecture, mode: str, length: int) -> float:
    """An additive device: the first layer of a shared block streams its weights, further ones find them cached."""
    tokens = 1 if mode == "decode" else length
    widths = [a.embedding_width, *(b.width for b in a.blocks)]
    total = 3.0 + a.vocab_size * a.embedding_width * 1e-9
    total += sum(0.01 + x * y * 1e-6 * tokens for x, y in itertools.pairwise(widths) if x != y)
    if widths[-1] != a.embedding_width:
        total += 0.01 + widths[-1] * a.embedding_width * 1e-6  # one token leaves
    for b in a.blocks:
        matrices = 3 if a.gated else 2
        # linear in the key-value heads at one width; between widths only the share of them counts
        share = (b.kv_heads - 1) / (b.heads - 1) if b.heads > 1 else 1.0
        layer = 0.02 + tokens * (b.width**2 * (3 + share) * 1e-6 + b.width * b.ffn_width * matrices * 1e-6)
        layer += tokens * length * 1e-5 * (1 + share)
        total += layer + (b.layers - 1) * layer * (0.6 if b.shared else 1.0)
    return total


def table_of(space: Space, quick: bool, lengths: list[int] | None = None) -> LatencyTable:
    plan, measured = make_plan(space, "fp16", quick, lengths), []
    for probe in plan.probes:
        times = {mode: [law_ms(a, mode, probe.length) for a in probe.models] for mode in MODES}
        for mode in MODES:
            measured.append(Measurement(probe.what, mode, probe.length, probe.shape, (probe.cost_ms(mode, times),)))
    header = {"family": family(space.models[0]), "default_length": plan.default_length}
    return LatencyTable(Path("t"), header, measured, {}, "")


# Every width, embedding and vocabulary of it is on the grid.
OPEN = dataclasses.replace(
    EDGE,
    name="open",
    widths=EDGE.widths[::2],
    embedding_widths=(256, 512, 768),
    vocabularies=EDGE.vocabularies[::2],
    kv_groups=(1, 2, 4),
)


@pytest.mark.parametrize(
    "space", [PAPER, DEMO, dataclasses.replace(DEMO, shared=(True,)), OPEN], ids=["paper", "demo", "shared", "open"]
)
def test_an_additive_device_is_predicted_exactly(space: Space) -> None:
    """The tiny vocabulary's own head is the only thing left in a width change."""
    table, rng = table_of(space, quick=False), random.Random(5)
    for _ in range(20):
        a = space.architecture(space.sample(rng))
        for mode, length in (("decode", 256), ("prefill", 256), ("decode", space.contexts[0] // 8)):
            changes = len(a.blocks) + 1
            slack = changes * 2 * 2 * max(*space.widths, a.embedding_width) * 1e-9  # two tokens, head of the law
            expected = law_ms(a, mode, length)
            assert table.model_cost(a, Step(mode, length)) == pytest.approx(expected, abs=slack, rel=1e-8)


@pytest.mark.parametrize("quick", [False, True])
def test_a_plan_covers_its_whole_space(quick: bool) -> None:
    for space in (PAPER, DEMO, EDGE):
        table = table_of(space, quick)
        for frame, gene in itertools.product(range(len(space.frames)), (0, len(space.genes) - 1)):
            a = space.architecture(Genome(frame, (gene,) * space.blocks[-1]))
            assert table.model_ms(a, "decode") > 0
        assert {figures["models"] for figures in validate(table).values()} == {HELD_OUT_MODELS}


def test_held_out_models_are_the_same_every_time_and_some_lie_between_lengths() -> None:
    first, second = (make_plan(DEMO, "fp32", quick=True) for _ in range(2))
    assert first == second
    models = [p for p in first.probes if p.what == "model"]
    assert len({p.models[0].id for p in models}) == HELD_OUT_MODELS
    assert any(p.length not in first.axes.lengths for p in models)


def test_a_plan_that_extends_a_table_keeps_the_grid_whole() -> None:
    """What was measured stays useful, and every combination of old and new is covered."""
    begun = make_plan(DEMO, "fp32", quick=True)
    wider = dataclasses.replace(DEMO, name="wider", widths=(128, 192, 256, 384), ffn=("relu", "swiglu"))
    extended = make_plan(wider, "fp32", True, lengths=[200], begun=begun.grid)
    assert extended.axes.lengths == (64, 200, 256) and extended.axes.widths == (128, 192, 256, 384)
    assert extended.default_length == begun.default_length
    kinds = ("layer", "repeat", "width_change", "end")
    old, new = (
        {(p.what, p.length, *p.shape.values()) for p in plan.probes if p.what in kinds} for plan in (begun, extended)
    )
    assert old < new
    table = table_of(wider, True)
    assert make_plan(DEMO, "fp32", True, begun=begun.grid).axes == begun.axes  # nothing to add
    assert table.model_ms(wider.architecture(Genome(0, (0, 0, 0))), "decode") > 0


def test_lengths_may_be_chosen_within_the_positions() -> None:
    assert make_plan(DEMO, "fp32", True, [8, 250, 8]).axes.lengths == (8, 250)
    for lengths in ([0, 8], [257]):
        with pytest.raises(InputError, match="are not within the space's 256 positions"):
            make_plan(DEMO, "fp32", True, lengths)
    with pytest.raises(InputError, match="begun by an older version"):
        make_plan(DEMO, "fp32", True, begun={"lengths": [64]})


def test_thin_keeps_the_ends() -> None:
    assert thin([1, 2, 3, 4, 5], 3) == (1, 3, 5)
    assert thin([1, 2], 3) == (1, 2)


def test_an_embedding_that_no_block_can_have_is_refused() -> None:
    space = dataclasses.replace(DEMO, embedding_widths=(250,))
    with pytest.raises(InputError, match="embedding_width 250"):
        make_plan(space, "fp32", quick=True)
