"""Which matrices of an int4 model are worth int8, so that it fits a number of bytes or of nats."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from merino_edge.checkpoint import Checkpoint
from merino_edge.errors import UnsupportedError
from merino_edge.export import parity
from merino_edge.export.quantization.quantized_matrix import QuantizedMatrix
from merino_edge.export.quantization.stored_weights import StoredWeights, quantize_matrix
from merino_edge.export.sensitivity import rounding_costs
from merino_edge.export.targets import Target
from merino_edge.weights import with_shared_inputs

LOOKED_AT = 192  # positions of the text
MARGIN = 0.85  # of the nats asked for; the rest is for what the graph itself rounds


@dataclass(frozen=True)
class Upgrade:
    """What int8 instead of int4 does to matrices that the graph writes as one: `high`, by name."""

    high: Mapping[str, QuantizedMatrix]
    saved_kl: float  # nats per position
    added_bytes: int


def upgraded_matrices(
    checkpoint: Checkpoint,
    plain: StoredWeights,
    target: Target,
    tokens: Sequence[int],
    context: int,
    max_kl: float | None,
    spare_bytes: int | None,
    on_step: Callable[[str], None],
) -> dict[str, QuantizedMatrix]:
    """The int4 matrices of `plain` that become int8, so: as many as `spare_bytes` has room for, or as few as keep
    the KL on `tokens`, over the windows that parity looks at, within `max_kl`; with both, as few, if there is room.

    Raises UnsupportedError where neither is possible.
    """
    if spare_bytes is not None and spare_bytes < 0:
        raise UnsupportedError(
            f"the bundle is {-spare_bytes / 1e6:.1f} MB over --max-mb with all matrices at int4", "ask for more"
        )
    a = checkpoint.architecture
    candidates = upgrade_candidates(checkpoint, plain, target, np.asarray(tokens)[: min(LOOKED_AT, a.max_positions)])
    if max_kl is None:
        assert spare_bytes is not None
        return _together(upgrades_within_bytes(candidates, spare_bytes))
    text = np.resize(np.asarray(tokens, np.int64), context)
    places = parity.windows(context)
    columns = slice(None) if plain.pruned_vocab is None else plain.pruned_vocab
    expected = parity.TorchReference(a, checkpoint.weights).windows(text, places)[:, columns]

    def measured(chosen: Sequence[Upgrade]) -> float:
        stored = replace(plain, quantized=plain.quantized | _together(chosen))
        got = parity.stored_reference(a, stored).windows(text, places)[:, columns]
        return parity.mean_kl(expected, got)

    chosen = upgrades_within_kl(candidates, max_kl, measured, on_step)
    if spare_bytes is not None and (over := sum(r.added_bytes for r in chosen) - spare_bytes) > 0:
        raise UnsupportedError(f"--max-kl {max_kl} takes {over / 1e6:.1f} MB more than --max-mb", "give up one of them")
    return _together(chosen)


def _together(chosen: Iterable[Upgrade]) -> dict[str, QuantizedMatrix]:
    return {name: matrix for r in chosen for name, matrix in r.high.items()}


def upgrade_candidates(checkpoint: Checkpoint, plain: StoredWeights, target: Target, tokens: np.ndarray) -> list[Upgrade]:
    """Of every unit that `plain` stores at int4, the cost measured on `tokens` [T]."""
    weights = checkpoint.weights
    low = {name: matrix for name, matrix in plain.quantized.items() if matrix.bits == 4}
    high = {name: quantize_matrix(name, weights[name], 8, target) for name in low}
    forms = {unit: [{name: kind[name] for name in unit} for kind in (low, high)] for unit in with_shared_inputs(low)}
    costs = rounding_costs(checkpoint.architecture, weights, forms, tokens)
    found = []
    for unit, (before, after) in forms.items():
        added = sum(after[name].stored_bytes - before[name].stored_bytes for name in unit)
        found.append(Upgrade(after, costs[unit][0] - costs[unit][1], added))
    return found


def upgrades_within_kl(
    candidates: Iterable[Upgrade],
    max_kl: float,
    measured: Callable[[Sequence[Upgrade]], float],
    on_step: Callable[[str], None],
) -> list[Upgrade]:
    """Those to raise so that `measured` [nats per position] is within `max_kl`. Raises UnsupportedError."""
    everything = by_kl_per_byte(candidates)
    goal, chosen = MARGIN * max_kl, list[Upgrade]()
    while (found := measured(chosen)) > goal:
        left = everything[len(chosen) :]
        if not left:
            raise UnsupportedError(
                f"with all matrices at int8 it still costs {found:.2g} nats, {goal:.2g} are asked for",
                "export --precision fp16, or give a greater --max-kl",
            )
        # The estimate errs by a factor, which is about the same for all: what share of it has to go is sure.
        still = sum(r.saved_kl for r in left)
        chosen = chosen + upgrades_saving(left, still * (1 - goal / found))
        on_step(f"{len(chosen)} of {len(everything)} products at int8")
    return chosen


def by_kl_per_byte(raises: Iterable[Upgrade]) -> list[Upgrade]:
    """Most nats per byte first."""
    return sorted(raises, key=lambda r: -r.saved_kl / r.added_bytes)


def upgrades_within_bytes(raises: Iterable[Upgrade], spare_bytes: float) -> list[Upgrade]:
    """The most worth that fits: in order of nats per byte, leaving out what no longer fits."""
    chosen = []
    for candidate in by_kl_per_byte(raises):
        if candidate.saved_kl > 0 and candidate.added_bytes <= spare_bytes:
            chosen.append(candidate)
            spare_bytes -= candidate.added_bytes
    return chosen


def upgrades_saving(raises: Iterable[Upgrade], kl: float) -> list[Upgrade]:
    """The first of `raises`, at least one, that save `kl` together, or all."""
    chosen: list[Upgrade] = []
    for candidate in raises:
        if chosen and kl <= 0:
            break
        chosen.append(candidate)
        kl -= candidate.saved_kl
    return chosen
