"""The paper's evolutionary algorithm (MeRino, AAAI 2025; paper section 6), seeded and reproducible.

Random candidates start the population. Each iteration mutates one block of a random parent, and keeps the child if it
is better than the worst member. Three details are not in the paper. No candidate occurs twice in the population. The
cheapest candidate of each budgeted metric is in it from the start. A candidate over budget ranks below all others, by
how far it is over, so that the population moves towards tight budgets.

There are two departures from the paper. Half of the children have a second block mutated. Under a tight budget one
block can grow only where another shrinks, and with single mutations most seeds end below the optimum. Also, in a space
with more dimensions than the paper's, a child may gain or lose a block, or change one field of its template.

The evolution proves nothing. `merino_edge.search.exact.solver` says how far its result is from the optimum.
"""

from __future__ import annotations

import math
import random
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from merino_edge import limits
from merino_edge.search.budget import Budget, Metric
from merino_edge.search.exact.minimum import minimum
from merino_edge.search.problem import Problem, TemplateProgram
from merino_edge.search.space import Candidate, Space

SECOND_MUTATION = 0.5  # probability of a second mutation
OTHER_MUTATION = 0.25  # probability to change the number of blocks, and to change the template, where there is a choice
CLOUD_POINTS = 4000  # candidates that are kept for a plot


@dataclass(frozen=True)
class Evolution:
    """The best candidate, None where none met the budgets, and the course of the search."""

    candidate: Candidate | None
    iterations: int
    history: tuple[tuple[int, float], ...]  # (iteration, best score from there on)
    cloud: tuple[Candidate, ...]  # a sample of the candidates visited


class _Evaluator:
    """Ranks candidates by table lookup."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layers = [choice.layers for choice in problem.space.block_choices]
        self.width_of = problem.space.width_of
        self._tables: dict[int, list[tuple[TemplateProgram, tuple[Any, ...]]]] = {}  # by template
        self._scores: dict[tuple[int, int, int], list[float | None]] = {}

    def score(self, candidate: Candidate) -> float:
        problem = self.problem
        if problem.score.block is None:
            return problem.total(candidate)
        model, blocks = problem.space.models[candidate.template], problem.space.block_choices
        depth = sum([self.layers[choice] for choice in candidate.choices])
        cut = min(model.embedding_width, blocks[candidate.choices[0]].width)
        scores = self._scores.setdefault((candidate.template, depth, cut), [None] * len(blocks))
        total = 0.0
        for choice in candidate.choices:
            part = scores[choice]
            if part is None:
                lost = problem.space.lost_of(choice)
                part = scores[choice] = problem.score.block_total(model, blocks[choice], depth, cut, lost)
            total += part
        return problem.score.factor(blocks[candidate.choices[-1]].width) * total

    def excess(self, candidate: Candidate) -> float:
        """How far the candidate is over the budgets, as a sum of fractions of the limits; 0 if it is within."""
        if candidate.template not in self._tables:
            self._tables[candidate.template] = [
                (program, _lists(program)) for program in self.problem.programs(candidate.template)
            ]
        return min([self._over(candidate, program, lists) for program, lists in self._tables[candidate.template]])

    def _over(self, candidate: Candidate, program: TemplateProgram, lists: tuple[Any, ...]) -> float:
        """The excess by one program. The largest of a metric's sums counts."""
        block_costs, changes, start, finish, upper = lists
        over = [0.0] * len(upper)
        for k, limit in enumerate(upper):
            before = self.width_of[candidate.choices[0]]
            total = start[k][before]
            for choice in candidate.choices:
                after = self.width_of[choice]
                total += block_costs[k][choice] + changes[k][before][after]
                before = after
            total += finish[k][before]
            if k == program.peak:
                total += max(program.end_activation, *(program.activations[choice] for choice in candidate.choices))
            if total > limit:
                metric = program.metrics[k]
                over[metric] = max(over[metric], total / limit - 1)
        return sum(over)

    def rank(self, candidate: Candidate) -> tuple[bool, float]:
        """The sort key: candidates within the budgets by score, below them all others by excess."""
        excess = self.excess(candidate)
        return (False, -excess) if excess > 0 else (True, self.score(candidate))


def _lists(program: TemplateProgram) -> tuple[Any, ...]:
    """A program's costs as nested lists, which Python indexes faster than arrays."""
    arrays = (
        program.block_costs.T,
        program.changes.transpose(2, 0, 1),
        program.start.T,
        program.finish.T,
        program.limits,
    )
    return tuple(array.tolist() for array in arrays)


def evolve(
    problem: Problem,
    *,
    iterations: int = 100_000,
    population: int = 512,
    parents: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, float], None] | None = None,
) -> Evolution:
    """Search for the candidate with the highest score within the budgets.

    Now and then `on_progress` gets the iteration and the best score so far. Raises InputError where an argument is out
    of range.
    """
    limits.check_range("iterations", iterations, 0, limits.MAX_ITERATIONS)
    limits.check_range("population", population, 1, limits.MAX_POPULATION)
    limits.check_range("parents", parents, 1, population)
    limits.check_range("seed", seed, 0, limits.MAX_SEED)
    rng = random.Random(seed)
    space, evaluator = problem.space, _Evaluator(problem)
    templates = set(problem.templates)
    members = _cheapest(problem)
    for _ in range(100 * population):  # most templates may be too short for the budgets
        if len(members) < min(population, space.size) and (candidate := space.sample(rng)).template in templates:
            members.add(candidate)
    ranked = sorted((evaluator.rank(candidate), candidate) for candidate in members)  # worst first

    history = [(0, ranked[-1][0])]
    visited: list[Candidate] = []
    stride = max(1, iterations // CLOUD_POINTS)
    for iteration in range(1, iterations + 1):
        parent = ranked[-1 - int(rng.random() * min(parents, len(ranked)))][1]
        child = mutate(space, parent, rng)
        if rng.random() < SECOND_MUTATION:
            child = mutate(space, child, rng)
        if iteration % stride == 0:
            visited.append(child)
            if on_progress:
                feasible, best_score = history[-1][1]
                on_progress(iteration, best_score if feasible else -math.inf)
        if child in members or child.template not in templates:
            continue
        entry = (evaluator.rank(child), child)
        if entry > ranked[0]:
            insort(ranked, entry)
            members.add(child)
            members.remove(ranked.pop(0)[1])
            if entry[0] > history[-1][1]:
                history.append((iteration, entry[0]))

    (within, _), best = ranked[-1]
    scores = tuple((iteration, score) for iteration, (feasible, score) in history if feasible)
    return Evolution(best if within else None, iterations, scores, tuple(visited))


def _cheapest(problem: Problem) -> set[Candidate]:
    """The cheapest candidate of each budgeted metric; without budgets the one with the fewest parameters."""
    candidates = set()
    for metric, limit in problem.budget.limits or ((Metric("parameters"), 1.0),):
        cheapest = minimum(problem.limited(Budget(((metric, limit),))), metric)
        if cheapest is not None and cheapest[1].template in problem.templates:
            candidates.add(cheapest[1])
    return candidates


def mutate(space: Space, candidate: Candidate, rng: random.Random) -> Candidate:
    """`candidate` with one change: a new block, one block more or less, or another template.

    A new block is drawn between its neighbours' widths, with any FFN ratio and number of layers (paper section 6).
    """
    if len(space.templates) > 1 and rng.random() < OTHER_MUTATION:
        return _with_other_template(space, candidate, rng)
    choices, widths = candidate.choices, space.width_range(candidate.template)
    added = 0
    if len(space.blocks) > 1 and rng.random() < OTHER_MUTATION:
        added = rng.choice((-1, 1))
        if len(choices) + added not in space.blocks:
            return candidate
    index = int(rng.random() * (len(choices) + (added > 0)))
    before, after = choices[:index], choices[index + (added <= 0) :]
    if added < 0:
        return Candidate(candidate.template, before + after)
    low = space.first_choice[space.width_of[before[-1]] if before else widths.start]
    high = space.first_choice[space.width_of[after[0]] + 1 if after else widths.stop]
    return Candidate(candidate.template, (*before, low + int(rng.random() * (high - low)), *after))


def _with_other_template(space: Space, candidate: Candidate, rng: random.Random) -> Candidate:
    """Change one field of the template. A block whose width is not allowed there gets the nearest allowed width."""
    sizes = [len(choices) for choices in (space.ffn, space.vocabularies, space.embedding_widths, space.contexts)]
    place = rng.choice([i for i, size in enumerate(sizes) if size > 1])
    stride = math.prod(sizes[place + 1 :])
    digit = candidate.template // stride % sizes[place]
    template = candidate.template + (rng.randrange(sizes[place]) - digit) * stride
    widths, choices = space.width_range(template), []
    for choice in candidate.choices:
        width = min(max(space.width_of[choice], widths.start), widths.stop - 1)
        if width != space.width_of[choice]:
            choice = rng.randrange(space.first_choice[width], space.first_choice[width + 1])
        choices.append(choice)
    return Candidate(template, tuple(choices))
