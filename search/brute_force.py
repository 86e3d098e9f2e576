"""Every architecture of a small space, one by one: for a user's score that is no sum over blocks."""

from __future__ import annotations

import math
import time

from merino_edge.search.exact.solver import Certificate, Note
from merino_edge.search.problem import Problem

NOTE_EVERY = 1000


def brute_force(problem: Problem, seconds: float | None = None, note: Note = lambda *_: None) -> Certificate:
    """The best of all, with its proof; after `seconds` the best so far, without."""
    began, size = time.monotonic(), problem.space.size
    best, score, templates = None, -math.inf, set(problem.templates)
    for count, candidate in enumerate(problem.space.candidates()):
        if count % NOTE_EVERY == 0:
            note("trying all", score, math.inf)
            if seconds is not None and time.monotonic() - began > seconds:
                return Certificate(best, score, math.inf, size, count, 0, time.monotonic() - began)
        if (
            candidate.template in templates
            and problem.feasible(candidate)
            and (total := problem.total(candidate)) > score
        ):
            best, score = candidate, total
    return Certificate(best, score, score, size, size, 0, time.monotonic() - began)
