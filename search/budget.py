"""What a search must not exceed: `Budget`, and what each architecture of a space costs, as sums.

`cost_tables` turns a space into one `AdditiveCost` per metric: a number per gene, per width change and
per pair of outer widths. Adding them gives the same value as the whole architecture's count
(`merino_edge.counts`) or predicted latency, and makes the least cost of a space computable exactly.
It does not know the score.

| metric | unit | from |
|---|---|---|
| parameters | count | `counts.parameters` |
| weight_mb | 10^6 bytes at the precision | `counts.weight_bytes` |
| flops | FLOPs, sequence 1024, head excluded (paper section 6) | `counts.flops` |
| decode_ms, prefill_ms | milliseconds at the latency table's lengths | the latency table |
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from merino_edge import counts
from merino_edge.architecture import Architecture, Block
from merino_edge.errors import BudgetError, InputError
from merino_edge.search.space import Genome, Space

FLOPS_SEQUENCE = 1024
METRICS = ("parameters", "weight_mb", "flops", "decode_ms", "prefill_ms")
OPTIONS = dict(zip(METRICS, ("--params", "--weight-mb", "--flops", "--decode-ms", "--prefill-ms"), strict=True))
_SUFFIXES = {"K": 1e3, "M": 1e6, "G": 1e9, "B": 1e9, "T": 1e12}


class Latencies(Protocol):
    """What a search needs of a latency table; `mode` is "decode" or "prefill"."""

    @property
    def precision(self) -> str: ...
    def block_ms(self, a: Architecture, block: Block, mode: str) -> float: ...
    def width_change_ms(self, before: int, after: int, mode: str) -> float: ...
    def end_ms(self, a: Architecture, mode: str) -> float: ...


def parse_quantity(text: str, name: str = "quantity") -> float:
    """A positive number, as "5", "0.5", "60M" or "1.5G" (K, M, G = B, T). Raises InputError naming `name`."""
    text = text.strip()
    suffix = text[-1:].upper()
    digits, factor = (text[:-1], _SUFFIXES[suffix]) if suffix in _SUFFIXES else (text, 1.0)
    try:
        value = float(digits) * factor
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise InputError(f"{name} {text!r} is not a positive number", "write it as 5, 0.5, 60M or 1.5G")
    return value


def spell_quantity(value: float) -> str:
    """`value` rounded up to four digits, in the form that `parse_quantity` reads: 39.75M."""
    factor, suffix = next(((_SUFFIXES[s], s) for s in "TGMK" if value >= _SUFFIXES[s]), (1.0, ""))
    step = 10.0 ** (math.floor(math.log10(value / factor)) - 3) if value > 0 else 1.0
    return f"{math.ceil(value / factor / step) * step:.6g}{suffix}"


@dataclass(frozen=True)
class Budget:
    """The most an architecture may cost in each metric; None: unbounded. Raises InputError unless positive."""

    parameters: float | None = None
    weight_mb: float | None = None
    flops: float | None = None
    decode_ms: float | None = None
    prefill_ms: float | None = None

    def __post_init__(self) -> None:
        for metric, limit in self.limits.items():
            if not 0 < limit < math.inf:
                raise InputError(f"budget {metric} is {limit}", f"give {OPTIONS[metric]} a positive number")

    @property
    def limits(self) -> dict[str, float]:
        """The bounded metrics only."""
        return {metric: limit for metric, limit in dataclasses.asdict(self).items() if limit is not None}


@dataclass(frozen=True)
class AdditiveCost:
    """One metric over a space of G genes and W widths (both ascending in width)."""

    genes: tuple[float, ...]  # [G]
    changes: tuple[tuple[float, ...], ...]  # [W, W]: from, to
    ends: tuple[tuple[float, ...], ...]  # [W, W]: first, last
    scale: float = 1.0  # table units per unit of the metric (bytes in a megabyte)

    def total(self, genome: Genome, widths: Genome) -> float:
        """The cost of a genome; `widths` are its width indices."""
        total = self.ends[widths[0]][widths[-1]]
        before = widths[0]
        for gene, after in zip(genome, widths, strict=True):
            total += self.genes[gene] + self.changes[before][after]
            before = after
        return total / self.scale

    def cheapest(self, space: Space) -> Genome:
        """A genome of least cost, exactly: dynamic programming over widths, once per first width."""
        per_width, count = space.genes_per_width, len(space.widths)
        best_gene = [min(range(w * per_width, (w + 1) * per_width), key=self.genes.__getitem__) for w in range(count)]
        found: list[tuple[float, Genome]] = []
        for first in range(count):
            # by last width
            paths: dict[int, tuple[float, Genome]] = {first: (self.genes[best_gene[first]], (best_gene[first],))}
            for _ in range(space.blocks - 1):
                paths = {
                    after: min(
                        (cost + self.changes[before][after] + self.genes[best_gene[after]], (*genome, best_gene[after]))
                        for before, (cost, genome) in paths.items()
                        if before <= after
                    )
                    for after in range(first, count)
                }
            found += [(cost + self.ends[first][last], genome) for last, (cost, genome) in paths.items()]
        return min(found)[1]


def cost_tables(space: Space, precision: str, latencies: Latencies | None = None) -> dict[str, AdditiveCost]:
    """Every metric's cost over `space`; the latencies only with a table. Raises InputError where the
    precision is unknown, or the table has another or does not cover the space."""
    counts.check_precision(precision)
    if latencies is not None and latencies.precision != precision:
        raise InputError(
            f"the latency table was measured in {latencies.precision}, not {precision}", "leave --precision out"
        )
    matrix_bytes = counts.MATRIX_BYTES[precision]

    def table(
        block: Callable[[Architecture, Block], float],
        change: Callable[[int, int], float],
        end: Callable[[Architecture], float],
        scale: float = 1.0,
    ) -> AdditiveCost:
        genes = tuple(block(space.model, gene) for gene in space.genes)
        indices, per_width = range(len(space.widths)), space.genes_per_width

        def upper(of: Callable[[int, int], float]) -> tuple[tuple[float, ...], ...]:
            return tuple(tuple(of(i, j) if i <= j else math.inf for j in indices) for i in indices)

        changes = upper(lambda i, j: change(space.widths[i], space.widths[j]))
        # Both ends depend on the outer widths alone, so two blocks stand for any number of them.
        ends = upper(lambda i, j: end(space.architecture((i * per_width, j * per_width))))
        return AdditiveCost(genes, changes, ends, scale)

    tables = {
        "parameters": table(counts.block_parameters, counts.width_change_parameters, counts.end_parameters),
        "weight_mb": table(
            lambda a, block: counts.block_weight_bytes(a, block, precision),
            lambda before, after: counts.width_change_parameters(before, after) * matrix_bytes,
            lambda a: counts.end_weight_bytes(a, precision),
            scale=1e6,
        ),
        "flops": table(
            lambda a, block: counts.block_flops(a, block, FLOPS_SEQUENCE),
            lambda before, after: 2 * FLOPS_SEQUENCE * counts.width_change_parameters(before, after),
            lambda a: 0,
        ),
    }
    if latencies is not None:
        for mode in ("decode", "prefill"):
            tables[f"{mode}_ms"] = table(
                lambda a, block, mode=mode: latencies.block_ms(a, block, mode),  # type: ignore[misc]
                lambda before, after, mode=mode: latencies.width_change_ms(before, after, mode),  # type: ignore[misc]
                lambda a, mode=mode: latencies.end_ms(a, mode),  # type: ignore[misc]
            )
    return tables


def cheapest_genomes(space: Space, budget: Budget, tables: dict[str, AdditiveCost]) -> list[Genome]:
    """For each bounded metric the genome of least cost. Raises BudgetError naming every budget that no
    architecture of the space meets and the least value that one does, InputError for a latency without a table."""
    genomes, impossible = [], []
    for metric, limit in budget.limits.items():
        if metric not in tables:
            hint = "run: merino-edge profile --device cpu --out T.jsonl, then add --table T.jsonl"
            raise InputError(f"{OPTIONS[metric]} needs a latency table", hint)
        genome = tables[metric].cheapest(space)
        least = tables[metric].total(genome, space.width_indices(genome))
        genomes.append(genome)
        if least > limit:
            impossible.append((metric, limit, least))
    if impossible:
        what = " and ".join(
            f"{metric} {spell_quantity(limit)} (the least possible is {spell_quantity(least)})"
            for metric, limit, least in impossible
        )
        options = " and ".join(OPTIONS[metric] for metric, *_ in impossible)
        raise BudgetError(f"no architecture of space {space.name} meets {what}", f"raise {options}")
    return genomes


def refuse_together(space: Space, budget: Budget, closest: dict[str, float]) -> BudgetError:
    """The error for budgets that can be met one by one, but were not met together."""
    exceeded = [metric for metric, limit in budget.limits.items() if closest[metric] > limit]
    together = ", ".join(f"{metric} {spell_quantity(limit)}" for metric, limit in budget.limits.items())
    what = ", ".join(f"{metric} {spell_quantity(closest[metric])}" for metric in budget.limits)
    return BudgetError(
        f"no architecture of space {space.name} was found that meets {together} together (the closest has {what})",
        f"raise {' or '.join(OPTIONS[metric] for metric in exceeded)}",
    )
