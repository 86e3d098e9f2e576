"""Find the presets `merino-52m`, `merino-61m` and `merino-64m`: python benchmarks/paper/reconstruct_presets.py

The paper prints for each model its FLOPs, its parameters with shared layers and without, but no architecture.
This enumerates the paper's whole space (304 million architectures, no sampling). For each model it prints how many
architectures fit those three figures, and the one of them with the highest total score (default hyperparameters).
It also prints the highest score under the FLOP budget alone, which an evolutionary run should reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from itertools import combinations_with_replacement, pairwise

import numpy as np

from merino_edge.search.budget import Budget
from merino_edge.search.builtin_spaces import PAPER
from merino_edge.search.costs import CostModel
from merino_edge.search.problem import Problem
from merino_edge.search.score import effective
from merino_edge.search.space import Candidate, Space

# name, FLOPs budget, parameters in M with shared layers, and without (paper sections 6 and 8)
TARGETS = (("merino-52m", 60e9, 52, 59), ("merino-61m", 110e9, 61, 79), ("merino-64m", 160e9, 64, 100))
OWN = dataclasses.replace(PAPER, shared=(False,))
(BLOCKS,), PER_WIDTH = PAPER.blocks, len(PAPER.block_choices) // len(PAPER.widths)
Sums = Callable[[tuple[int, ...]], np.ndarray]


def outer_sums(space: Space, metric: str) -> Sums:
    """A function that gives the cost of every architecture with some width indices: [PER_WIDTH**2, PER_WIDTH**2]."""
    problem = Problem(space, Budget.of({metric: 1e18}), effective(), CostModel("fp16"))
    (program,) = problem.programs(0)
    cost = program.block_costs[:, 0].reshape(len(space.widths), PER_WIDTH)

    def sums(widths: tuple[int, ...]) -> np.ndarray:
        first, last = widths[0], widths[-1]
        ends = program.start[first, 0] + program.finish[last, 0]
        ends += sum(program.changes[x, y, 0] for x, y in pairwise(widths))
        front, back = (np.add.outer(cost[widths[i]], cost[widths[i + 1]]).ravel() for i in (0, 2))
        return np.add.outer(front, back) + ends

    return sums


def main() -> None:
    all_flops, shared, unshared = (
        outer_sums(PAPER, "flops"),
        outer_sums(PAPER, "parameters"),
        outer_sums(OWN, "parameters"),
    )
    score, model = effective(), PAPER.models[0]
    scores = np.array(
        [
            [score.block_total(model, choice, depth, model.embedding_width) for choice in PAPER.block_choices]
            for depth in range(BLOCKS * PAPER.layers[-1] + 1)
        ]
    )
    layers = np.array([choice.layers for choice in PAPER.block_choices])

    def best_of(mask: np.ndarray, widths: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        front, back = np.nonzero(mask)
        picks = np.stack([front // PER_WIDTH, front % PER_WIDTH, back // PER_WIDTH, back % PER_WIDTH])  # [4, N]
        candidates = picks + PER_WIDTH * np.array(widths)[:, None]
        total = scores[layers[candidates].sum(0), candidates].sum(0)
        best = int(total.argmax())
        return float(total[best]), tuple(int(choice) for choice in candidates[:, best])

    found: dict[str, tuple[float, tuple[int, ...]]] = {}
    highest: dict[str, tuple[float, tuple[int, ...]]] = {}
    fitting = dict.fromkeys((name for name, *_ in TARGETS), 0)
    for widths in combinations_with_replacement(range(len(PAPER.widths)), BLOCKS):
        flops, rounded, unshared_rounded = (
            all_flops(widths),
            *(np.rint(sums(widths) / 1e6) for sums in (shared, unshared)),
        )
        for name, budget, with_sharing, without in TARGETS:
            within = flops <= budget
            if within.any():
                highest[name] = max(highest.get(name, (0.0, ())), best_of(within, widths))
            fits = within & (flops >= 0.95 * budget) & (rounded == with_sharing) & (unshared_rounded == without)
            if fits.any():
                fitting[name] += int(fits.sum())
                found[name] = max(found.get(name, (0.0, ())), best_of(fits, widths))

    for name, *_ in TARGETS:
        total, choices = found[name]
        own = OWN.architecture(Candidate(0, choices)).parameters
        a = PAPER.architecture(Candidate(0, choices))
        print(f"{name}: the best of {fitting[name]:,} that fit is {_blocks(choices)}")
        print(f"    score {total:.2f}, {a.parameters:,} parameters ({own:,} unshared), {a.flops() / 1e9:.2f} GFLOPs")
        total, choices = highest[name]
        print(f"    highest score under the FLOP budget alone: {total:.2f} with {_blocks(choices)}")


def _blocks(choices: tuple[int, ...]) -> str:
    blocks = PAPER.architecture(Candidate(0, choices)).blocks
    return ", ".join(f"({b.width}, {b.layers}, {b.ffn_width})" for b in blocks)


if __name__ == "__main__":
    main()
