"""A latency table as a picture: what a layer costs over its width, and predicted against measured whole models."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from merino_edge import artefact
from merino_edge.errors import require
from merino_edge.jetson.validation import predictions
from merino_edge.latency_table import LatencyTable
from merino_edge.measurement import MODES, Measurement, Mode

if TYPE_CHECKING:
    from matplotlib.axes import Axes


def plot_table(table: LatencyTable, path: Path) -> None:
    """Write a PNG: per mode a row with layer costs [ms] (left) and the validation (right). Raises MissingExtraError."""
    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 8), layout="constrained")
    rows = figure.subplots(len(MODES), 2)
    for mode, (left, right) in zip(MODES, rows, strict=True):
        _layer_curves(left, table, mode)
        _scatter(right, table, mode)
    kind = "estimated" if table.estimated else "measured"
    device, threads = table.header["device"]["name"], table.header["threads"]
    figure.suptitle(f"{device}, {table.header['backend']}, {table.precision}, threads {threads} ({kind})")
    image = io.BytesIO()
    figure.savefig(image, format="png", dpi=120)
    artefact.write_bytes(path, image.getvalue())


def _layer_curves(axes: Axes, table: LatencyTable, mode: Mode) -> None:
    layers = [m for m in table.measurements if m.what == "layer" and m.mode == mode]
    lines: dict[tuple[str, int, float], list[Measurement]] = {}
    for m in layers:
        if m.shape["kv_heads"] == m.shape["heads"]:
            lines.setdefault((m.shape["ffn"], m.length, m.shape["ffn_width"] / m.shape["width"]), []).append(m)
    for (ffn, length, ratio), line in sorted(lines.items()):
        line.sort(key=lambda m: int(m.shape["width"]))
        xs, ys = [m.shape["width"] for m in line], [m.median_ms for m in line]
        spread = [[abs(y - bound(m.samples)) for y, m in zip(ys, line, strict=True)] for bound in (min, max)]
        label = f"{ffn} {ratio:g}x, length {length}"
        axes.errorbar(xs, ys, yerr=spread, marker="o", markersize=4, capsize=2, label=label)
    axes.set(title=f"{mode}: one layer", xlabel="width", ylabel="ms (bars: all rounds)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")


def _scatter(axes: Axes, table: LatencyTable, mode: Mode) -> None:
    pairs = predictions(table, mode)
    predicted, measured = zip(*pairs, strict=True)
    top = 1.05 * max(*predicted, *measured)
    axes.plot([0, top], [0, top], color="grey", linewidth=1)
    axes.fill_between([0, top], [0, 0.9 * top], [0, 1.1 * top], color="grey", alpha=0.15, label="within 10%")
    axes.scatter(measured, predicted, s=24)
    mape = table.validation[mode]["mape_percent"]
    axes.set(
        title=f"{mode}: whole models, MAPE {mape:.1f}%",
        xlabel="measured ms",
        ylabel="predicted ms",
        xlim=(0, top),
        ylim=(0, top),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
