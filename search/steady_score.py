"""A user's score must be a function: one architecture has one value, whenever and however it is asked for.

A search asks for the parts of a score in its own order. The order, the time and the model's other blocks may not change
a value. Else the search proves something about another score than the one that is printed.
"""

from __future__ import annotations

import math
import random

from merino_edge.errors import InputError
from merino_edge.search.problem import Problem
from merino_edge.search.space import Candidate

SAMPLES = 32
TOLERANCE = 1e-9  # share of a score by which two sums of the same parts may differ


def check_steady(problem: Problem) -> None:
    """Score some random candidates again and again, in two orders. Raises InputError where two values differ."""
    if "source_sha256" not in problem.score.details:
        return  # ours
    rng = random.Random(0)
    drawn = [problem.space.sample(rng) for _ in range(SAMPLES)]
    values = [problem.total(candidate) for candidate in drawn]
    for candidate, value in reversed(list(zip(drawn, values, strict=True))):
        require_equal(problem, value, problem.total(candidate))
        if problem.score.block is not None:
            require_equal(problem, value, _by_parts(problem, candidate))


def require_equal(problem: Problem, value: float, again: float) -> None:
    """Raise InputError unless both are the score of one architecture."""
    if abs(value - again) > TOLERANCE * max(abs(value), abs(again)):
        raise InputError(
            f"score {problem.score.spec} gives {value:.10g} and also {again:.10g} for one architecture",
            "it must depend on nothing but its arguments, and not on the model's own blocks",
        )


def _by_parts(problem: Problem, candidate: Candidate) -> float:
    """The score as the solver adds it up: every block by itself, here the last one first."""
    space, score = problem.space, problem.score
    blocks = [space.block_choices[choice] for choice in candidate.choices]
    depth = sum(block.layers for block in blocks)
    cut = min(space.templates[candidate.template].embedding_width, blocks[0].width)
    parts = []
    for choice, block in reversed(list(zip(candidate.choices, blocks, strict=True))):
        model, lost = space.models[candidate.template], space.lost_of(choice)
        parts.append(score.block_total(model, block, depth, cut, lost))
    return score.factor(blocks[-1].width) * math.fsum(parts)
