"""The path problem of one model template at one total depth, and its Lagrangian relaxation.

At a fixed depth the score and all costs are sums over the blocks. So the best model is a resource-constrained path:
every block is a step, every budget is a resource. For any Lagrange multipliers >= 0 on the budgets, dynamic programming
over width, depth and number of blocks finds the path with the highest Lagrangian. Weak duality then bounds every path
within the budgets:

    objective(path) <= max over all paths of (objective - multipliers . costs) + multipliers . limits

`LagrangianRelaxation` holds that table for one vector of multipliers. `subgradient_descent` looks for multipliers with
a low bound. This module knows no space, no metric and no file. `merino_edge.search.exact.label_setting` solves the
problem.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

SAFETY = 1e-9  # share of a bound's magnitude that is added to it, because rounding may have lowered it
STEPS = 60  # maximum number of subgradient steps
TIGHT = 1e-20  # squared norm of the subgradient, as fractions of the limits, that counts as zero
DIGITS = 6  # of a multiplier
STALLED = 4  # steps without a better bound before the step length is halved


@dataclass(frozen=True)
class PathProblem:
    """A resource-constrained path problem: choose the blocks of a model with a given depth.

    It has G block choices ordered by cell (width, then layers), K costs with a limit each, and W widths. Costs and
    limits are in exact units. The objective of a path is the sum of its scores minus `weights` . costs. To minimise a
    metric, give its cost a weight and set all scores to 0.
    """

    width: Ints  # [G] width index
    layers: Ints  # [G]
    score: Floats  # [G], on a grid on which sums are exact
    cost: Floats  # [G, K]
    extra: Floats  # [G]: activations above those of embedding and head; only the largest of a path counts
    first: Ints  # width indices that the first block may have
    last: Ints  # width indices that the last block may have
    start: Floats  # [W, K]: cost before a first block of this width
    changes: Floats  # [W, W, K]: cost of the projection from one width to another
    finish: Floats  # [W, K]: cost after a last block of this width
    limits: Floats  # [K]
    peak: int  # index of the cost that `extra` counts towards; -1 for none
    depth: int  # total number of layers
    blocks: tuple[int, ...]  # allowed numbers of blocks
    choices: Ints  # [G]: the caller's index of each block choice
    weights: Floats  # [K]: how much each cost lowers the objective

    @cached_property
    def cells(self) -> tuple[Ints, Ints, Ints]:
        """The cells that occur, as arrays of (first choice, width, layers)."""
        breaks = np.flatnonzero((np.diff(self.width) != 0) | (np.diff(self.layers) != 0)) + 1
        starts = np.concatenate(([0], breaks))
        return starts, self.width[starts], self.layers[starts]

    @cached_property
    def depths(self) -> tuple[Ints, Ints]:
        """The numbers of layers that cells have, and which of them each cell has."""
        return np.unique(self.cells[2], return_inverse=True)

    @cached_property
    def ascending(self) -> Floats:
        """A [W, W] array: 0 where the second width may follow the first, else minus infinity."""
        count = len(self.start)
        return np.where(np.tril(np.ones((count, count), bool), -1), -np.inf, 0.0)

    @cached_property
    def min_remaining_cost(self) -> Floats:
        """A lower bound on the cost of the rest of a path: [blocks placed, W, depth left, K], each cost by itself."""
        shape = (self.blocks[-1] + 1, len(self.start), self.depth + 1, len(self.limits))
        minimum = np.zeros(shape)
        for k, only_one in enumerate(np.eye(len(self.limits))):
            minimum[..., k] = -LagrangianRelaxation(self, only_one, costs_only=True).best_rest
        return minimum

    def costs(self, choices: Sequence[int]) -> Floats:
        """The costs [K] of a whole path, including its largest activation."""
        widths = self.width[list(choices)]
        total = self.start[widths[0]] + self.finish[widths[-1]] + self.cost[list(choices)].sum(0)
        total = total + self.changes[widths[:-1], widths[1:]].sum(0)
        if self.peak >= 0:
            total[self.peak] += self.extra[list(choices)].max()
        return np.asarray(total)

    def objective(self, choices: Sequence[int]) -> float:
        """The objective of a whole path, which is maximised."""
        return float(self.score[list(choices)].sum() - self.weights @ self.costs(choices))


class LagrangianRelaxation:
    """The paths with the highest Lagrangian for given `multipliers` [K], found by dynamic programming.

    With `costs_only` the objective is left out. Then the best path is the one with the lowest weighted cost.
    """

    def __init__(self, problem: PathProblem, multipliers: Floats, *, costs_only: bool = False) -> None:
        self.problem, self.multipliers = problem, multipliers
        self.constant = float(multipliers @ problem.limits)
        self.cost_weights = weights = multipliers if costs_only else multipliers + problem.weights  # [K]
        self.reduced_score = (0.0 if costs_only else problem.score) - problem.cost @ weights  # [G]
        starts, cell_width, _ = problem.cells
        best = np.maximum.reduceat(self.reduced_score, starts)
        count, depth, max_blocks = len(problem.start), problem.depth, problem.blocks[-1]
        change = problem.ascending - problem.changes @ weights  # [W, W]
        to_go = np.full((max_blocks + 1, count, depth + 1), -np.inf)  # [blocks left, W, depth left]
        to_go[0, problem.last, 0] = -(problem.finish[problem.last] @ weights)
        placed = np.full((max_blocks + 1, count, depth + 1), -np.inf)  # the same, where the next block has this width
        depths, depth_of_cell = problem.depths
        by_depth = np.full((len(depths), count), -np.inf)  # the best choice of each width with so many layers
        by_depth[depth_of_cell, cell_width] = best
        for n in range(1, max_blocks + 1):
            for layers, values in zip(depths[depths <= depth], by_depth, strict=False):
                rows = placed[n, :, layers:]
                np.maximum(rows, values[:, None] + to_go[n - 1, :, : depth + 1 - layers], out=rows)
            to_go[n] = (change[:, :, None] + placed[n][None]).max(1)
        self.to_go, self.cell_best, self.change = to_go, best, change
        begin = np.full(count, -np.inf)
        begin[problem.first] = -(problem.start[problem.first] @ weights)
        self.begin = begin
        whole = np.stack([begin + placed[n, :, depth] for n in problem.blocks])  # [numbers of blocks, W]
        self.best_blocks = problem.blocks[int(whole.max(1).argmax())]
        bound = float(whole.max()) + self.constant
        # Rounding must not cut off a path that really exists.
        self.slack = SAFETY * (abs(float(whole.max())) + self.constant) if np.isfinite(bound) else 0.0
        self.bound = bound + self.slack

    @cached_property
    def best_rest(self) -> Floats:
        """The most that the rest of a path adds: [blocks placed, W, depth left], over all allowed numbers of blocks."""
        blocks, nothing = self.problem.blocks, np.full_like(self.to_go[0], -np.inf)
        ends = [[total - n for total in blocks if total >= n] for n in range(blocks[-1] + 1)]
        return np.stack([self.to_go[left].max(0) if left else nothing for left in ends])

    def maximiser(self) -> list[int]:
        """A path with the highest Lagrangian, as choices. It may exceed the budgets."""
        problem, choices, before, left = self.problem, [], self.begin, self.problem.depth
        starts, cell_width, cell_layers = problem.cells
        stops = np.append(starts[1:], len(problem.width))
        for n in reversed(range(self.best_blocks)):
            fits = np.flatnonzero(cell_layers <= left)
            w, layers = cell_width[fits], cell_layers[fits]
            at = fits[int((before[w] + self.cell_best[fits] + self.to_go[n, w, left - layers]).argmax())]
            choices.append(int(starts[at] + self.reduced_score[starts[at] : stops[at]].argmax()))
            before, left = self.change[cell_width[at]], left - int(cell_layers[at])
        return choices


def bounds_by_depth(problem: PathProblem, scores: Floats, depths: range, multipliers: Floats) -> tuple[Floats, Floats]:
    """The Lagrangian bounds [D] of a problem at every depth, with scores [D, G], and the slack in each.

    It does for all depths at once what `LagrangianRelaxation` does for one. The problem's own depth and scores do not
    count.
    """
    starts, cell_width, _ = problem.cells
    weights, deepest = multipliers + problem.weights, depths[-1]
    lengths, length_of_cell = problem.depths
    best = np.full((len(lengths), len(depths), len(problem.start)), -np.inf)
    best[length_of_cell, :, cell_width] = np.maximum.reduceat(scores - problem.cost @ weights, starts, axis=1).T
    change = problem.ascending - problem.changes @ weights  # [W, W]
    begin = np.full(len(problem.start), -np.inf)
    begin[problem.first] = -(problem.start[problem.first] @ weights)
    to_go = np.full((len(depths), len(problem.start), deepest + 1), -np.inf)  # [D, W, depth left]
    to_go[:, problem.last, 0] = -(problem.finish[problem.last] @ weights)
    highest = np.full(len(depths), -np.inf)
    for n in range(1, problem.blocks[-1] + 1):
        placed = np.full_like(to_go, -np.inf)
        for layers, values in zip(lengths[lengths <= deepest], best, strict=False):
            rows = placed[:, :, layers:]
            np.maximum(rows, values[:, :, None] + to_go[:, :, : deepest + 1 - layers], out=rows)
        if n in problem.blocks:
            highest = np.maximum(highest, (begin + placed[np.arange(len(depths)), :, depths]).max(1))
        to_go = (change[None, :, :, None] + placed[:, None]).max(2)
    constant = float(multipliers @ problem.limits)
    slack = np.where(np.isfinite(highest), SAFETY * (np.abs(highest) + constant), 0.0)
    return highest + constant + slack, slack


def short(multipliers: Floats) -> Floats:
    """The multipliers with so few digits that a certificate can hold them."""
    return np.array([float(f"{value:.{DIGITS}g}") for value in multipliers])


@dataclass(frozen=True)
class SubgradientResult:
    """The outcome of `subgradient_descent`: the relaxations tried, and a path within the budgets."""

    relaxations: list[LagrangianRelaxation]  # lowest bound first
    choices: list[int] | None  # the best path within the budgets that was met; None if none was better than the target
    objective: float  # of that path, or the target

    @property
    def bound(self) -> float:
        """The lowest upper bound on the objective that was found."""
        return self.relaxations[0].bound


def subgradient_descent(
    problem: PathProblem, multipliers: Floats, target: float, steps: int = STEPS
) -> SubgradientResult:
    """Lower the Lagrangian bound, starting from `multipliers`, by up to `steps` subgradient steps of Polyak's length.

    The steps aim at `target`: an objective that some path is known to reach, or one that every path exceeds. The
    descent stops when the bound is below the target.
    """
    best: LagrangianRelaxation | None = None
    tried, choices, objective, stride, stalled = [], None, target, 1.0, 0
    for _ in range(steps):
        relaxation = LagrangianRelaxation(problem, multipliers := short(multipliers))
        tried.append(relaxation)
        if not np.isfinite(relaxation.bound):
            break  # no path has this depth
        path = relaxation.maximiser()
        spent = problem.costs(path)
        if (reached := problem.objective(path)) > objective and (spent <= problem.limits).all():
            choices, objective = path, reached
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
