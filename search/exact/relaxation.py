"""One frame at one total depth: a chain of blocks, and upper bounds on what any completion of it can score.

At a fixed depth score and costs are sums over the blocks, so for any prices >= 0 on the budgets (Lagrange multipliers)
the best chain of "worth minus priced costs" is found by dynamic programming over width, depth and number of blocks, and

    worth <= best priced chain + prices . limits

holds for every chain within the budgets (weak duality). `Relaxation` holds that table for one set of prices: what the
rest of a chain can add from any width and depth on. `tighten` looks for prices of a low bound by subgradient steps.
A chain knows no space, no metric and no file; `merino_edge.search.exact.label_setting` solves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SAFETY = 1e-9  # of the magnitudes in a bound: what rounding may have taken from it
STEPS = 60  # of a subgradient search
TIGHT = 1e-20  # squared excess over all limits, as fractions of them, that is none
STALLED = 4  # steps without a better bound, then the step is halved


@dataclass(frozen=True)
class PathProblem:
    """G genes ordered by cell (width, then layers), K budgets, W widths. Costs and limits in exact units.

    What is maximised, a chain's worth, is the sum of its scores less `weights` . costs: to find the least of a metric,
    that metric gets a weight and the scores are 0.
    """

    width: Ints  # [G] width index
    layers: Ints  # [G]
    score: Floats  # [G], on a grid so fine that sums are exact and so coarse that they do not round
    cost: Floats  # [G, K]
    extra: Floats  # [G]: a gene's activations beyond the ends'; only the largest counts
    first: Ints  # width indices of the first block
    last: Ints  # and of the last
    start: Floats  # [W, K]
    changes: Floats  # [W, W, K]
    finish: Floats  # [W, K]
    limits: Floats  # [K]
    peak: int  # the budget that `extra` counts towards, -1: none
    depth: int  # layers in all
    blocks: tuple[int, ...]  # allowed numbers of blocks
    choices: Ints  # [G] what the caller calls each
    weights: Floats  # [K]

    @cached_property
    def cells(self) -> tuple[Ints, Ints, Ints]:
        """(first gene, width, layers) of every (width, layers) that occurs."""
        breaks = np.flatnonzero((np.diff(self.width) != 0) | (np.diff(self.layers) != 0)) + 1
        starts = np.concatenate(([0], breaks))
        return starts, self.width[starts], self.layers[starts]

    @cached_property
    def ascending(self) -> Floats:
        """[W, W]: 0 where the second width may follow the first, else minus infinity."""
        count = len(self.start)
        return np.where(np.tril(np.ones((count, count), bool), -1), -np.inf, 0.0)

    @cached_property
    def min_remaining_cost(self) -> Floats:
        """[blocks placed, W, depth left, K]: the least that the rest of a chain costs, metric by metric."""
        shape = (self.blocks[-1] + 1, len(self.start), self.depth + 1, len(self.limits))
        least = np.zeros(shape)
        for k, multiplier in enumerate(np.eye(len(self.limits))):
            least[..., k] = -LagrangianRelaxation(self, multiplier, objective=False).rest
        return least

    def costs(self, choices: Sequence[int]) -> Floats:
        """The cost [K] of a whole chain, the largest extra included."""
        widths = self.width[list(choices)]
        total = self.start[widths[0]] + self.finish[widths[-1]] + self.cost[list(choices)].sum(0)
        total = total + self.changes[widths[:-1], widths[1:]].sum(0)
        if self.peak >= 0:
            total[self.peak] += self.extra[list(choices)].max()
        return np.asarray(total)

    def objective(self, choices: Sequence[int]) -> float:
        """What is maximised, of a whole chain."""
        return float(self.score[list(choices)].sum() - self.weights @ self.costs(choices))


class LagrangianRelaxation:
    """The best priced chains for `prices` [K]; `worth` False: of the priced costs alone."""

    def __init__(self, problem: PathProblem, multipliers: Floats, objective: bool = True) -> None:
        self.problem, self.multipliers = problem, multipliers
        self.constant = float(multipliers @ problem.limits)
        self.per_cost = multipliers = multipliers + problem.weights if objective else multipliers
        self.value = (problem.score if objective else 0.0) - problem.cost @ multipliers  # [G]
        starts, cell_width, cell_layers = problem.cells
        best = np.maximum.reduceat(self.value, starts)
        count, depth, most = len(problem.start), problem.depth, problem.blocks[-1]
        change = problem.ascending - problem.changes @ multipliers  # [W, W]
        exact = np.full((most + 1, count, depth + 1), -np.inf)  # [blocks left, W, depth left]
        exact[0, problem.last, 0] = -(problem.finish[problem.last] @ multipliers)
        placed = np.full((most + 1, count, depth + 1), -np.inf)  # the same with the next block's width given
        depths = np.unique(cell_layers)
        by_depth = np.full((len(depths), count), -np.inf)  # the best gene of every width with so many layers
        by_depth[np.searchsorted(depths, cell_layers), cell_width] = best
        for n in range(1, most + 1):
            for layers, values in zip(depths[depths <= depth], by_depth, strict=False):
                rows = placed[n, :, layers:]
                np.maximum(rows, values[:, None] + exact[n - 1, :, : depth + 1 - layers], out=rows)
            exact[n] = (change[:, :, None] + placed[n][None]).max(1)
        self.exact, self.cell_best, self.change = exact, best, change
        # [blocks placed, W, depth left]: the most that any allowed number of further blocks adds
        ends = [[total - n for total in problem.blocks if total >= n] for n in range(most + 1)]
        self.rest = np.stack([exact[left].max(0) if left else np.full_like(exact[0], -np.inf) for left in ends])
        begin = np.full(count, -np.inf)
        begin[problem.first] = -(problem.start[problem.first] @ multipliers)
        self.begin = begin
        whole = np.stack([begin + placed[n, :, depth] for n in problem.blocks])  # [numbers of blocks, W]
        self.best_blocks = problem.blocks[int(whole.max(1).argmax())]
        bound = float(whole.max()) + self.constant
        # Rounding must not cut off what is really there.
        self.slack = SAFETY * (abs(float(whole.max())) + self.constant) if np.isfinite(bound) else 0.0
        self.bound = bound + self.slack

    def maximiser(self) -> list[int]:
        """The genes of a best priced chain, which need not keep the budgets."""
        problem, choices, before, left = self.problem, [], self.begin, self.problem.depth
        starts, cell_width, cell_layers = problem.cells
        stops = np.append(starts[1:], len(problem.width))
        for n in reversed(range(self.best_blocks)):
            fits = np.flatnonzero(cell_layers <= left)
            w, layers = cell_width[fits], cell_layers[fits]
            at = fits[int((before[w] + self.cell_best[fits] + self.exact[n, w, left - layers]).argmax())]
            choices.append(int(starts[at] + self.value[starts[at] : stops[at]].argmax()))
            before, left = self.change[cell_width[at]], left - int(cell_layers[at])
        return choices


@dataclass(frozen=True)
class SubgradientResult:
    """The relaxations tried, lowest bound first, and the best chain within the budgets that they came upon."""

    relaxations: list[LagrangianRelaxation]
    choices: list[int] | None
    objective: float

    @property
    def bound(self) -> float:
        return self.relaxations[0].bound


def subgradient_descent(problem: PathProblem, multipliers: Floats, target: float) -> SubgradientResult:
    """Lower the bound from `prices` on, by Polyak's subgradient steps towards `target`, a worth known to be possible or
    below all that are; stops when the bound is below it."""
    best: LagrangianRelaxation | None = None
    tried, choices, objective, stride, stalled = [], None, target, 1.0, 0
    for _ in range(STEPS):
        relaxation = LagrangianRelaxation(problem, multipliers)
        tried.append(relaxation)
        if not np.isfinite(relaxation.bound):
            break  # no chain of this depth
        found = relaxation.maximiser()
        spent = problem.costs(found)
        if (reached := problem.objective(found)) > objective and (spent <= problem.limits).all():
            choices, objective = found, reached
        if best is None or relaxation.bound < best.bound:
            best, stalled = relaxation, 0
        elif (stalled := stalled + 1) == STALLED:
            stride, stalled, multipliers = stride / 2, 0, best.multipliers
        if relaxation.bound < objective or stride < 0.01:
            break
        excess = spent / problem.limits - 1
        excess[(multipliers == 0) & (excess < 0)] = 0.0
        if (norm := float(excess @ excess)) < TIGHT:
            break
        step = stride * (relaxation.bound - objective) * excess / norm
        multipliers = np.maximum(0.0, multipliers * problem.limits + step) / problem.limits
    return SubgradientResult(sorted(tried, key=lambda relaxation: relaxation.bound), choices, objective)
