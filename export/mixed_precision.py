"""Mixed precision: which matrices of an int4 model are upgraded to int8, within a number of bytes or of nats.

Matrices that the graph writes as one product (query, key, value; gate, up) are upgraded together. What an upgrade
saves is estimated from gradients (`merino_edge.export.sensitivity`); a limit in nats is also measured.
"""

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
from merino_edge.weights import group_by_input

SENSITIVITY_POSITIONS = 192  # of the text, for the estimate
MARGIN = 0.85  # share of the nats asked for; the rest is for what the graph itself rounds

Measure = Callable[[Sequence["Upgrade"]], float]  # the KL [nats per position] of a model with these upgrades


@dataclass(frozen=True)
class Upgrade:
    """int8 instead of int4 for the matrices of one product; `matrices`: those at int8, by name."""

    matrices: Mapping[str, QuantizedMatrix]
    saved_kl: float  # nats per position, estimated
    added_bytes: int


def upgraded_matrices(
    checkpoint: Checkpoint,
    int4: StoredWeights,
    target: Target,
    tokens: Sequence[int],
    context: int,
    *,
    max_kl: float | None,
    spare_bytes: int | None,
    on_step: Callable[[str], None] = lambda step: None,
) -> dict[str, QuantizedMatrix]:
    """The matrices of `int4` that become int8, by name.

    With `spare_bytes` alone they are as many as fit. With `max_kl` they are as few as keep the KL within it, on
    `tokens` and over the windows that parity compares; `spare_bytes` then only has to have room for them.
    `on_step` is told how many are upgraded so far. Raises UnsupportedError where the limits cannot be met.
    """
    if spare_bytes is not None and spare_bytes < 0:
        raise UnsupportedError(
            f"the bundle is {-spare_bytes / 1e6:.1f} MB over --max-mb with all matrices at int4", "ask for more"
        )
    a = checkpoint.architecture
    sample = np.asarray(tokens)[: min(SENSITIVITY_POSITIONS, a.max_positions)]
    candidates = upgrade_candidates(checkpoint, int4, target, sample)
    if max_kl is None:
        assert spare_bytes is not None
        return _matrices_of(upgrades_within_bytes(candidates, spare_bytes))
    text = np.resize(np.asarray(tokens, np.int64), context)
    windows = parity.windows(context)
    columns = slice(None) if int4.pruned_vocab is None else int4.pruned_vocab
    expected = parity.TorchReference(a, checkpoint.weights).windows(text, windows)[:, columns]

    def measure(upgrades: Sequence[Upgrade]) -> float:
        stored = replace(int4, quantized=int4.quantized | _matrices_of(upgrades))
        got = parity.stored_reference(a, stored).windows(text, windows)[:, columns]
        return parity.mean_kl(expected, got)

    upgrades = upgrades_within_kl(candidates, max_kl, measure, on_step)
    if spare_bytes is not None and (excess := sum(upgrade.added_bytes for upgrade in upgrades) - spare_bytes) > 0:
        raise UnsupportedError(
            f"--max-kl {max_kl} takes {excess / 1e6:.1f} MB more than --max-mb", "give up one of them"
        )
    return _matrices_of(upgrades)


def _matrices_of(upgrades: Iterable[Upgrade]) -> dict[str, QuantizedMatrix]:
    return {name: matrix for upgrade in upgrades for name, matrix in upgrade.matrices.items()}


def upgrade_candidates(
    checkpoint: Checkpoint, int4: StoredWeights, target: Target, tokens: np.ndarray
) -> list[Upgrade]:
    """The upgrade of every product that `int4` stores at int4, with its saving estimated on `tokens` [T]."""
    weights = checkpoint.weights
    low = {name: matrix for name, matrix in int4.quantized.items() if matrix.bits == 4}
    high = {name: quantize_matrix(name, weights[name], 8, target) for name in low}
    forms = {unit: [{name: form[name] for name in unit} for form in (low, high)] for unit in group_by_input(low)}
    costs = rounding_costs(checkpoint.architecture, weights, forms, tokens)
    candidates = []
    for unit, (before, after) in forms.items():
        added_bytes = sum(after[name].stored_bytes - before[name].stored_bytes for name in unit)
        candidates.append(Upgrade(after, saved_kl=costs[unit][0] - costs[unit][1], added_bytes=added_bytes))
    return candidates


def upgrades_within_kl(
    candidates: Iterable[Upgrade], max_kl: float, measure: Measure, on_step: Callable[[str], None]
) -> list[Upgrade]:
    """The fewest upgrades, in order of nats per byte, with a measured KL within `MARGIN` of `max_kl`.

    Raises UnsupportedError where all of them are not enough.
    """
    ranked = by_kl_per_byte(candidates)
    goal, upgrades = MARGIN * max_kl, list[Upgrade]()
    while (kl := measure(upgrades)) > goal:
        remaining = ranked[len(upgrades) :]
        if not remaining:
            raise UnsupportedError(
                f"with all matrices at int8 it still costs {kl:.2g} nats, {goal:.2g} are asked for",
                "export --precision fp16, or give a greater --max-kl",
            )
        # The estimates err by about the same factor for all, so they tell well which share of the KL has to go.
        still_to_save = sum(upgrade.saved_kl for upgrade in remaining)
        upgrades = upgrades + upgrades_saving(remaining, still_to_save * (1 - goal / kl))
        on_step(f"{len(upgrades)} of {len(ranked)} products at int8")
    return upgrades


def by_kl_per_byte(upgrades: Iterable[Upgrade]) -> list[Upgrade]:
    """The upgrades that save most nats per byte first."""
    return sorted(upgrades, key=lambda upgrade: -upgrade.saved_kl / upgrade.added_bytes)


def upgrades_within_bytes(candidates: Iterable[Upgrade], spare_bytes: float) -> list[Upgrade]:
    """The upgrades that fit, in order of nats per byte; one that no longer fits is skipped."""
    upgrades = []
    for candidate in by_kl_per_byte(candidates):
        if candidate.saved_kl > 0 and candidate.added_bytes <= spare_bytes:
            upgrades.append(candidate)
            spare_bytes -= candidate.added_bytes
    return upgrades


def upgrades_saving(candidates: Iterable[Upgrade], kl: float) -> list[Upgrade]:
    """The first of `candidates`, at least one, that together save `kl` [nats per position]; all if they save less."""
    upgrades: list[Upgrade] = []
    for candidate in candidates:
        if upgrades and kl <= 0:
            break
        upgrades.append(candidate)
        kl -= candidate.saved_kl
    return upgrades
