"""The paper's evolutionary algorithm (MeRino, AAAI 2025; paper section 6), seeded and reproducible.

Random architectures start the population; each iteration mutates one block of a random parent and
keeps the child if it is better than the worst. Where the text is silent: no genome stands in the
population twice, the cheapest architecture of each budgeted metric is there from the start, and an
architecture over budget ranks below every one within, by how far over it is, so that tight budgets
are approached rather than waited for.

Two departures. Half of the children have a second block mutated: under a tight budget one block can grow only where
another shrinks, and with single mutations most seeds end below the optimum. And in spaces that leave more open than
the paper's, a child may instead gain or lose a block, or change one choice of its frame.

It proves nothing: the best it saw is not always the best there is. `merino_edge.search.exact.solver` says how far off it is.
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

SECOND_MUTATION = 0.5  # probability
OTHER_MUTATION = 0.25  # of the number of blocks, and of the frame, where there is a choice
CLOUD_POINTS = 4000


@dataclass(frozen=True)
class Evolution:
    """The best genome found, None where none met the budgets, and how the search went."""

    candidate: Candidate | None
    iterations: int
    history: tuple[tuple[int, float], ...]  # (iteration, best score from then on)
    cloud: tuple[Candidate, ...]  # a sample of the genomes visited


class _Evaluator:
    """Ranks genomes by table lookup."""

    def __init__(self, problem: Problem) -> None:
        self.problem = problem
        self.layers = [choice.layers for choice in problem.space.block_choices]
        self.width_of = problem.space.width_of
        self._tables: dict[int, list[tuple[TemplateProgram, tuple[Any, ...]]]] = {}  # by frame
        self._scores: dict[tuple[int, int, int], list[float | None]] = {}

    def score(self, candidate: Candidate) -> float:
        problem = self.problem
        if problem.score.block is None:
            return problem.total(candidate)
        model, choices = problem.space.models[candidate.template], problem.space.block_choices
        depth = sum([self.layers[choice] for choice in candidate.choices])
        cut = min(model.embedding_width, choices[candidate.choices[0]].width)
        known = self._scores.setdefault((candidate.template, depth, cut), [None] * len(choices))
        total = 0.0
        for choice in candidate.choices:
            part = known[choice]
            if part is None:
                part = known[choice] = problem.score.block_total(model, choices[choice], depth, cut)
            total += part
        return problem.score.factor(choices[candidate.choices[-1]].width) * total

    def excess(self, candidate: Candidate) -> float:
        """How far over the budgets, as a sum of fractions of each; 0 within."""
        if candidate.template not in self._tables:
            self._tables[candidate.template] = [
                (program, _lists(program)) for program in self.problem.programs(candidate.template)
            ]
        return min([self._over(candidate, program, lists) for program, lists in self._tables[candidate.template]])

    def _over(self, candidate: Candidate, program: TemplateProgram, lists: tuple[Any, ...]) -> float:
        """`excess` by one program: of a metric's sums the largest counts."""
        choices, changes, start, finish, most = lists
        over = [0.0] * len(most)
        for k, limit in enumerate(most):
            before = self.width_of[candidate.choices[0]]
            total = start[k][before]
            for choice in candidate.choices:
                after = self.width_of[choice]
                total += choices[k][choice] + changes[k][before][after]
                before = after
            total += finish[k][before]
            if k == program.peak:
                total += max(program.end_activation, *(program.activations[choice] for choice in candidate.choices))
            if total > limit:
                metric = program.metrics[k]
                over[metric] = max(over[metric], total / limit - 1)
        return sum(over)

    def rank(self, candidate: Candidate) -> tuple[bool, float]:
        """Within the budgets by score, outside below them by excess."""
        excess = self.excess(candidate)
        return (False, -excess) if excess > 0 else (True, self.score(candidate))


def _lists(program: TemplateProgram) -> tuple[Any, ...]:
    """A program's costs as nested lists, faster to index."""
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
    """Search for the highest score within the budgets. `on_progress` is called with (iteration, best score) now and
    then. Raises InputError where an argument is out of range."""
    limits.check_range("iterations", iterations, 0, limits.MAX_ITERATIONS)
    limits.check_range("population", population, 1, limits.MAX_POPULATION)
    limits.check_range("parents", parents, 1, population)
    limits.check_range("seed", seed, 0, limits.MAX_SEED)
    rng = random.Random(seed)
    space, evaluator = problem.space, _Evaluator(problem)
    templates = set(problem.templates)
    members = _cheapest(problem)
    for _ in range(100 * population):  # frames too short for the budgets may be most of the space
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
    """For each budget a genome of least cost; without budgets any that is allowed."""
    found = set()
    for metric, limit in problem.budget.limits or ((Metric("parameters"), 1.0),):
        cheapest = minimum(problem.limited(Budget(((metric, limit),))), metric)
        if cheapest is not None and cheapest[1].template in problem.templates:
            found.add(cheapest[1])
    return found


def mutate(space: Space, candidate: Candidate, rng: random.Random) -> Candidate:
    """`genome` with one block drawn anew: width within the neighbours', FFN ratio, depth and the rest (paper section
    6); or with a block more or less; or with one choice of its frame changed."""
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
    """Another value in one of the frame's choices; blocks of a width not allowed there get the nearest that is."""
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
