"""A latency table as a picture: layer costs over the width, and predicted against measured whole models.

Layers with cold caches are drawn dashed, layers with warm caches solid.
"""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

from merino_edge import artefact
from merino_edge.errors import require
from merino_edge.jetson.profiler.validation import predictions
from merino_edge.latency.measurement import MODES, Measurement, Mode
from merino_edge.latency.table import LatencyTable

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
    lines: dict[tuple[str, int, float, str, int], list[Measurement]] = {}
    for m in table.measurements:
        if m.what == "layer" and m.mode == mode and not m.failed and m.shape["kv_heads"] == m.shape["heads"]:
            ratio = m.shape["ffn_width"] / m.shape["width"]
            lines.setdefault((m.shape["ffn"], m.length, ratio, m.cache, m.window), []).append(m)
    for number, ((ffn, length, ratio, cache, window), line) in enumerate(sorted(lines.items())):
        line.sort(key=lambda m: int(m.shape["width"]))
        xs, ys = [m.shape["width"] for m in line], [m.median_ms for m in line]
        bounds = [m.interval_ms for m in line]
        spread = [[max(0.0, y - low) for y, (low, _) in zip(ys, bounds, strict=True)],
                  [max(0.0, high - y) for y, (_, high) in zip(ys, bounds, strict=True)]]  # fmt: skip
        label = f"{ffn} {ratio:g}x, length {length}{', cold' if cache == 'cold' else ''}"
        label += f", window {window}" if window else ""
        line_style = "--" if cache == "cold" else "-"
        axes.errorbar(
            xs, ys, yerr=spread, label=label, marker="o", markersize=3, capsize=2, linewidth=1, linestyle=line_style,
            color=f"C{number % 10}",
        )  # fmt: skip
    axes.set(title=f"{mode}: one layer", xlabel="width", ylabel="ms (bars: 95% of the median)", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend(fontsize="xx-small", ncols=2)


def _scatter(axes: Axes, table: LatencyTable, mode: Mode) -> None:
    pairs = predictions(table, mode)
    if not pairs:
        return
    predicted, measured = zip(*pairs, strict=True)
    top = 1.05 * max(*predicted, *measured)
    axes.plot([0, top], [0, top], color="grey", linewidth=1)
    axes.fill_between([0, top], [0, 0.9 * top], [0, 1.1 * top], color="grey", alpha=0.15, label="within 10%")
    axes.scatter(measured, predicted, s=24)
    figures = table.validation[mode]
    tau = figures["kendall_tau"]
    axes.set(
        title=f"{mode}: {len(pairs)} whole models, MAPE {figures['mape_percent']:.1f}%, "
        f"tau {'-' if tau is None else f'{tau:.2f}'}",
        xlabel="measured ms",
        ylabel="predicted ms",
        xlim=(0, top),
        ylim=(0, top),
    )
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
