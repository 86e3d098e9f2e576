"""How far the paper's evolutionary search ends from the proven optimum: python benchmarks/evolution_gap.py

20 seeds of 100,000 iterations under the paper's three FLOP budgets and two budgets each of the open spaces; prints the
gap in percent of the optimum and the seconds a run takes.
"""

from __future__ import annotations

import statistics
import time

from merino_edge.search.budget import Budget
from merino_edge.search.builtin_spaces import EDGE, PAPER, WIDE
from merino_edge.search.costs import CostModel
from merino_edge.search.evolution import evolve
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import effective

SEEDS = 20
CASES = (
    (PAPER, {"flops": 60e9}),
    (PAPER, {"flops": 110e9}),
    (PAPER, {"flops": 160e9}),
    (EDGE, {"weight_mb@int4": 20.0, "kv_mb@1024": 6.0}),
    (EDGE, {"flops": 50e9, "peak_mb@256": 60.0}),
    (WIDE, {"flops": 60e9, "parameters": 30e6}),
    (WIDE, {"weight_mb@int4": 30.0, "kv_mb@1024": 8.0}),
)


def main() -> None:
    print("space", "budgets", "median gap %", "mean", "worst", "optimal", "seconds (worst)", sep="\t")
    for space, limits in CASES:
        problem = Problem(space, Budget.of(limits), effective(), CostModel("int4"))
        optimum = ExactSolver(problem).solve().score
        gaps, seconds = [], []
        for seed in range(SEEDS):
            began = time.perf_counter()
            found = evolve(problem, seed=seed)
            seconds.append(time.perf_counter() - began)
            gaps.append(100.0 if found.candidate is None else 100 * (1 - problem.total(found.candidate) / optimum))
        figures = (statistics.median(gaps), statistics.fmean(gaps), max(gaps))
        optimal = sum(gap < 1e-9 for gap in gaps)
        print(space.name, limits, *(f"{figure:.3f}" for figure in figures), f"{optimal} of {SEEDS}",
              f"{statistics.median(seconds):.1f} ({max(seconds):.1f})", sep="\t", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
