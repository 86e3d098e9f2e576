"""Our exact solver against general ones on the paper's space: python benchmarks/exact_solvers.py

    pip install ortools scipy        # CP-SAT, and HiGHS through scipy; whichever is missing is left out

All solve the same program: one binary variable per block and block choice, and one per pair of widths between
neighbours. The total depth is fixed, so there are 13 programs for 4 to 16 layers. CP-SAT takes whole numbers: costs
are whole already, scores are given as whole thousandths of a nat. Each solver is timed over all depths, building
included; rounds are interleaved. A last line solves with ours the spaces that no formulation of this kind holds
(`edge`, `wide`), for their time and memory.
"""

from __future__ import annotations

import argparse
import importlib.util
import resource
import statistics
import time
from collections.abc import Callable
from itertools import product

import numpy as np

from merino_edge.search.budget import Budget
from merino_edge.search.builtin_spaces import EDGE, PAPER, WIDE
from merino_edge.search.costs import CostModel
from merino_edge.search.exact.solver import ExactSolver
from merino_edge.search.problem import Problem
from merino_edge.search.score import effective
from merino_edge.search.space import Space

CASES = (
    {"flops": 60e9},
    {"flops": 160e9},
    {"flops": 60e9, "parameters": 50e6},
    {"flops": 110e9, "parameters": 55e6},
    {"flops": 160e9, "parameters": 60e6},
)
LARGE: tuple[tuple[Space, dict[str, float]], ...] = (
    (EDGE, {"weight_mb@int4": 20.0, "kv_mb@1024": 6.0}),
    (EDGE, {"flops": 50e9, "weight_mb@int4": 15.0, "peak_mb@256": 60.0}),
    (WIDE, {"flops": 60e9}),
    (WIDE, {"flops": 60e9, "parameters": 30e6}),
    (WIDE, {"weight_mb@int4": 30.0, "kv_mb@1024": 8.0, "flops": 50e9}),
    (WIDE, {"weight_mb@int4": 25.0, "kv_mb@2048": 8.0, "flops": 50e9, "peak_mb@256": 80.0, "parameters": 40e6}),
)
SECONDS = 600.0  # per depth, of the general solvers
NATS = 1000  # CP-SAT's scores are whole thousandths


def problem(space: Space, limits: dict[str, float]) -> Problem:
    return Problem(space, Budget.of(limits), effective(), CostModel("int4"))


def ours(asked: Problem) -> float:
    certificate = ExactSolver(asked).solve()
    assert certificate.gap_percent == 0
    return certificate.score


class Program:
    """One depth of a problem with one model template, as rows and columns."""

    def __init__(self, asked: Problem, depth: int) -> None:
        space, (program,) = asked.space, asked.programs(0)
        (self.blocks,), self.depth, self.program = space.blocks, depth, program
        self.layers = np.array([choice.layers for choice in space.block_choices])
        self.width = np.array(space.width_of)
        model = space.models[0]
        self.scores = np.array([asked.score.block_total(model, choice, depth, 0) for choice in space.block_choices])
        self.pairs = [(v, w) for v in program.widths for w in program.widths if v <= w]

    def block_costs(self, block: int) -> np.ndarray:
        """[G, K], with what the outer widths add."""
        cost = self.program.block_costs.copy()
        if block == 0:
            cost += self.program.start[self.width]
        if block == self.blocks - 1:
            cost += self.program.finish[self.width]
        return cost


def depths(asked: Problem) -> range:
    space = asked.space
    return range(space.blocks[0] * space.layers[0], space.blocks[0] * space.layers[-1] + 1)


def cp_sat(asked: Problem) -> float:
    from ortools.sat.python import cp_model  # pyright: ignore[reportMissingImports]

    best = -np.inf
    for depth in depths(asked):
        part, model = Program(asked, depth), cp_model.CpModel()
        choices, blocks = range(len(part.layers)), range(part.blocks)
        x = [[model.new_bool_var("") for _ in choices] for _ in blocks]
        t = [{pair: model.new_bool_var("") for pair in part.pairs} for _ in blocks[1:]]
        for row in x:
            model.add_exactly_one(row)
        model.add(sum(int(part.layers[g]) * row[g] for row in x for g in choices) == depth)
        for i, w in product(blocks[1:], part.program.widths):
            here = [g for g in choices if part.width[g] == w]
            model.add(sum(x[i - 1][g] for g in here) == sum(v for (a, _), v in t[i - 1].items() if a == w))
            model.add(sum(x[i][g] for g in here) == sum(v for (_, b), v in t[i - 1].items() if b == w))
        for k, limit in enumerate(part.program.limits):
            spent = sum(int(part.block_costs(i)[g, k]) * x[i][g] for i in blocks for g in choices)
            spent += sum(int(part.program.changes[a, b, k]) * v for row in t for (a, b), v in row.items())
            model.add(spent <= int(limit))
        model.maximize(sum(round(NATS * part.scores[g]) * row[g] for row in x for g in choices))
        solver = cp_model.CpSolver()
        solver.parameters.max_time_in_seconds = SECONDS
        status = solver.solve(model)
        if status == cp_model.FEASIBLE:
            print(f"    CP-SAT stopped at depth {depth} with a gap")
        if status in (cp_model.OPTIMAL, cp_model.FEASIBLE):
            best = max(best, solver.objective_value / NATS)
    return float(best)


def highs(asked: Problem) -> float:
    from scipy.optimize import Bounds, LinearConstraint, milp
    from scipy.sparse import lil_matrix

    best = -np.inf
    for depth in depths(asked):
        part = Program(asked, depth)
        choices, pairs = len(part.layers), len(part.pairs)
        columns = part.blocks * choices + (part.blocks - 1) * pairs
        flows = 2 * (part.blocks - 1) * len(part.program.widths)
        metrics = len(part.program.limits)
        rows = lil_matrix((part.blocks + 1 + flows + metrics, columns))
        low, high = np.zeros(rows.shape[0]), np.zeros(rows.shape[0])
        for i in range(part.blocks):
            rows[i, i * choices : (i + 1) * choices] = 1
            rows[part.blocks, i * choices : (i + 1) * choices] = part.layers
        low[: part.blocks] = high[: part.blocks] = 1
        low[part.blocks] = high[part.blocks] = depth
        row = part.blocks + 1
        for i, side in product(range(1, part.blocks), (0, 1)):
            for w in part.program.widths:
                block = i - 1 + side
                for g in np.flatnonzero(part.width == w):
                    rows[row, block * choices + g] = 1
                for at, pair in enumerate(part.pairs):
                    if pair[side] == w:
                        rows[row, part.blocks * choices + (i - 1) * pairs + at] = -1
                row += 1
        for k, limit in enumerate(part.program.limits):
            for i in range(part.blocks):
                rows[row, i * choices : (i + 1) * choices] = part.block_costs(i)[:, k] / limit
            change = [part.program.changes[a, b, k] / limit for a, b in part.pairs]
            for i in range(part.blocks - 1):
                rows[row, part.blocks * choices + i * pairs : part.blocks * choices + (i + 1) * pairs] = change
            low[row], high[row] = -np.inf, 1.0
            row += 1
        objective = np.concatenate((np.tile(-part.scores, part.blocks), np.zeros((part.blocks - 1) * pairs)))
        found = milp(
            objective,
            constraints=LinearConstraint(rows.tocsr(), low, high),
            bounds=Bounds(0, 1),
            integrality=np.ones(columns),
            options={"time_limit": SECONDS, "mip_rel_gap": 0},
        )
        if found.status == 1:
            print(f"    HiGHS stopped at depth {depth} with a gap")
        if found.x is not None:
            best = max(best, -found.fun)
    return float(best)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    solvers: dict[str, Callable[[Problem], float]] = {"ours": ours}
    solvers |= {"CP-SAT": cp_sat} if importlib.util.find_spec("ortools") else {}
    solvers |= {"HiGHS": highs} if importlib.util.find_spec("scipy") else {}
    for limits in CASES:
        times: dict[str, list[float]] = {name: [] for name in solvers}
        scores: dict[str, float] = {}
        for _, (name, solver) in product(range(rounds), solvers.items()):
            began = time.perf_counter()
            scores[name] = solver(problem(PAPER, limits))
            times[name].append(time.perf_counter() - began)
        print(f"paper {limits}")
        for name, seconds in times.items():
            spread = f"({min(seconds):.2f} - {max(seconds):.2f})"
            print(
                f"    {name:<7} {statistics.median(seconds):8.2f} s {spread:<18} score {scores[name]:.3f}", flush=True
            )
    for space, limits in LARGE:
        began = time.perf_counter()
        certificate = ExactSolver(problem(space, limits)).solve()
        seconds = time.perf_counter() - began
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        print(
            f"{space.name} {limits}: {seconds:.1f} s, gap {certificate.gap_percent:g} %, "
            f"peak memory so far {peak:.0f} MiB"
        )


if __name__ == "__main__":
    main()
