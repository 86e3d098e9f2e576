from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from merino_edge.errors import BudgetError, InputError
from merino_edge.latency_table import LatencyTable
from merino_edge.search.budget import METRICS, Budget, cost_tables
from merino_edge.search.entropy import Hyperparameters, score
from merino_edge.search.evolution import SearchResult, evolve
from merino_edge.search.space import DEMO, PAPER, Genome, Space

WriteTable = Callable[..., LatencyTable]
Costs = dict[str, float]
SMALL = replace(DEMO, name="small", widths=(64, 128, 256), ffn_ratios=(1, 2, 4), layers=(1, 2, 3))  # 7290 architectures
DEEP = Hyperparameters(epsilon_squared=1.0, effectiveness_power=2.0)


@pytest.fixture(scope="module", params=[False, True], ids=["own", "shared"])
def case(request: pytest.FixtureRequest, write_table: WriteTable) -> tuple[Space, LatencyTable, dict[Genome, Costs]]:
    """A space, a table and what every architecture costs."""
    space = replace(SMALL, shared=request.param)
    latencies = write_table(space)
    tables = cost_tables(space, "fp32", latencies)
    widths = {genome: space.width_indices(genome) for genome in space.genomes()}
    return space, latencies, {g: {m: t.total(g, w) for m, t in tables.items()} for g, w in widths.items()}


@lru_cache
def scores(hyperparameters: Hyperparameters) -> dict[Genome, float]:
    """Every architecture's score by the definition, not by the search's tables; sharing does not change it."""
    return {genome: score(SMALL.architecture(genome), hyperparameters).total for genome in SMALL.genomes()}


@settings(max_examples=8, deadline=None)
@given(
    metrics=st.sets(st.sampled_from(METRICS)),
    hyperparameters=st.sampled_from([Hyperparameters(), DEEP]),
    seed=st.integers(0, 2**32),
)
def test_the_best_found_is_the_best_there_is(
    case: tuple[Space, LatencyTable, dict[Genome, Costs]],
    metrics: set[str],
    hyperparameters: Hyperparameters,
    seed: int,
) -> None:
    """Budgets are the costs of a random architecture: feasible, tight all at once, and met with equality."""
    space, latencies, costs = case
    limits = {metric: costs[space.sample(random.Random(seed))][metric] for metric in metrics}
    found = evolve(
        space, Budget(**limits), latencies=latencies, precision="fp32", hyperparameters=hyperparameters, seed=seed
    )
    best = max(
        total
        for genome, total in scores(hyperparameters).items()
        if all(costs[genome][metric] <= limit for metric, limit in limits.items())
    )
    assert found.score.total == pytest.approx(best, rel=1e-12)
    assert all(found.costs[metric] <= limit for metric, limit in limits.items())


@pytest.mark.parametrize(("flops", "best"), [(60e9, 7899.63), (110e9, 14023.06), (160e9, 19747.67)])
def test_the_papers_budgets_reach_the_exhaustive_optimum(flops: float, best: float) -> None:
    """Optima over all 304 million architectures, from benchmarks/reconstruct_presets.py."""
    assert max(evolve(PAPER, Budget(flops=flops), seed=seed).score.total for seed in range(3)) == pytest.approx(
        best, abs=0.005
    )


def test_the_same_seed_finds_the_same_and_another_searches_otherwise() -> None:
    def run(seed: int) -> SearchResult:
        return replace(evolve(PAPER, Budget(flops=60e9), iterations=2000, seed=seed), seconds=0.0)

    assert run(1) == run(1)
    assert run(1).history != run(2).history


def test_the_result_says_what_it_costs(write_table: WriteTable) -> None:
    latencies = write_table(SMALL)
    found = evolve(SMALL, Budget(parameters=2e6, decode_ms=10), latencies=latencies, precision="fp32", iterations=5000)
    a = found.architecture
    assert found.costs["parameters"] == a.parameters <= 2_000_000 and found.costs["flops"] == a.flops()
    assert found.costs["weight_mb"] * 1e6 == a.weight_bytes("fp32")
    for mode in ("decode", "prefill"):
        assert found.costs[f"{mode}_ms"] == pytest.approx(latencies.model_ms(a, mode), rel=1e-12)
    assert found.score == score(a)
    bests = [best for _, best in found.history]
    assert bests == sorted(bests) and bests[-1] == pytest.approx(found.score.total)
    assert found.binding in ("parameters", "decode_ms")
    assert max(s for cost, s in found.cloud if found.binding == "parameters" and cost <= 2e6) <= found.score.total * (
        1 + 1e-12
    )


def test_without_budgets_the_largest_wins() -> None:
    found = evolve(SMALL, Budget(), hyperparameters=Hyperparameters(beta_depth=0.0))
    assert all((block.width, block.layers, block.ffn_width) == (256, 3, 1024) for block in found.architecture.blocks)


def test_progress_is_reported() -> None:
    calls: list[tuple[int, float]] = []
    found = evolve(PAPER, Budget(), iterations=8000, on_progress=lambda done, best: calls.append((done, best)))
    assert [done for done, _ in calls] == list(range(2, 8001, 2))
    assert calls[-1][1] == pytest.approx(found.score.total)


def test_budgets_feasible_alone_but_not_together_are_refused_with_the_closest(write_table: WriteTable) -> None:
    """Dear width changes: a fast model must be as wide as the embedding, a small one must not."""
    latencies = write_table(SMALL, change_ms=5.0)
    tables = cost_tables(SMALL, "fp32", latencies)
    least = {}
    for metric in ("parameters", "decode_ms"):
        genome = tables[metric].cheapest(SMALL)
        least[metric] = 1.01 * tables[metric].total(genome, SMALL.width_indices(genome))
        evolve(SMALL, Budget(**{metric: least[metric]}), latencies=latencies, precision="fp32", iterations=0)
    with pytest.raises(BudgetError, match=r"together \(the closest has parameters .* decode_ms .*raise --"):
        evolve(SMALL, Budget(**least), latencies=latencies, precision="fp32", iterations=5000)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"iterations": -1}, "iterations"),
        ({"population": 0}, "population"),
        ({"parents": 513}, "parents"),
        ({"parents": 0}, "parents"),
        ({"iterations": 1.5}, "iterations"),
        ({"precision": "fp8"}, "fp8"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments: dict[str, int], words: str) -> None:
    with pytest.raises(InputError, match=words):
        evolve(SMALL, Budget(), **arguments)  # type: ignore[arg-type]
