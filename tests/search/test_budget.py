from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge.counts import PRECISIONS
from merino_edge.errors import BudgetError, InputError
from merino_edge.latency_table import LatencyTable
from merino_edge.search.budget import Budget, cheapest_genomes, cost_tables, parse_quantity, spell_quantity
from merino_edge.search.space import DEMO, PAPER, Space

SMALL = replace(DEMO, name="small", widths=(64, 128, 192, 256), ffn_ratios=(1, 4), layers=(1, 3))
WriteTable = Callable[..., LatencyTable]


@pytest.mark.parametrize(
    ("text", "value"), [("5", 5), ("0.5", 0.5), ("60M", 6e7), ("1.5g", 1.5e9), (" 2K ", 2000), ("1e3", 1e3)]
)
def test_quantities_are_read(text: str, value: float) -> None:
    assert parse_quantity(text) == value


@pytest.mark.parametrize("text", ["", "M", "-5", "0", "nan", "inf", "1e999", "5 ms", "60MM", "1,5"])
def test_other_quantities_are_refused(text: str) -> None:
    with pytest.raises(InputError, match="--params"):
        parse_quantity(text, "--params")


@given(st.floats(1e-6, 1e15))
def test_a_spelled_quantity_is_the_least_of_four_digits(value: float) -> None:
    spelled = parse_quantity(spell_quantity(value))
    assert value * (1 - 1e-12) <= spelled <= value * 1.0011


@pytest.mark.parametrize("limit", [0.0, -1.0, math.nan, math.inf])
def test_a_budget_must_be_positive(limit: float) -> None:
    with pytest.raises(InputError, match="--decode-ms"):
        Budget(decode_ms=limit)


@pytest.mark.parametrize("space", [PAPER, replace(PAPER, shared=False), DEMO])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_sums_equal_the_whole_architectures_counts(space: Space, precision: str) -> None:
    tables, rng = cost_tables(space, precision), random.Random(0)
    for _ in range(50):
        genome = space.sample(rng)
        a, widths = space.architecture(genome), space.width_indices(genome)
        assert tables["parameters"].total(genome, widths) == a.parameters
        assert tables["flops"].total(genome, widths) == a.flops()
        assert round(tables["weight_mb"].total(genome, widths) * 1e6) == a.weight_bytes(precision)


def test_sums_equal_the_tables_whole_models(write_table: WriteTable) -> None:
    space = replace(DEMO, shared=True)
    latencies = write_table(space)
    tables, rng = cost_tables(space, "fp32", latencies), random.Random(0)
    for _ in range(50):
        genome = space.sample(rng)
        for mode in ("decode", "prefill"):
            total = tables[f"{mode}_ms"].total(genome, space.width_indices(genome))
            assert total == pytest.approx(latencies.model_ms(space.architecture(genome), mode), rel=1e-12)


@settings(max_examples=4, deadline=None)
@given(
    st.sampled_from([SMALL, replace(SMALL, blocks=1), replace(SMALL, blocks=4, shared=True)]),
    st.sampled_from(PRECISIONS),
)
def test_the_cheapest_is_the_minimum_over_the_space(space: Space, precision: str) -> None:
    for table in cost_tables(space, precision).values():
        cheapest = table.cheapest(space)
        space.architecture(cheapest)
        least = min(table.total(genome, space.width_indices(genome)) for genome in space.genomes())
        assert table.total(cheapest, space.width_indices(cheapest)) == least


def test_the_cheapest_may_be_wide_where_width_changes_are_dear(write_table: WriteTable) -> None:
    tables = cost_tables(SMALL, "fp32", write_table(SMALL, change_ms=5.0))
    cheapest = SMALL.architecture(tables["decode_ms"].cheapest(SMALL))
    assert {block.width for block in cheapest.blocks} == {SMALL.model.embedding_width}


def test_an_impossible_budget_names_the_least_value_which_then_is_met() -> None:
    tables = cost_tables(PAPER, "int8")
    with pytest.raises(BudgetError) as caught:
        cheapest_genomes(PAPER, Budget(parameters=1e6, flops=60e9, weight_mb=10), tables)
    message = str(caught.value)
    assert "parameters 1M (the least" in message and "weight_mb 10 (the least" in message and "flops" not in message
    assert message.endswith("raise --params and --weight-mb")
    least = [parse_quantity(part.split(")")[0]) for part in message.split("possible is ")[1:]]
    assert cheapest_genomes(PAPER, Budget(parameters=least[0], weight_mb=least[1]), tables)
    for metric, value in zip(("parameters", "weight_mb"), least, strict=True):
        with pytest.raises(BudgetError):
            cheapest_genomes(PAPER, Budget(**{metric: value * 0.998}), tables)


def test_latency_budgets_need_a_table_of_the_same_precision_that_covers_the_space(write_table: WriteTable) -> None:
    with pytest.raises(InputError, match="--prefill-ms needs a latency table; run: merino-edge profile"):
        cheapest_genomes(SMALL, Budget(prefill_ms=1), cost_tables(SMALL, "fp16"))
    latencies = write_table(SMALL)
    with pytest.raises(InputError, match="measured in fp32, not int4"):
        cost_tables(SMALL, "int4", latencies)
    with pytest.raises(InputError, match="head_dim"):
        cost_tables(PAPER, "fp32", latencies)
    with pytest.raises(InputError, match="covers ffn_width / width 1 to 4"):
        cost_tables(replace(SMALL, ffn_ratios=(1, 5)), "fp32", latencies)
    with pytest.raises(InputError, match="no precision 'fp64'"):
        cost_tables(SMALL, "fp64")
