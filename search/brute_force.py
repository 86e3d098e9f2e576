"""Brute force: try every architecture of a small space. It serves user scores that are not sums over blocks."""

from __future__ import annotations

import math
import time

from merino_edge.search.exact.certificate import Certificate
from merino_edge.search.exact.solver import OnProgress
from merino_edge.search.problem import Problem

PROGRESS_EVERY = 1000  # candidates


def brute_force(
    problem: Problem, seconds: float | None = None, on_progress: OnProgress = lambda *_: None
) -> Certificate:
    """The best candidate of the whole space, with its proof; after `seconds` the best so far, without a proof."""
    began, size, tried = time.monotonic(), problem.space.size, 0
    best, score, templates = None, -math.inf, set(problem.templates)
    for candidate in problem.space.candidates():
        if tried % PROGRESS_EVERY == 0:
            on_progress("trying all", score, math.inf)
            if seconds is not None and time.monotonic() - began > seconds:
                break
        tried += 1
        if candidate.template not in templates or not problem.feasible(candidate):
            continue
        if (total := problem.total(candidate)) > score:
            best, score = candidate, total
    bound = score if tried == size else math.inf
    elapsed = time.monotonic() - began
    return Certificate(best, score, bound, subproblems=size, solved=tried, labels=0, seconds=elapsed)
