"""Precisions of blocks as choices: costs and scores by definition, and exact optima that equal brute force."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from merino_edge import counts
from merino_edge.latency.table import LatencyTable
from merino_edge.search.block_precision import BlockPrecision, measured
from merino_edge.search.budget import Budget
from merino_edge.search.builtin_spaces import WIDE
from merino_edge.search.costs import CostModel
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import parse_score
from merino_edge.search.space import Candidate, Space, Vocabulary

WriteTable = Callable[..., LatencyTable]
ALL = tuple(map(measured, ("int4", "int8", "fp16")))
SCORES = ("effective", "cut", "exit:shared_layer=0.1", "parameters", "effective:shared_layer=0.3")
COUNTED = ("weight_mb@int4", "weight_mb@fp16", "peak_mb@64", "parameters", "kv_mb", "flops")
TIMED = ("decode_ms@64", "prefill_ms@64", "text_ms@30")
SPACES = 48
DRAWS = 5  # of a score and budgets, in each space
MAX_SIZE = 600


def random_space(rng: random.Random) -> Space:
    """A space of at most MAX_SIZE architectures, whose blocks have two or three precisions with any loss."""

    def some(values: tuple[Any, ...], most: int) -> tuple[Any, ...]:
        return tuple(sorted(rng.sample(values, rng.randint(1, most))))

    while True:
        names = rng.sample(counts.PRECISIONS, rng.randint(2, 3))
        space = replace(
            WIDE,
            name="random",
            blocks=some((1, 2, 3), 2),
            widths=some((64, 128, 192), 2),
            ffn_ratios=some((1, 2.5), 2),
            layers=some((1, 2, 4), 2),
            kv_groups=(1,),
            shared=rng.choice(((False,), (True,), (False, True))),
            ffn=(rng.choice(("relu", "swiglu")),),
            embedding_widths=some((64, 128), 2),
            vocabularies=(Vocabulary(512, 2.25), Vocabulary(2048, 3.0))[: rng.randint(1, 2)],
            contexts=(128,),
            precisions=tuple(BlockPrecision(name, rng.choice((0.0, 0.01, 0.05, rng.random()))) for name in names),
            least_width=0,
            least_embedding=0,
        )
        if space.size <= MAX_SIZE:
            return space


def tables(write_table: WriteTable, space: Space) -> dict[str, LatencyTable]:
    slowness = {"fp32": 4.0, "fp16": 2.1, "int8": 1.2, "int4": 0.8}
    names = {"int8", *(precision.name for precision in space.precisions)}
    return {name: write_table(space, name, slowness=slowness[name]) for name in sorted(names)}


def best_by_definition(problem: Problem, limits: dict[str, float]) -> float:
    """The highest score of an architecture whose costs, each summed over its parts, are within the limits."""
    best, space = -math.inf, problem.space
    costs = [{m: problem.metric_cost(m, i) for m in problem.budget.metrics} for i in range(len(space.templates))]
    for candidate in space.candidates():
        a, names = space.architecture(candidate), [precision.name for precision in space.precisions_of(candidate)]
        if all(cost.value(a, names) <= limits[metric.key] for metric, cost in costs[candidate.template].items()):
            best = max(best, total_by_definition(problem, candidate))
    return best


def total_by_definition(problem: Problem, candidate: Candidate) -> float:
    a = problem.space.architecture(candidate)
    cut = min(a.embedding_width, a.blocks[0].width)
    parts = []
    for block, choice in zip(a.blocks, candidate.choices, strict=True):
        value, precision = problem.score.block_total(a, block, a.layers, cut), problem.space.precision_of(choice)
        assert precision is not None
        parts.append(value - round(precision.lost * abs(value) * 2**30) / 2**30)
    return problem.score.factor(a.blocks[-1].width) * math.fsum(parts)


def test_the_optimum_is_that_of_brute_force_on_240_random_instances(write_table: WriteTable) -> None:
    """Limits are costs of random architectures. So budgets bind, are met with equality, or cannot be met."""
    rng, solved, mixed = random.Random(0), 0, 0
    for number in range(SPACES):
        space = random_space(rng)
        timed = tables(write_table, space) if number % 3 == 0 else {}
        more = tuple(timed[p.name] for p in space.precisions if p.name != "int8") if timed else ()
        cost_model = CostModel("int8", timed.get("int8"), more_tables=more)
        for _ in range(DRAWS):
            keys = rng.sample((*COUNTED, *TIMED, *TIMED) if timed else COUNTED, rng.randint(1, 3))
            free = Problem(space, Budget.of(dict.fromkeys(keys, 1e18)), parse_score(rng.choice(SCORES)), cost_model)
            factor = rng.choice((1.0, 0.97, 1.2))
            limits = {metric.key: factor * free.value(metric, space.sample(rng)) for metric in free.budget.metrics}
            problem = free.limited(Budget.of(limits))
            certificate = ExactSolver(problem).solve()
            best = best_by_definition(problem, limits)
            assert certificate.gap_percent == 0
            if best == -math.inf:
                assert certificate.infeasible
                continue
            assert certificate.candidate is not None and problem.feasible(certificate.candidate)
            assert certificate.score == certificate.bound == pytest.approx(best, rel=1e-12)
            assert total_by_definition(problem, certificate.candidate) == pytest.approx(certificate.score, rel=1e-12)
            solved += 1
            mixed += len({p.name for p in space.precisions_of(certificate.candidate)}) > 1
    assert solved >= 200 and mixed >= 10
