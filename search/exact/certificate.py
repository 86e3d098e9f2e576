"""The certificate of a search: a proven upper bound on the score, and what its solver knew in the end."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from merino_edge.search.space import Candidate

Floats = NDArray[np.float64]


class Known(NamedTuple):
    """What a solver knows at its end, for the same problem under higher limits."""

    candidate: Candidate | None
    score: float  # of the candidate, on the scores' grid
    raw: dict[tuple[object, ...], Floats]  # scores of block choices
    scores: dict[tuple[object, ...], Floats]  # the same, on the grid
    multipliers: dict[tuple[object, ...], dict[int, Floats]]


@dataclass(frozen=True)
class Certificate:
    """A proven bound on the score, and the best candidate found.

    No architecture of the space within the budgets scores above `bound`. The bound is minus infinity where none meets
    the budgets. `candidate` is None where none was found.
    """

    candidate: Candidate | None
    score: float
    bound: float
    subproblems: int  # how many subproblems there were
    solved: int  # how many of them label setting had to solve; bounds excluded the others
    labels: int
    seconds: float
    proof: dict[str, Any] = field(default_factory=dict, repr=False)  # as JSON (merino_edge.search.exact.proof)
    known: Known | None = field(default=None, repr=False, compare=False)

    @property
    def infeasible(self) -> bool:
        """Whether it is proven that no architecture meets the budgets."""
        return self.candidate is None and self.bound == -math.inf

    @property
    def gap_percent(self) -> float:
        """How far the bound is above the score, in percent; 0 is a proof of optimality."""
        if self.bound <= self.score:
            return 0.0
        return 100 * (self.bound - self.score) / abs(self.score) if math.isfinite(self.score * self.bound) else math.inf
