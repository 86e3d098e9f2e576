"""Find `merino-52m`, `merino-61m` and `merino-64m` (merino_edge/presets.py): python benchmarks/reconstruct_presets.py

The paper prints for each model its FLOPs, its parameters with shared layers and without, but no architecture.
This enumerates the paper's whole space (304 million architectures, no sampling) and prints, for each model,
how many fit those three figures as printed and the one of them with the highest total score (default
hyperparameters). It also prints the highest score under the FLOP budget alone, which an evolutionary run should reach.
"""

from __future__ import annotations

import dataclasses
from itertools import combinations_with_replacement, pairwise

import numpy as np

from merino_edge.search.budget import AdditiveCost, cost_tables
from merino_edge.search.entropy import Hyperparameters, block_score
from merino_edge.search.space import PAPER

# name, FLOPs budget, parameters in M with shared layers, and without (paper sections 6 and 8)
TARGETS = (("merino-52m", 60e9, 52, 59), ("merino-61m", 110e9, 61, 79), ("merino-64m", 160e9, 64, 100))
PER_WIDTH = PAPER.genes_per_width


def outer_sums(cost: AdditiveCost, widths: tuple[int, ...]) -> np.ndarray:
    """The cost of every architecture with these width indices: [PER_WIDTH**2, PER_WIDTH**2]."""
    genes = [np.array(cost.genes[w * PER_WIDTH : (w + 1) * PER_WIDTH]) for w in widths]
    frame = cost.ends[widths[0]][widths[-1]] + sum(cost.changes[x][y] for x, y in pairwise(widths))
    front, back = (np.add.outer(genes[i], genes[i + 1]).ravel() for i in (0, 2))
    return np.add.outer(front, back) + frame


def main() -> None:
    shared = cost_tables(PAPER, "fp16")
    unshared = cost_tables(dataclasses.replace(PAPER, shared=False), "fp16")["parameters"]
    deepest = PAPER.blocks * PAPER.layers[-1]
    scores = np.array(
        [
            [block_score(PAPER.model, gene, depth, Hyperparameters()).total for gene in PAPER.genes]
            for depth in range(deepest + 1)
        ]
    )
    layers = np.array([gene.layers for gene in PAPER.genes])

    def best_of(mask: np.ndarray, widths: tuple[int, ...]) -> tuple[float, tuple[int, ...]]:
        front, back = np.nonzero(mask)
        picks = np.stack([front // PER_WIDTH, front % PER_WIDTH, back // PER_WIDTH, back % PER_WIDTH])  # [4, N]
        genomes = picks + PER_WIDTH * np.array(widths)[:, None]
        total = scores[layers[genomes].sum(0), genomes].sum(0)
        best = int(total.argmax())
        return float(total[best]), tuple(int(gene) for gene in genomes[:, best])

    found: dict[str, tuple[float, tuple[int, ...]]] = {}
    highest: dict[str, tuple[float, tuple[int, ...]]] = {}
    fitting = dict.fromkeys((name for name, *_ in TARGETS), 0)
    for widths in combinations_with_replacement(range(len(PAPER.widths)), PAPER.blocks):
        flops = outer_sums(shared["flops"], widths)
        rounded, unshared_rounded = (
            np.rint(outer_sums(cost, widths) / 1e6) for cost in (shared["parameters"], unshared)
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
        total, genome = found[name]
        own = dataclasses.replace(PAPER, shared=False).architecture(genome).parameters
        a = PAPER.architecture(genome)
        print(f"{name}: the best of {fitting[name]:,} that fit is {_blocks(genome)}")
        print(f"    score {total:.2f}, {a.parameters:,} parameters ({own:,} unshared), {a.flops() / 1e9:.2f} GFLOPs")
        total, genome = highest[name]
        print(f"    highest score under the FLOP budget alone: {total:.2f} with {_blocks(genome)}")


def _blocks(genome: tuple[int, ...]) -> str:
    return ", ".join(f"({b.width}, {b.layers}, {b.ffn_width})" for b in PAPER.architecture(genome).blocks)


if __name__ == "__main__":
    main()
