"""The sums of the search equal the whole architecture's counts and the table's whole models, to the last bit."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.formula_table import whole_cost
from helpers.small_spaces import MIXED, SMALL
from merino_edge.counts import PRECISIONS
from merino_edge.errors import InputError
from merino_edge.latency.step import Step
from merino_edge.latency.table import LatencyTable
from merino_edge.search.additive_cost import unit_limit
from merino_edge.search.budget import Budget
from merino_edge.search.builtin_spaces import DEMO, EDGE, PAPER
from merino_edge.search.costs import CostModel
from merino_edge.search.problem import Problem
from merino_edge.search.score import effective
from merino_edge.search.space import Space, Vocabulary

WriteTable = Callable[..., LatencyTable]
COUNTED = ["parameters", "flops", "kv_mb", "kv_mb@64", "peak_mb@64", *(f"weight_mb@{p}" for p in PRECISIONS)]
LATENCIES = ["decode_ms@64", "decode_ms@100", "prefill_ms@128", "text_ms@64", "first_token_ms@100", "energy_mj@64"]


def make_problem(space: Space, keys: list[str], precision: str = "int8", table: LatencyTable | None = None) -> Problem:
    return Problem(space, Budget.of(dict.fromkeys(keys, 1e18)), effective(), CostModel(precision, table))


@pytest.mark.parametrize("space", [PAPER, replace(PAPER, shared=(False,)), DEMO, EDGE, MIXED])
def test_sums_equal_the_whole_architectures_counts(space: Space) -> None:
    problem, rng = make_problem(space, COUNTED), random.Random(0)
    for _ in range(50):
        candidate = space.sample(rng)
        a, (program,) = space.architecture(candidate), problem.programs(candidate.template)
        units_of = program.units(candidate.choices, [space.width_of[choice] for choice in candidate.choices])
        for units, scale, key in zip(units_of, program.scales, COUNTED, strict=True):
            half_a_byte = 0.5 / scale if key.startswith(("weight", "peak")) else 0.0  # weight_bytes() is rounded
            assert abs(units / scale - whole_cost(key, a, None, None)) <= half_a_byte


def test_sums_equal_the_tables_whole_models_exactly(write_table: WriteTable) -> None:
    table = write_table(MIXED, "int8", energy=True)
    problem, rng = make_problem(MIXED, LATENCIES, table=table), random.Random(0)
    for _ in range(50):
        candidate = MIXED.sample(rng)
        a, (program,) = MIXED.architecture(candidate), problem.programs(candidate.template)
        per_token = MIXED.templates[candidate.template].vocabulary.bytes_per_token
        units_of = program.units(candidate.choices, [MIXED.width_of[choice] for choice in candidate.choices])
        for units, scale, metric in zip(units_of, program.scales, problem.budget.metrics, strict=True):
            value = whole_cost(metric.key, a, table, per_token)
            assert problem.value(metric, candidate) == pytest.approx(value, rel=1e-14)
            assert units / scale == problem.value(metric, candidate)


@pytest.mark.parametrize(("seed", "cache_buckets"), [(0, None), (1, 0), (2, 64), (3, None), (4, 0), (5, 64)])
def test_a_piecewise_step_time_is_the_minimum_over_programs_of_the_maximum_sum(
    write_piecewise: WriteTable, seed: int, cache_buckets: int | None
) -> None:
    table = write_piecewise(MIXED, "int8", seed=seed, cache_buckets=cache_buckets)
    problem, rng = make_problem(MIXED, ["decode_ms@64", "parameters", "text_ms@100"], table=table), random.Random(seed)
    checked = 0
    for _ in range(50):
        candidate = MIXED.sample(rng)
        a, programs = MIXED.architecture(candidate), problem.programs(candidate.template)
        widths = [MIXED.width_of[choice] for choice in candidate.choices]
        found = []
        for program in programs:
            values = program.units(candidate.choices, widths) / program.scales
            found.append([values[np.array(program.metrics) == k].max() for k in range(3)])
        costs = [problem.value(metric, candidate) for metric in problem.budget.metrics]
        assert np.min(found, axis=0).tolist() == costs
        assert costs[0] == table.model_cost(a, Step("decode", 64))
        if min(costs) <= 0:  # a piece's constant may make a small model's time negative, which no budget allows
            continue
        checked += 1
        for values, within in ((costs, True), ([math.nextafter(costs[0], 0), *costs[1:]], False)):
            limits = {metric.key: value for metric, value in zip(problem.budget.metrics, values, strict=True)}
            assert problem.limited(Budget.of(limits)).feasible(candidate) is within
    assert checked >= 10


@given(st.floats(1e-3, 1e12), st.sampled_from([1.0, 1e6, 0.04173, 3.0]))
@settings(max_examples=200)
def test_a_limit_in_units_admits_exactly_what_the_limit_does(limit: float, scale: float) -> None:
    units = unit_limit(limit, scale)
    assert units / scale <= limit < math.nextafter(units, math.inf) / scale


def test_what_a_metric_is_at_when_nobody_says(write_table: WriteTable) -> None:
    table = write_table(MIXED, "int4")
    names = ["decode_ms", "first_token_ms", "weight_mb", "kv_mb", "peak_mb", "parameters"]
    resolved = make_problem(MIXED, names, "int4", table).budget.metrics
    keys = ["decode_ms@64", "first_token_ms@164", "weight_mb@int4", "kv_mb", "peak_mb@64", "parameters"]
    assert [metric.key for metric in resolved] == keys
    assert make_problem(MIXED, ["peak_mb"]).budget.metrics[0].at == 128  # 256, but the shortest context has 128


def test_a_budget_at_a_length_asks_for_a_model_of_such_a_context() -> None:
    contexts = [MIXED.templates[template].context for template in make_problem(MIXED, ["kv_mb@200"]).templates]
    assert set(contexts) == {256} and set(MIXED.contexts) == {128, 256}
    with pytest.raises(InputError, match=r"kv_mb@300 needs 300 positions, but space mixed has contexts up to 256"):
        make_problem(MIXED, ["kv_mb@300"])


def test_a_prompt_of_text_must_fit_the_context(write_table: WriteTable) -> None:
    """300 bytes are 117 tokens of the smaller vocabulary and 90 of the larger, 400 are 156 and 120."""
    table = write_table(MIXED, "int8")
    for prompt_bytes, smallest in ((300, {1024: 128, 4096: 128}), (400, {1024: 256, 4096: 128})):
        templates = [
            MIXED.templates[i] for i in make_problem(MIXED, [f"first_token_ms@{prompt_bytes}"], table=table).templates
        ]
        assert {size: min(f.context for f in templates if f.vocabulary.size == size) for size in smallest} == smallest


def test_latencies_need_a_table_of_the_same_precision_and_kind(write_table: WriteTable) -> None:
    with pytest.raises(InputError, match="--prefill-ms needs a latency table; run: merino-edge profile"):
        make_problem(SMALL, ["prefill_ms"])
    table = write_table(SMALL)
    with pytest.raises(InputError, match=r"was measured in fp32, not int4; measure it in int4"):
        CostModel("int4", table)
    with pytest.raises(InputError, match="was measured with head_dim 32, not 64"):
        make_problem(PAPER, ["decode_ms"], "fp32", table)
    with pytest.raises(InputError, match="no precision 'fp64'"):
        CostModel("fp64")
    with pytest.raises(InputError, match=r"energy of decode of layer .swiglu. .no measurement"):
        make_problem(SMALL, ["energy_mj"], "fp32", table)


@pytest.mark.parametrize(
    ("change", "key", "gap"),
    [
        ({"ffn_ratios": (1, 5)}, "decode_ms", "decode of layer (swiglu): ffn_width / width 1 to 5 (measured 1 to 4)"),
        ({"widths": (64, 512)}, "decode_ms", "decode of layer (swiglu): width 64 to 512 (measured 64 to 256)"),
        ({"ffn": ("relu",)}, "decode_ms", "decode of layer (relu) (no measurement)"),
        ({"contexts": (512,)}, "prefill_ms@512", "prefill of layer (swiglu): length 512 (measured 16 to 256)"),
        ({"embedding_widths": (128,)}, "decode_ms", "decode of end: embedding_width 128 (measured 256)"),
        ({"vocabularies": (Vocabulary(5000),)}, "decode_ms", "decode of end: vocab_size 5000 (measured 4096)"),
        ({"kv_groups": (1, 2, 4), "widths": (128, 256)}, "decode_ms", None),  # measured at both ends
    ],
)
def test_what_a_table_lacks_is_named_with_the_command_that_adds_it(
    write_table: WriteTable, change: dict[str, object], key: str, gap: str | None
) -> None:
    table, space = write_table(SMALL), replace(SMALL, **change)  # type: ignore[arg-type]
    if gap is None:
        make_problem(space, [key], "fp32", table)
        return
    with pytest.raises(InputError) as caught:
        make_problem(space, [key], "fp32", table)
    message, length = str(caught.value), key.partition("@")[2] or "64"
    assert gap in message and "\n" not in message
    command = f"merino-edge profile --continue --space small --lengths {length} --out {table.path}"
    assert message.endswith(f"add it: {command}")


@pytest.mark.parametrize(("at", "gap"), [("100", "decode of layer (swiglu, window 64) (no measurement)"), ("64", "")])
def test_a_table_must_know_the_windows_that_hide_a_position(write_table: WriteTable, at: str, gap: str) -> None:
    table, space = write_table(SMALL), replace(SMALL, windows=(0, 64), contexts=(256,))
    if gap:
        with pytest.raises(InputError, match=re.escape(gap)):
            make_problem(space, [f"decode_ms@{at}"], "fp32", table)
    make_problem(space, [f"decode_ms@{at}"], "fp32", write_table(space) if gap else table)


def test_a_window_costs_less_of_the_cache_only_where_the_target_gives_it_back() -> None:
    space, key = replace(SMALL, windows=(0, 32), contexts=(1024,)), "kv_mb"
    kept = {"onnxruntime": 32 + 128, "onnxruntime-cuda": 1024, "jetpack-6.2": 1024, None: 1024}
    for target, positions in kept.items():
        problem = Problem(space, Budget.of({key: 1e9}), effective(), CostModel("fp16", None, target))
        of_window = [i for i, block in enumerate(space.block_choices) if block.window]
        block = space.block_choices[of_window[0]]
        element = 4 if target == "onnxruntime" else 2
        cost = problem.programs(0)[0].block_costs[of_window[0], 0]
        assert cost == 2 * block.layers * block.kv_heads * space.model.head_dim * positions * element


def test_a_table_must_cover_the_cache_positions_that_a_step_reads(write_table: WriteTable) -> None:
    table, space = write_table(SMALL, cache_buckets=256), replace(SMALL, contexts=(1024,))
    make_problem(space, ["decode_ms@200"], "fp32", table)
    lacking = r"decode of layer .swiglu.: length 512 .measured 16 to 256.; add it: .* --lengths 512 "
    with pytest.raises(InputError, match=lacking):
        make_problem(space, ["decode_ms@300"], "fp32", table)
    make_problem(replace(SMALL, contexts=(256,)), ["decode_ms@200"], "fp32", write_table(SMALL, cache_buckets=0))
    with pytest.raises(InputError, match=r"length 1024 .* --lengths 1024 "):
        make_problem(space, ["decode_ms@200"], "fp32", write_table(SMALL, cache_buckets=0))


def test_every_piece_must_be_covered(write_piecewise: WriteTable) -> None:
    whole = write_piecewise(SMALL)
    measured = [m for m in whole.measurements if m.cache == "warm" or m.shape["width"] < 256]
    table = replace(whole, lines=measured)
    with pytest.raises(
        InputError, match=r"space small: decode of layer .swiglu.: width 64 to 256 .measured 64 to 128.; add"
    ):
        make_problem(SMALL, ["decode_ms"], "fp32", table)
    make_problem(replace(SMALL, widths=(64, 128)), ["decode_ms"], "fp32", table)


def test_of_lengths_that_a_table_lacks_the_outer_ones_are_enough(write_table: WriteTable) -> None:
    vocabularies = (Vocabulary(1024, 2.0), Vocabulary(2048, 2.5), Vocabulary(4096, 4.0))
    space = replace(SMALL, vocabularies=vocabularies, contexts=(1024,))
    with pytest.raises(InputError, match=r"--lengths 500,1000 "):  # and 800
        make_problem(space, ["first_token_ms@2000"], "fp32", write_table(SMALL))


def test_a_table_without_a_phase_is_refused_where_that_is_budgeted(write_table: WriteTable) -> None:
    whole = write_table(SMALL)
    decode = [m for m in whole.measurements if m.mode == "decode"]
    table = LatencyTable(whole.path, whole.header, decode, {}, "")
    with pytest.raises(InputError, match=r"prefill of layer .swiglu. .no measurement.*profile --continue"):
        make_problem(SMALL, ["prefill_ms"], "fp32", table)
    problem = make_problem(SMALL, ["decode_ms"], "fp32", table)
    costs = problem.costs(SMALL.sample(random.Random(0)))
    assert "decode_ms@64" in costs and not any(key.startswith("prefill") for key in costs)


def test_text_needs_to_know_how_long_a_token_is(write_table: WriteTable) -> None:
    silent = replace(SMALL, vocabularies=(Vocabulary(4096),))
    for key in ("text_ms", "first_token_ms"):
        with pytest.raises(InputError, match=r"bytes a token of 4096 stands for; add bytes_per_token"):
            make_problem(silent, [key], "fp32", write_table(silent))
