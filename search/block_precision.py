"""The precision of a block's weights as a choice of a search, and the share of the block's score that it costs.

A rounded layer counts as a little less than a layer. How much less is the ratio of two measurements on trained models:
the nats that rounding costs, and the nats that layers are worth.

    lost = 1 - exp(-NATS[precision] / NATS_PER_LOG_PARAMETERS)

So a model whose blocks are all rounded scores as one with that share fewer layers of the same shape. The loss of a
model is the sum over its blocks, each in proportion to its score. docs/search.md says how far that holds.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from merino_edge.errors import InputError

# What rounding all blocks costs in nats per token: of the longest trained of the models in docs/search.md. Others lost
# less. `benchmarks/bits_loss.py` measures it for any checkpoint.
NATS = {"fp32": 0.0, "fp16": 0.0, "int8": 0.0001, "int4": 0.025}
# How much lower the loss is for each e-fold of decoder parameters, at equal tokens (docs/study.md, two studies).
NATS_PER_LOG_PARAMETERS = 0.224


@dataclass(frozen=True)
class BlockPrecision:
    """A precision of a block's weights. `lost`: the share of the block's score that rounding to it costs."""

    name: str
    lost: float


def parse_bits(text: str) -> tuple[BlockPrecision, ...]:
    """The precisions of int8,int4=0.1: names, each with the share that it loses if not the measured one.

    Raises InputError. A space checks names and shares.
    """
    precisions = []
    for item in text.split(","):
        name, given, share = item.strip().partition("=")
        precision = measured(name)
        try:
            precisions.append(replace(precision, lost=float(share)) if given else precision)
        except ValueError:
            raise InputError(f"--bits {text!r}: {item!r} is no precision", "write NAME or NAME=SHARE") from None
    return tuple(precisions)


def measured(name: str) -> BlockPrecision:
    """The precision with the loss that was measured; an unknown one has none, and a space refuses it."""
    return BlockPrecision(name, -math.expm1(-NATS.get(name, 0.0) / NATS_PER_LOG_PARAMETERS))
