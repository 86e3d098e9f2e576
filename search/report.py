"""Reports of a search result for the terminal: tables, and what is proven."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from pathlib import Path
from typing import TYPE_CHECKING

from merino_edge import artefact
from merino_edge.search.budget import Metric
from merino_edge.search.result import SearchResult
from merino_edge.search.score import DEFAULT, narrowest_cut, parse_score
from merino_edge.search.space import Candidate
from merino_edge.storage import target_of_table

if TYPE_CHECKING:
    from rich.console import RenderableType

NARROW = 0.5  # share of the embedding's width; a narrower cut gets a warning


def summary(result: SearchResult) -> RenderableType:
    """A table of the blocks, and one of each cost beside its budget."""
    from rich.console import Group
    from rich.table import Table

    a, budgets, space = result.architecture, result.problem.budget.to_dict(), result.problem.space
    title = f"architecture {a.id}: {a.ffn}, vocabulary {a.vocab_size}, embedding {a.embedding_width}, "
    columns = ("block", "width", "layers", "heads", "kv heads", "FFN", *(["bits"] if space.precisions else []))
    columns = (*columns, *(["window"] if space.windows != (0,) else []))
    blocks = Table(*columns, title=f"{title}context {a.max_positions}")
    precisions = [[name] for name in result.precisions] or [[]] * len(a.blocks)
    for index, block in enumerate(a.blocks):
        layers = f"{block.layers}{' shared' if block.shared and block.layers > 1 else ''}"
        numbers = (block.heads, block.kv_heads, block.ffn_width)
        window = [str(block.window or "all")] if space.windows != (0,) else []
        blocks.add_row(str(index), str(block.width), layers, *map(str, numbers), *precisions[index], *window)
    target = result.config.target
    stored = f"bytes as {result.config.precision} is stored for {target}" if target else None
    costs = Table("cost", "found", "budget", "expected", "9 of 10 within", title=stored)
    intervals, expected = result.problem.intervals(result.candidate), result.problem.expected(result.candidate)
    estimated = result.config.table is not None and result.config.table.estimated
    for key, value in result.problem.costs(result.candidate).items():
        metric, limit = Metric.parse(key), budgets.get(key)
        note = " estimated" if estimated and metric.kind.latency else ""
        three = (value, limit, expected.get(key))
        shown = ["" if number is None else f"{number / metric.kind.unit:.4g}" for number in three]
        bounds = " to ".join(f"{bound / metric.kind.unit:.4g}" for bound in intervals.get(key, ()))
        costs.add_row(metric.label + note, *shown, bounds)
    return Group(blocks, costs)


def verdict(result: SearchResult) -> list[str]:
    """Lines that say how far the score is from the optimum, how that is known, and what the score does not see."""
    space, certificate, score = result.problem.space, result.certificate, result.config.score
    of = f"of the {space.size:,} architectures of space {space.name}"
    lines = [f"score {result.total:,.2f} ({score.spec})"]
    gap = result.gap_percent
    if certificate is None or gap is None:
        lines.append(f"nothing is proven: {score.spec} is not a sum over blocks")
    elif not math.isfinite(gap):
        lines.append(f"nothing is proven yet: stopped after {certificate.seconds:.1f} s, before there was a bound")
    else:
        percent = f"{gap:.3g}" if gap < 1000 else f"{gap:,.0f}"
        claim = "optimal" if gap == 0 else f"the proven bound is {percent} % higher"
        lines[0] += f", {claim}: none {of} within the budgets scores above {certificate.bound:,.2f}"
        effort = "every architecture tried"
        if score.block:
            effort = (
                f"{certificate.subproblems:,} subproblems, {certificate.solved:,} solved, {certificate.labels:,} labels"
            )
        lines.append(f"gap {percent} %, proven in {certificate.seconds:.1f} s ({effort})")
    if result.evolution is not None:
        lines.append(f"found by {result.evolution.iterations:,} iterations of evolution")
    counts_text = any(metric.name in ("text_ms", "first_token_ms") for metric in result.problem.budget.metrics)
    if len(space.windows) > 1:
        lines.append(f"{score.spec} does not see windows: cost alone chose them")
    if len(space.vocabularies) > 1 and not counts_text:
        lines.append(f"{score.spec} does not see the vocabulary: cost alone chose it; --text-ms is fair to larger ones")
    cut, width = narrowest_cut(result.architecture), result.architecture.embedding_width
    if cut < NARROW * width and not score.uses_cut:
        lines.append(
            f"warning: everything passes through {cut} of {width} numbers, which {score.spec} does not see; "
            "compare with: --score cut"
        )
    if better := _unshared(result):
        lines.append(better)
    tables = [table for table in (result.config.table, *result.config.more_tables) if table is not None]
    lines += [f"warning: {line}" for table in tables for line in table.warnings]
    for table in tables:
        timed, counted = target_of_table(table.header), result.config.target
        if timed and counted and timed != counted:
            lines.append(f"warning: {table.path.name} timed bundles for {timed}, but bytes are counted for {counted}")
    vocabulary, budgeted = space.templates[result.candidate.template].vocabulary, result.problem.budget.metrics
    steps = [result.problem.cost_model.step(metric, vocabulary) for metric in budgeted if metric.kind.latency]
    for table, mode in itertools.product(tables, sorted({step.mode for step in steps})):
        lines += [table.winners_curse(mode)] if table.winners_curse(mode) else []
    if result.config.table is not None and result.config.table.estimated:
        lines += [f"the table is estimated: {line}" for line in result.config.table.header.get("checked_by", ())]
    return lines


def _unshared(result: SearchResult) -> str:
    """A line where the score counts repeated layers that the default one does not, and they need not be shared."""
    problem, space, rating = result.problem, result.problem.space, parse_score(DEFAULT)
    blocks = [space.block_choices[choice] for choice in result.candidate.choices]
    repeated = sum(block.layers - block.weight_layers for block in blocks)
    own_blocks = [dataclasses.replace(block, shared=False) for block in blocks]
    if problem.score.spec == rating.spec or not repeated or not set(own_blocks) <= set(space.block_choices):
        return ""
    copies = max(1, len(space.precisions))  # a block stands once for each precision
    choices = zip(own_blocks, result.candidate.choices, strict=True)
    own = Candidate(
        result.candidate.template,
        tuple(space.block_choices.index(block) + choice % copies for block, choice in choices),
    )
    if not problem.feasible(own):
        return ""
    ratio = rating.total(space.architecture(own)) / rating.total(result.architecture)
    return (
        f"warning: {repeated} of {result.architecture.layers} layers repeat weights; with weights of their own they "
        f"keep the budgets too, and the score {DEFAULT} rates that {ratio:.3g} times as high: --score {DEFAULT}"
    )


def save(figure: object, path: Path | str) -> None:
    """Write a matplotlib figure as PNG, atomically. Raises OutputError."""
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)  # type: ignore[attr-defined]
    artefact.write_bytes(path, image.getvalue())
