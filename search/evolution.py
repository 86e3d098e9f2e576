"""The paper's evolutionary algorithm (MeRino, AAAI 2025; paper section 6), seeded and reproducible.

Random architectures start the population; each iteration mutates one block of a random parent and
keeps the child if it is better than the worst. Where the text is silent: no genome stands in the
population twice, the cheapest architecture of each budgeted metric is there from the start, and an
architecture over budget ranks below every one within, by how far over it is, so that tight budgets
are approached rather than waited for.

One departure: half of the children have a second block mutated. Under a tight budget one block can
grow only where another shrinks; with single mutations most seeds end below the optimum.

It proves nothing: the best it saw is not always the best there is.
"""

from __future__ import annotations

import random
import time
from bisect import insort
from collections.abc import Callable
from dataclasses import dataclass

from merino_edge import limits
from merino_edge.architecture import Architecture
from merino_edge.search.budget import AdditiveCost, Budget, Latencies, cheapest_genomes, cost_tables, refuse_together
from merino_edge.search.entropy import Hyperparameters, Score, block_score, score
from merino_edge.search.space import Genome, Space

SECOND_MUTATION = 0.5  # probability
CLOUD_POINTS = 4000


@dataclass(frozen=True)
class SearchResult:
    """The best architecture found, what it scores and costs, and how the search went."""

    architecture: Architecture
    score: Score
    costs: dict[str, float]  # by metric, see merino_edge.search.budget
    iterations: int
    seconds: float
    history: tuple[tuple[int, float], ...]  # (iteration, best score from then on)
    binding: str  # the budgeted metric nearest to its limit; parameters where nothing is budgeted
    cloud: tuple[tuple[float, float], ...]  # (binding metric, score) of a sample of visited architectures


class Evaluator:
    """Scores and costs of genomes by table lookup."""

    def __init__(
        self, space: Space, budget: Budget, tables: dict[str, AdditiveCost], hyperparameters: Hyperparameters
    ) -> None:
        self.space, self.tables, self.hyperparameters = space, tables, hyperparameters
        self.limited = [(tables[metric], limit) for metric, limit in budget.limits.items()]
        self._layers = [gene.layers for gene in space.genes]
        self._scores: dict[int, list[float]] = {}  # total depth -> score of each gene

    def score(self, genome: Genome) -> float:
        depth = sum([self._layers[gene] for gene in genome])
        scores = self._scores.get(depth)
        if scores is None:
            model, constants = self.space.model, self.hyperparameters
            scores = [block_score(model, gene, depth, constants).total for gene in self.space.genes]
            self._scores[depth] = scores
        return sum([scores[gene] for gene in genome])

    def excess(self, genome: Genome) -> float:
        """How far over the budgets, as a sum of fractions of each; 0 within."""
        widths = self.space.width_indices(genome)
        return sum([max(0.0, table.total(genome, widths) / limit - 1) for table, limit in self.limited])

    def rank(self, genome: Genome) -> float:
        """The score within the budgets, below zero outside."""
        return -excess if (excess := self.excess(genome)) > 0 else self.score(genome)

    def costs(self, genome: Genome) -> dict[str, float]:
        widths = self.space.width_indices(genome)
        costs = {metric: table.total(genome, widths) for metric, table in self.tables.items()}
        return {**costs, **{metric: int(costs[metric]) for metric in ("parameters", "flops")}}


def evolve(
    space: Space,
    budget: Budget,
    *,
    latencies: Latencies | None = None,
    precision: str = "fp16",
    hyperparameters: Hyperparameters | None = None,
    iterations: int = 100_000,
    population: int = 512,
    parents: int = 64,
    seed: int = 0,
    on_progress: Callable[[int, float], None] | None = None,
) -> SearchResult:
    """Search `space` for the highest score within `budget`.

    `precision` is that of weight_mb; a latency table must have the same. `on_progress` is called with
    (iteration, best score) now and then. Raises BudgetError where nothing meets the budgets,
    InputError where a latency is budgeted without `latencies` or an argument is out of range.
    """
    limits.check_range("iterations", iterations, 0, limits.MAX_ITERATIONS)
    limits.check_range("population", population, 1, limits.MAX_POPULATION)
    limits.check_range("parents", parents, 1, population)
    limits.check_range("seed", seed, 0, limits.MAX_SEED)
    started = time.monotonic()
    rng = random.Random(seed)
    constants = hyperparameters or Hyperparameters()
    tables = cost_tables(space, precision, latencies)
    members = set(cheapest_genomes(space, budget, tables))
    evaluator = Evaluator(space, budget, tables, constants)
    while len(members) < min(population, space.size):
        members.add(space.sample(rng))
    ranked = sorted((evaluator.rank(genome), genome) for genome in members)  # worst first

    history = [(0, ranked[-1][0])]
    visited: list[Genome] = []
    stride = max(1, iterations // CLOUD_POINTS)
    for iteration in range(1, iterations + 1):
        parent = ranked[-1 - int(rng.random() * min(parents, len(ranked)))][1]
        child = space.mutate(parent, rng)
        if rng.random() < SECOND_MUTATION:
            child = space.mutate(child, rng)
        if iteration % stride == 0:
            visited.append(child)
            if on_progress:
                on_progress(iteration, history[-1][1])
        if child in members:
            continue
        entry = (evaluator.rank(child), child)
        if entry > ranked[0]:
            insort(ranked, entry)
            members.add(child)
            members.remove(ranked.pop(0)[1])
            if entry[0] > history[-1][1]:
                history.append((iteration, entry[0]))

    best_rank, best = ranked[-1]
    costs = evaluator.costs(best)
    if best_rank < 0:
        raise refuse_together(space, budget, costs)
    binding = max(budget.limits, key=lambda metric: costs[metric] / budget.limits[metric], default="parameters")
    architecture = space.architecture(best)
    return SearchResult(
        architecture=architecture,
        score=score(architecture, constants),
        costs=costs,
        iterations=iterations,
        seconds=time.monotonic() - started,
        history=tuple((iteration, rank) for iteration, rank in history if rank >= 0),
        binding=binding,
        cloud=tuple((evaluator.costs(genome)[binding], evaluator.score(genome)) for genome in visited),
    )
