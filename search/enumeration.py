"""Every architecture of a small space, one by one: for a user's score that is no sum over blocks."""

from __future__ import annotations

import math
import time

from merino_edge.search.exact import Certificate, Note
from merino_edge.search.problem import Problem

NOTE_EVERY = 1000


def enumerate_all(problem: Problem, note: Note = lambda *_: None) -> Certificate:
    """The best of all, with its proof."""
    began, best, score, frames = time.monotonic(), None, -math.inf, set(problem.frames)
    for count, genome in enumerate(problem.space.genomes()):
        if count % NOTE_EVERY == 0:
            note("trying all", score, math.inf)
        if genome.frame in frames and problem.feasible(genome) and (total := problem.total(genome)) > score:
            best, score = genome, total
    return Certificate(best, score, score, problem.space.size, problem.space.size, 0, time.monotonic() - began)
