"""Label setting for a path problem: extend partial paths by a block and drop those that cannot matter.

A label is a partial path. It has a score, a cost and a largest extra activation, at one width and one depth. After
every block a label is dropped if one of these holds:

- No completion of it keeps the budgets: the lowest remaining cost of some metric is already too much.
- A Lagrangian bound (`merino_edge.search.exact.relaxation`) says that no completion reaches the wanted objective.
- Another label at the same width and depth scores as much and costs no more in any metric (dominance).

Scores and costs add without rounding, so comparisons are exact. Bounds are rounded, and a margin covers that. With
`beam` only that many labels stay at each width and depth. Then the result is a good path without a proof.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from merino_edge.search.exact.relaxation import Floats, Ints, LagrangianRelaxation, PathProblem

EXPANSIONS = 1_000_000  # extended labels checked at a time, to limit memory
MAX_LABELS = 3_000_000  # labels kept after one block; with more, the problem counts as unsolved
FRONT = 256  # labels compared at a time


class TooManyLabels(Exception):
    """A path problem has more than MAX_LABELS labels after one block."""


@dataclass(frozen=True)
class _Labels:
    """N partial paths with the same number of blocks, ordered by width and depth."""

    parent: Ints  # index of the label that this one extends
    choice: Ints  # the last block, as an index into the problem's choices
    score: Floats
    cost: Floats  # [N, K]
    extra: Floats
    width: Ints
    depth: Ints

    def __len__(self) -> int:
        return len(self.choice)

    def pick(self, index: NDArray[np.intp]) -> _Labels:
        return _Labels(*(getattr(self, name)[index] for name in self.__dataclass_fields__))


def solve(
    problem: PathProblem,
    wanted: float,
    relaxations: Sequence[LagrangianRelaxation],
    beam: int | None = None,
    on_labels: Callable[[int], None] = lambda labels: None,
) -> list[list[int]]:
    """All undominated paths with the highest objective, as lists of choices; [] if none reaches `wanted`.

    `on_labels` gets the number of labels after every block. It may raise an exception to stop the search. Raises
    TooManyLabels where memory would not suffice.
    """
    stages: list[_Labels] = []
    best = wanted
    optima: list[list[int]] = []
    for n in range(1, problem.blocks[-1] + 1):
        labels = _expand(problem, stages[-1] if stages else None, n, best, relaxations)
        if labels is None:
            break
        labels = labels.pick(_undominated(problem, labels, relaxations[0], beam))
        if len(labels) > MAX_LABELS:
            raise TooManyLabels
        on_labels(len(labels))
        stages.append(labels)
        if n in problem.blocks:
            ends, objectives = _whole(problem, labels)
            top = objectives.max(initial=-np.inf)
            if top > best:
                best, optima = float(top), []
            if top == best > -np.inf:
                optima += [_trace(stages, int(i)) for i in ends[objectives == best]]
    return optima


def _expand(
    problem: PathProblem, labels: _Labels | None, n: int, best: float, relaxations: Sequence[LagrangianRelaxation]
) -> _Labels | None:
    """Extend every label by every choice as block number `n`, and keep those that may matter; None if none does."""
    remaining, extended = problem.min_remaining_cost[n], []
    for w in problem.first if labels is None else range(len(problem.start)):
        low, high = np.searchsorted(problem.width, [w, w + 1])
        if labels is None:
            at, cost = np.zeros(1, np.int64), problem.start[w][None]
            score, extra, depth = np.zeros(1), np.zeros(1), np.zeros(1, np.int64)
        else:
            at = np.flatnonzero(labels.width <= w)
            cost = labels.cost[at] + problem.changes[labels.width[at], w]
            score, extra, depth = labels.score[at], labels.extra[at], labels.depth[at]
        stride = max(1, EXPANSIONS // max(1, high - low))
        for part in (slice(i, i + stride) for i in range(0, len(at) if high > low else 0, stride)):
            left = problem.depth - depth[part, None] - problem.layers[None, low:high]  # [labels, choices]
            rows, columns = np.nonzero(left >= 0)
            left = left[rows, columns]
            for relaxation in relaxations:
                weights = relaxation.cost_weights
                value = (score[part] - cost[part] @ weights)[rows] + relaxation.reduced_score[low + columns]
                if problem.peak >= 0:
                    value -= weights[problem.peak] * np.maximum(extra[part][rows], problem.extra[low + columns])
                bound = value + relaxation.best_rest[n, w, left] + (relaxation.constant + relaxation.slack)
                hopeful = (bound >= best) & (bound > -np.inf)
                rows, columns, left = rows[hopeful], columns[hopeful], left[hopeful]
            costs = cost[part][rows] + problem.cost[low + columns]
            extras = np.maximum(extra[part][rows], problem.extra[low + columns])
            total = costs + remaining[w, left]
            if problem.peak >= 0:
                total[:, problem.peak] += extras
            fits = np.flatnonzero((total <= problem.limits).all(1))
            if len(fits):
                rows, columns = rows[fits], columns[fits]
                scores = score[part][rows] + problem.score[low + columns]
                widths = np.full(len(fits), w)
                depths = problem.depth - left[fits]
                extended.append(
                    _Labels(at[part][rows], low + columns, scores, costs[fits], extras[fits], widths, depths)
                )
    if not extended:
        return None
    return _Labels(*(np.concatenate([getattr(f, name) for f in extended]) for name in _Labels.__dataclass_fields__))


def _whole(problem: PathProblem, labels: _Labels) -> tuple[NDArray[np.intp], Floats]:
    """The labels that are whole paths within the budgets, and their objectives."""
    ends = np.flatnonzero((labels.depth == problem.depth) & np.isin(labels.width, problem.last))
    total = labels.cost[ends] + problem.finish[labels.width[ends]]
    if problem.peak >= 0:
        total[:, problem.peak] += labels.extra[ends]
    within = (total <= problem.limits).all(1)
    ends, total = ends[within], total[within]
    return ends, labels.score[ends] - total @ problem.weights


def _trace(stages: Sequence[_Labels], index: int) -> list[int]:
    choices = []
    for labels in reversed(stages):
        choices.append(int(labels.choice[index]))
        index = int(labels.parent[index])
    return choices[::-1]


# --- dominance -------------------------------------------------------------------------------------


def _undominated(
    problem: PathProblem, labels: _Labels, relaxation: LagrangianRelaxation, beam: int | None
) -> NDArray[np.intp]:
    """Indices of the labels that no other dominates, ordered by width and depth; at most `beam` at each."""
    columns = [*labels.cost.T, labels.extra] if problem.peak >= 0 else [*labels.cost.T]
    # Sort by state, then by falling score, then by rising costs. So no label is dominated by a later one.
    order = np.lexsort((*columns[::-1], -labels.score, labels.depth, labels.width))
    state = (labels.width * (problem.depth + 1) + labels.depth)[order]
    breaks = np.flatnonzero(np.diff(state)) + 1
    kept = []
    for group in np.split(order, breaks):
        front = group[pareto_front([column[group] for column in columns])]
        if beam is not None and len(front) > beam:
            value = labels.score[front] - labels.cost[front] @ relaxation.cost_weights
            front = front[np.argsort(-value, kind="stable")[:beam]]
        kept.append(front)
    return np.concatenate(kept)


def pareto_front(costs: Sequence[Floats]) -> NDArray[np.intp]:
    """Indices of the rows that no earlier row equals or undercuts in every column.

    The rows must be ordered so that no later row dominates an earlier one. Without columns only the first row stays.
    """
    count = len(costs[0]) if costs else 1
    if len(costs) == 1:
        lowest = np.minimum.accumulate(costs[0])
        return np.flatnonzero(np.concatenate(([True], costs[0][1:] < lowest[:-1])))
    if not costs:
        return np.zeros(1, np.intp)
    alive, kept = np.arange(count), []
    while len(alive):
        head, alive = alive[:FRONT], alive[FRONT:]
        earlier = np.tri(len(head), k=-1, dtype=bool).T  # [i, j]: i comes before j
        head = head[~(_all_at_most(costs, head, head) & earlier).any(0)]
        kept.append(head)
        alive = alive[~_all_at_most(costs, head, alive).any(0)]
    return np.concatenate(kept)


def _all_at_most(costs: Sequence[Floats], rows: NDArray[np.intp], others: NDArray[np.intp]) -> NDArray[np.bool_]:
    """A [rows, others] array: whether the row costs no more than the other in every column."""
    result = np.ones((len(rows), len(others)), bool)
    for column in costs:
        result &= column[rows, None] <= column[None, others]
    return result
