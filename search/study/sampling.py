"""Stratified sampling of a space for a study: architectures spread evenly over the logarithm of decoder parameters.

In a uniform sample nearly all architectures have the largest size, so a rank correlation over them says little. This
module knows no scores and no training.
"""

from __future__ import annotations

import dataclasses
import math
import random

from merino_edge import counts, limits
from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.search.space import Space

TRIES = 400  # uniform draws per architecture of the sample


def decoder_parameters(a: Architecture) -> int:
    """The stored parameters of the decoder's layers, where shared ones count once, and of the width projections."""
    return counts.parameters(a) - counts.end_parameters(a)


def stratified_sample(
    space: Space, count: int, *, seed: int = 0, min_parameters: float = 0, max_parameters: float = math.inf
) -> list[Architecture]:
    """Draw `count` different architectures with `min_parameters` to `max_parameters` decoder parameters.

    The logarithm of parameters is divided into `count` equal intervals. One architecture comes from each, where the
    space has one there. The smallest is first. The same arguments give the same sample. Raises InputError if the space
    has fewer than `count` architectures within the bounds.
    """
    limits.check_range("architectures", count, 1, limits.MAX_POPULATION)
    rng = random.Random(seed)
    drawn = {}
    for blocks in space.blocks:  # equal draws for each, because most of a space has the most blocks
        part = dataclasses.replace(space, blocks=(blocks,))
        for _ in range(TRIES * count // len(space.blocks)):
            a = part.architecture(part.sample(rng))
            if min_parameters <= decoder_parameters(a) <= max_parameters:
                drawn[a.id] = a
    if len(drawn) < count:
        bounds = f"{min_parameters:,.0f} to {max_parameters:,.0f} decoder parameters"
        raise InputError(f"space {space.name} gave {len(drawn)} of {count} architectures of {bounds}", "ask for fewer")
    rest = sorted(drawn.values(), key=lambda a: (decoder_parameters(a), a.id))
    low, high = math.log(decoder_parameters(rest[0])), math.log(decoder_parameters(rest[-1]))
    sample = []
    for k in range(count):  # take the nearest to a random point of the k-th interval, without replacement
        point = low + (high - low) * (k + rng.random()) / count
        nearest = min(rest, key=lambda a: abs(math.log(decoder_parameters(a)) - point))
        rest.remove(nearest)
        sample.append(nearest)
    return sorted(sample, key=decoder_parameters)
