"""Architectures of a space for a study: drawn at random, spread evenly over the logarithm of decoder parameters.

Drawn uniformly, nearly all of a space would be of its largest size: a rank correlation over them says little. It knows
no scores and no training.
"""

from __future__ import annotations

import dataclasses
import math
import random

from merino_edge import counts, limits
from merino_edge.architecture import Architecture
from merino_edge.errors import InputError
from merino_edge.search.space import Space

TRIES = 400  # uniform draws for each architecture wanted


def decoder_parameters(a: Architecture) -> int:
    """Stored parameters of the decoder's layers, shared ones once, and of the projections between blocks."""
    return counts.parameters(a) - counts.end_parameters(a)


def stratified_sample(
    space: Space, count: int, seed: int = 0, least: float = 0, most: float = math.inf
) -> list[Architecture]:
    """`count` different architectures with `least` to `most` decoder parameters, smallest first; the same for the same
    arguments. One from each of `count` equal intervals of log parameters, where the space has one there.

    Raises InputError where the space, within these bounds, has fewer than `count`.
    """
    limits.check_range("architectures", count, 1, limits.MAX_POPULATION)
    rng = random.Random(seed)
    found = {}
    for blocks in space.blocks:  # as many draws for each: nearly all of a space has as many blocks as it may
        part = dataclasses.replace(space, blocks=(blocks,))
        for _ in range(TRIES * count // len(space.blocks)):
            a = part.architecture(part.sample(rng))
            if least <= decoder_parameters(a) <= most:
                found[a.id] = a
    if len(found) < count:
        bounds = f"{least:,.0f} to {most:,.0f} decoder parameters"
        raise InputError(f"space {space.name} gave {len(found)} of {count} architectures of {bounds}", "ask for fewer")
    rest = sorted(found.values(), key=lambda a: (decoder_parameters(a), a.id))
    low, high = math.log(decoder_parameters(rest[0])), math.log(decoder_parameters(rest[-1]))
    chosen = []
    for k in range(count):  # nearest to a random place of the k-th interval, of those not yet chosen
        place = low + (high - low) * (k + rng.random()) / count
        nearest = min(rest, key=lambda a: abs(math.log(decoder_parameters(a)) - place))
        rest.remove(nearest)
        chosen.append(nearest)
    return sorted(chosen, key=decoder_parameters)
