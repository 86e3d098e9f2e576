"""A study for people and programs: Markdown tables (docs/study.md), a figure (PNG) and the same as JSON fields.

It writes what it is given and decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge.errors import require
from merino_edge.search import report
from merino_edge.search.study import ALIKE, Row, Trained
from merino_edge.search.study_rank import Agreement, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3  # of small figures


# --- Markdown --------------------------------------------------------------------------------------


def scores_table(rows: Sequence[Row]) -> str:
    """The table of every score, as Markdown; intervals in brackets."""
    head = ("score", "Spearman", "Kendall", f"Kendall, sizes within {ALIKE:g}x", "Spearman over the default's")
    body = []
    for row in rows:
        over = "-" if row.over_default is None else _signed(row.over_default.spearman)
        body.append((row.name, *agreement_cells(row.agreement), over))
    return markdown(head, body)


def agreement_cells(found: Agreement) -> tuple[str, str, str]:
    """Spearman, Kendall and Kendall over models of like size."""
    return plain(found.spearman), plain(found.kendall), "-" if found.alike is None else plain(found.alike)


def plain(estimate: Estimate) -> str:
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A table; a bar inside a cell would end it."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


# --- JSON ------------------------------------------------------------------------------------------


def agreement_fields(found: Agreement | None) -> dict[str, Any] | None:
    """{"spearman": {"value": ..., "low": ..., "high": ...}, ...}"""
    if found is None:
        return None
    named = {"spearman": found.spearman, "kendall": found.kendall, "kendall_alike": found.alike}
    return {name: estimate._asdict() for name, estimate in named.items() if estimate is not None}


def document(trained: Sequence[Trained], rows: Sequence[Row]) -> dict[str, Any]:
    """The fields of the report: models with their losses, then scores [N] in the models' order."""
    models = [{"id": m.architecture.id, "losses": list(m.losses), "shape": m.architecture.to_dict()} for m in trained]
    scores = [
        {
            "name": row.name,
            "scores": [float(value) for value in row.scores],
            "agreement": agreement_fields(row.agreement),
            "over_default": agreement_fields(row.over_default),
        }
        for row in rows
    ]
    return {"models": models, "scores": scores}


# --- figure ----------------------------------------------------------------------------------------


def figure(trained: Sequence[Trained], rows: Sequence[Row], path: Path | str) -> None:
    """Loss against every score, small multiples of one loss axis, coloured by depth. Raises MissingExtraError,
    OutputError."""
    require("matplotlib", "study")
    from matplotlib.figure import Figure

    lines = math.ceil(len(rows) / COLUMNS)
    drawing = Figure(figsize=(3.6 * COLUMNS, 2.9 * lines + 0.3), layout="constrained")
    grid = drawing.subplots(lines, COLUMNS, sharey=True, squeeze=False)
    loss = np.array([model.loss for model in trained])
    depth = np.array([model.architecture.layers for model in trained])
    for axes, row in zip(grid.flat, rows, strict=False):
        points = _scatter(axes, row, loss, depth)
    for axes in grid.flat[len(rows) :]:
        axes.set_axis_off()
    for axes in grid[:, 0]:
        axes.set_ylabel("validation loss, nats per token")
    drawing.colorbar(points, ax=grid, label="layers", shrink=0.8)
    report.save(drawing, path)


def _scatter(axes: Axes, row: Row, loss: np.ndarray, depth: np.ndarray) -> Any:
    points = axes.scatter(row.scores, loss, c=depth, cmap="viridis", s=14, linewidths=0)
    found = row.agreement
    axes.set_title(f"{row.name}\nrho {found.spearman.value:.3f}, tau {found.kendall.value:.3f}", fontsize="small")
    if row.scores.min() > 0 and row.scores.max() > 10 * row.scores.min():
        axes.set_xscale("log")  # order is all that counts
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)
    return points
