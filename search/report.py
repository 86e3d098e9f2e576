"""What a search found, for people: a table for the terminal and a plot (PNG, needs matplotlib)."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from merino_edge import artefact
from merino_edge.errors import require
from merino_edge.search.budget import METRICS, Budget
from merino_edge.search.evolution import SearchResult

if TYPE_CHECKING:
    from rich.console import RenderableType

_AXES = {
    "parameters": ("parameters (M)", 1e6),
    "weight_mb": ("weights (MB)", 1.0),
    "flops": ("GFLOPs per 1024 tokens, head excluded", 1e9),
    "decode_ms": ("decode step (ms)", 1.0),
    "prefill_ms": ("prefill (ms)", 1.0),
}


def summary(result: SearchResult, budget: Budget, estimated: bool = False) -> RenderableType:
    """Two rich tables: the blocks found, and each cost beside its budget. `estimated`: latencies are not measured."""
    from rich.console import Group
    from rich.table import Table

    blocks = Table("block", "width", "layers", "heads", "FFN", title=f"architecture {result.architecture.id}")
    for index, block in enumerate(result.architecture.blocks):
        layers = f"{block.layers}{' shared' if block.shared and block.layers > 1 else ''}"
        blocks.add_row(str(index), str(block.width), layers, str(block.heads), str(block.ffn_width))
    effort = f"{result.iterations:,} iterations in {result.seconds:.1f} s"
    costs = Table("cost", "found", "budget", title=f"score {result.score.total:.1f}, {effort}")
    for metric in METRICS:
        if metric in result.costs:
            label, unit = _AXES[metric]
            limit = budget.limits.get(metric)
            note = " estimated" if estimated and metric.endswith("_ms") else ""
            costs.add_row(
                label + note, f"{result.costs[metric] / unit:.4g}", "" if limit is None else f"{limit / unit:.4g}"
            )
    return Group(blocks, costs)


def plot(result: SearchResult, budget: Budget, path: Path | str) -> None:
    """Score against iteration, and score against the binding budget. Raises MissingExtraError, OutputError."""
    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    iterations, best = zip(*result.history, (result.iterations, result.history[-1][1]), strict=True)
    left.step([max(1, iteration) for iteration in iterations], best, where="post")
    left.set(xscale="log", xlabel="iteration", ylabel="best score within the budgets", title="Search")
    left.grid(alpha=0.3)

    label, unit = _AXES[result.binding]
    limit = budget.limits.get(result.binding)
    costs, scores = [cost / unit for cost, _ in result.cloud], [score for _, score in result.cloud]
    right.scatter(costs, scores, s=4, alpha=0.35, linewidths=0, label="visited")
    right.scatter(
        [result.costs[result.binding] / unit],
        [result.score.total],
        marker="*",
        s=140,
        color="C3",
        label="found",
        zorder=3,
    )
    if limit is not None:
        right.axvline(limit / unit, color="C3", linestyle="--", linewidth=1, label="budget")
    right.set(xlabel=label, ylabel="score", title=f"{len(result.cloud):,} of the architectures visited")
    right.grid(alpha=0.3)
    right.legend(loc="lower right")

    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=130)
    artefact.write_bytes(path, image.getvalue())
