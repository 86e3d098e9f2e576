"""The plan's arithmetic, with a formula in place of a clock: the table must find the formula again."""

from __future__ import annotations

import dataclasses
import itertools
import random
from pathlib import Path

import pytest

from merino_edge import counts
from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.jetson.profiler.plan import CALIBRATION, HELD_OUT, LADDER, QUICK_HELD_OUT, Axes, Plan, make_plan, thin
from merino_edge.jetson.profiler.probe import TINY_VOCAB
from merino_edge.jetson.profiler.validation import fit_step_time, validate
from merino_edge.latency.measurement import MODES, WHOLE, Measurement, entry_key
from merino_edge.latency.step import Step
from merino_edge.latency.step_time import COLD, single
from merino_edge.latency.table import LatencyTable, family
from merino_edge.search.builtin_spaces import DEMO, EDGE, PAPER
from merino_edge.search.space import Candidate, Space

LARGE_CACHE = 64 * 2**20


def cache_capacity(positions: int, context: int) -> int:
    return min(256 if positions <= 256 else 512 if positions <= 512 else 1024, context)


def law_ms(a: Architecture, mode: str, length: int, cache: str = "warm") -> float:
    """An additive device: with cold caches weights cost twice, but not what further layers of a shared block find."""
    tokens = 1 if mode == "decode" else length
    attended = cache_capacity(length, a.max_positions) if mode == "decode" else length
    slow = 2.0 if cache == "cold" else 1.0
    widths = [a.embedding_width, *(b.width for b in a.blocks)]
    total = 3.0 + slow * a.vocab_size * a.embedding_width * 1e-9
    total += sum(0.01 + slow * x * y * 1e-6 * tokens for x, y in itertools.pairwise(widths) if x != y)
    if widths[-1] != a.embedding_width:
        total += 0.01 + slow * widths[-1] * a.embedding_width * 1e-6  # one token leaves
    for b in a.blocks:
        matrices = 3 if a.gated else 2
        # linear in the key-value heads at one width; between widths only the share of them counts
        share = (b.kv_heads - 1) / (b.heads - 1) if b.heads > 1 else 1.0
        weights = b.width**2 * (3 + share) * 1e-6 + b.width * b.ffn_width * matrices * 1e-6
        attention = 0.02 + tokens * min(attended, b.window or attended) * 1e-5 * (1 + share)
        first, further = (slow if b.shared or cache == "cold" else 1.0), 1.0
        if not b.shared or mode == "prefill":
            further = first
        total += b.layers * attention + tokens * weights * (first + (b.layers - 1) * further)
    return total


def measured(plan: Plan) -> list[Measurement]:
    return [
        Measurement(
            p.what, p.mode, p.length, p.shape,
            (p.cost([law_ms(a, p.mode, p.length, p.cache) for a in p.models]),), None, p.cache,
        )
        for p in plan.probes
    ]  # fmt: skip


def table_of(space: Space, **options: object) -> LatencyTable:
    plan = make_plan(space, "fp16", cache_capacity=cache_capacity, **options)  # type: ignore[arg-type]
    header = {"family": family(space.models[0]), "precision": "fp16", "cache_buckets": 256, **plan.grid}
    return LatencyTable(Path("t"), header, measured(plan), {}, "")


# Every width, embedding and vocabulary of it is on the grid.
OPEN = dataclasses.replace(
    EDGE,
    name="open",
    widths=EDGE.widths[::2],
    embedding_widths=(256, 512, 768),
    vocabularies=EDGE.vocabularies[::2],
    kv_groups=(1, 2, 4),
)
UNSHARED = dataclasses.replace(OPEN, name="unshared", shared=(False,))
WINDOWED = dataclasses.replace(OPEN, name="windowed", windows=(0, 100, 4096))
SPACES = [PAPER, DEMO, dataclasses.replace(DEMO, shared=(True,)), OPEN, WINDOWED]


@pytest.mark.parametrize("eviction_head_bytes", [0, 2**20])
@pytest.mark.parametrize("space", SPACES, ids=["paper", "demo", "shared", "open", "windowed"])
def test_an_additive_device_is_predicted_exactly(space: Space, eviction_head_bytes: int) -> None:
    """From a star of entries. Left over are the tiny vocabulary's own head in a width change, and the one token that
    leaves by the way out in a prefill's."""
    table, rng = table_of(space, eviction_head_bytes=eviction_head_bytes), random.Random(5)
    for _ in range(20):
        a = space.architecture(space.sample(rng))
        for mode, length in (("decode", 256), ("prefill", 256), ("decode", 700), ("prefill", space.contexts[0] // 8)):
            length = min(length, space.contexts[0])
            changes, widest = len(a.blocks) + 1, max(*space.widths, a.embedding_width)
            slack = changes * 8 * widest * 1e-9 + (changes * (0.01 + widest**2 * 1e-6) if mode == "prefill" else 0)
            assert table.model_cost(a, Step(mode, length)) == pytest.approx(
                law_ms(a, mode, length), abs=slack, rel=1e-8
            )


def test_cold_entries_predict_a_cold_device() -> None:
    table = dataclasses.replace(table_of(UNSHARED, cache_bytes=LARGE_CACHE), step_time=single(COLD))
    assert {m.cache for m in table.measurements if m.what == "layer" and m.mode == "decode"} == {"warm", "cold"}
    rng = random.Random(3)
    for _ in range(10):
        a = UNSHARED.architecture(UNSHARED.sample(rng))
        expected = law_ms(a, "decode", 256, "cold")
        assert table.model_ms(a, "decode") == pytest.approx(expected, rel=1e-4)


def test_calibration_finds_which_caches_the_models_meet() -> None:
    """The law's whole models are timed warm here, so the step_time must say so."""
    table = table_of(UNSHARED, cache_bytes=LARGE_CACHE)
    for measured in (table, table_of(UNSHARED)):
        step_time = fit_step_time(measured)
        assert step_time is not None
        figures = validate(dataclasses.replace(measured, step_time=step_time))
        assert figures["decode"]["models"] == HELD_OUT and figures["decode"]["mape_percent"] < 0.1
    calibrations = [m for m in table.measurements if m.what == "calibration"]
    held_out = {m.key for m in table.measurements if m.what == "model"}
    assert len(calibrations) == CALIBRATION and not held_out & {m.key for m in calibrations}


def test_warm_layers_are_timed_beside_a_head_that_every_model_has() -> None:
    for eviction_head_bytes in (0, 2**20, 2**30):
        plan = make_plan(EDGE, "int4", cache_bytes=2**25, eviction_head_bytes=eviction_head_bytes)
        smallest = min(counts.table_bytes(a, "int4") for a in EDGE.models)
        for probe in (p for p in plan.probes if p.what in ("layer", "repeat")):
            least, deeper = probe.models
            assert least.vocab_size == deeper.vocab_size
            head = counts.table_bytes(least, "int4")
            if probe.mode == "prefill" or probe.cache == "cold" or eviction_head_bytes == 0:
                assert least.vocab_size == TINY_VOCAB
            else:
                assert head == pytest.approx(min(eviction_head_bytes, smallest), abs=least.embedding_width)


def test_caches_are_swept_only_where_models_may_not_fit() -> None:
    def caches(space: Space, cache_bytes: int) -> tuple[str, ...]:
        return make_plan(space, "fp32", cache_bytes=cache_bytes).axes.caches

    assert caches(DEMO, 2**33) == ("warm",) == caches(EDGE, 0)  # 0: this backend's caches cannot be swept
    assert caches(PAPER, 2**25) == ("cold",) and caches(EDGE, LARGE_CACHE) == ("cold", "warm")


@pytest.mark.parametrize("detail", LADDER)
def test_a_plan_covers_its_whole_space_however_coarse(detail: object) -> None:
    for space in (PAPER, DEMO, EDGE):
        table = table_of(space, quick=True, detail=detail)
        for frame, gene in itertools.product(range(len(space.templates)), (0, len(space.block_choices) - 1)):
            a = space.architecture(Candidate(frame, (gene,) * space.blocks[-1]))
            assert table.model_ms(a, "decode") > 0 and table.model_ms(a, "prefill") > 0
        assert {figures["models"] for figures in validate(table).values()} == {QUICK_HELD_OUT}


def test_the_star_is_far_smaller_than_every_combination() -> None:
    plan = make_plan(EDGE, "int4", cache_capacity=cache_capacity, cache_bytes=2**25)
    axes = plan.axes
    layers = [p for p in plan.probes if p.what in ("layer", "repeat") and p.mode == "decode"]
    every = len(axes.ffn) * len(axes.widths) * len(axes.ffn_ratios) * len(axes.one_kv_head) * len(axes.repeats)
    assert len(layers) < 0.6 * every * len(axes.capacities) * len(axes.caches)
    assert len({p.key for p in plan.probes}) == len(plan.probes)


def test_layers_with_a_window_are_measured_with_the_references_ffn_alone() -> None:
    plain, windowed = (make_plan(space, "int4", cache_capacity=cache_capacity) for space in (OPEN, WINDOWED))
    probes = {p.key: p for p in windowed.probes}
    more = [p for p in windowed.probes if "window" in p.shape]
    parts = {p.key for p in plain.probes if p.what not in WHOLE}
    assert parts == {p.key for p in windowed.probes if p.what not in WHOLE} - {p.key for p in more}
    assert {p.shape["window"] for p in more} == {100} and {p.shape["ffn"] for p in more} == {plain.reference["ffn"]}
    for probe in more:
        without = {name: value for name, value in probe.shape.items() if name != "window"}
        assert entry_key(probe.what, probe.mode, probe.length, without, probe.cache) in probes
        assert {block.window for a in probe.models for block in a.blocks} == {100}
    assert "windows" not in plain.grid and Axes.from_header(plain.grid) == plain.axes
    assert windowed.grid["windows"] == [100] and Axes.from_header(windowed.grid) == windowed.axes


def test_held_out_models_are_the_same_every_time_and_some_lie_between_lengths() -> None:
    first, second = (make_plan(DEMO, "fp32", quick=True) for _ in range(2))
    assert first == second
    models = [p for p in first.probes if p.what == "model" and p.mode == "decode"]
    assert len({p.models[0].id for p in models}) == QUICK_HELD_OUT
    assert any(p.length not in first.axes.lengths for p in models)


def test_a_plan_that_extends_a_table_keeps_the_grid_whole() -> None:
    """What was measured stays useful, and every combination of old and new is covered."""
    begun = make_plan(DEMO, "fp32", quick=True)
    wider = dataclasses.replace(DEMO, name="wider", widths=(128, 192, 256, 384), ffn=("relu", "swiglu"))
    extended = make_plan(wider, "fp32", quick=True, lengths=[200], begun=begun.grid)
    assert extended.axes.lengths == (64, 200, 256) and extended.axes.widths == (128, 192, 256, 384)
    assert (extended.default_length, extended.reference) == (begun.default_length, begun.reference)
    kinds = ("layer", "repeat", "width_change", "end")
    old, new = ({p.key for p in plan.probes if p.what in kinds} for plan in (begun, extended))
    assert old < new
    header = {"family": family(DEMO.models[0]), **extended.grid}
    table = LatencyTable(Path("t"), header, measured(extended), {}, "")
    assert make_plan(DEMO, "fp32", quick=True, begun=begun.grid).axes == begun.axes  # nothing to add
    rng = random.Random(2)
    for _ in range(10):
        a = wider.architecture(wider.sample(rng))
        assert all(table.model_ms(a, mode) > 0 for mode in MODES)


def test_lengths_may_be_chosen_within_the_positions() -> None:
    assert make_plan(DEMO, "fp32", quick=True, lengths=[8, 250, 8]).axes.lengths == (8, 250)
    for lengths in ([0, 8], [257]):
        with pytest.raises(InputError, match="are not within the space's 256 positions"):
            make_plan(DEMO, "fp32", quick=True, lengths=lengths)
    with pytest.raises(InputError, match="begun by an older version"):
        make_plan(DEMO, "fp32", quick=True, begun={"lengths": [64]})


def test_decode_is_measured_at_the_capacities_that_steps_read() -> None:
    axes = make_plan(EDGE, "fp32", cache_capacity=cache_capacity).axes
    assert axes.lengths == (64, 136, 264, 520, 1024) and axes.capacities == (256, 512, 1024)
    assert Axes.from_header(axes.to_dict()) == axes


def test_thin_keeps_the_ends() -> None:
    assert thin([1, 2, 3, 4, 5], 3) == (1, 3, 5)
    assert thin([1, 2], 3) == (1, 2)
    assert thin([1, 2], 1) == (2,)


def test_an_embedding_that_no_block_can_have_is_refused() -> None:
    space = dataclasses.replace(DEMO, embedding_widths=(250,))
    with pytest.raises(InputError, match="embedding_width 250"):
        make_plan(space, "fp32", quick=True)
