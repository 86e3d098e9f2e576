"""The plot of a search's result (PNG, needs matplotlib): score over time, with the budget.

Beside the architecture that was found stand random ones of the space, hand-picked shapes and the public models. Without
a latency table the axis is the budget that is nearest to its limit.
"""

from __future__ import annotations

import random
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from merino_edge.errors import InputError, require
from merino_edge.search.budget import Metric
from merino_edge.search.hand_shapes import hand_shapes
from merino_edge.search.reference_models import Reference, references
from merino_edge.search.report import save
from merino_edge.search.result import SearchResult
from merino_edge.search.space import Candidate

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SAMPLE = 2000  # random architectures in the plot of an exact result
NAME = 0.2, 0.035  # width and height of a public model's name, as shares of the axes
LOGARITHMIC = 8  # ratio of the largest to the smallest value from which an axis is logarithmic


def plot(result: SearchResult, path: Path | str) -> None:
    """Plot the result, and the course of an evolution. Raises MissingExtraError or OutputError."""
    require("matplotlib", "plot")
    from matplotlib.figure import Figure

    evolution = result.evolution
    figure = Figure(figsize=(12 if evolution else 7.5, 4.8), layout="constrained")
    if evolution:
        left, right = figure.subplots(1, 2)
        iterations, best = zip(*evolution.history, (evolution.iterations, result.total), strict=True)
        left.step([max(1, iteration) for iteration in iterations], best, where="post")
        left.set(xscale="log", xlabel="iteration", ylabel="best score within the budgets", title="Search")
        left.grid(alpha=0.3)
        _draw(right, result, evolution.cloud, "visited")
    else:
        rng, templates = random.Random(0), set(result.problem.templates)
        drawn = (result.problem.space.sample(rng) for _ in range(SAMPLE))
        _draw(figure.subplots(), result, (c for c in drawn if c.template in templates), "drawn at random")
    save(figure, path)


def shown_metric(result: SearchResult) -> Metric:
    """The metric of the plot: a budgeted time, else the table's decode time, else the budget nearest to its limit."""
    problem, limits = result.problem, dict(result.problem.budget.limits)
    times = [metric for metric in limits if metric.kind.latency]
    if not times and problem.cost_model.table is not None:
        return problem.cost_model.resolve(Metric("decode_ms"), problem.space)

    def share(metric: Metric) -> float:
        return problem.value(metric, result.candidate) / limits[metric]

    return max(times or limits, key=share, default=Metric("parameters"))


def _draw(axes: Axes, result: SearchResult, candidates: Iterable[Candidate], label: str) -> None:
    problem, metric, space = result.problem, shown_metric(result), result.problem.space
    limit, unit = problem.budget.to_dict().get(metric.key), metric.kind.unit

    def points(several: Iterable[Candidate]) -> tuple[list[float], list[float]]:
        placed = [(problem.value(metric, c) / unit, problem.total(c)) for c in several]
        return [x for x, _ in placed], [y for _, y in placed]

    public, missing = _public_models(result, metric)
    shown = [points(candidates), points(hand_shapes(space, result.candidate.template)), points([result.candidate])]
    shown.append(([reference.value / unit for reference in public if reference.value], [r.score for r in public]))
    axes.scatter(*shown[0], s=4, alpha=0.3, linewidths=0, color="C0", label=f"{label} from space {space.name}")
    axes.scatter(*shown[1], s=22, marker="x", linewidths=1, color="C2", label="by hand: every layer alike")
    if public:
        axes.scatter(*shown[3], s=30, marker="s", color="C1", label="public models")
    axes.scatter(*shown[2], s=170, marker="*", color="C3", edgecolors="white", label="found", zorder=3)
    if limit is not None:
        axes.axvline(limit / unit, color="C3", linestyle="--", linewidth=1, label=f"budget {limit / unit:.4g}")
    for axis, values in (("x", [x for xs, _ in shown for x in xs]), ("y", [y for _, ys in shown for y in ys])):
        if min(values) > 0 and max(values) > LOGARITHMIC * min(values):
            axes.set(**{f"{axis}scale": "log"})
    _label_in_numbers(axes)
    _name(axes, [(reference.name, x, y) for reference, x, y in zip(public, *shown[3], strict=True)])
    estimated = result.config.table is not None and result.config.table.estimated and metric.kind.latency
    axes.set(
        xlabel=metric.label + (", estimated" if estimated else ""),
        ylabel=f"score ({result.config.score.spec})",
        title=f"Score over {metric.label}",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", fontsize="small", title=missing, title_fontsize="x-small")


def _public_models(result: SearchResult, metric: Metric) -> tuple[list[Reference], str | None]:
    """The public models that have a value of `metric`, and why there are none."""
    try:
        every = references(metric, result.config.score, result.problem.cost_model)
    except InputError as error:  # a user's score need not take every architecture
        return [], f"no public models: {error.message}"
    public = [reference for reference in every if reference.value]
    return public, None if public else f"no public models: {every[0].notes[0]}"


def _name(axes: Axes, points: list[tuple[str, float, float]]) -> None:
    """Write names beside points: on the left near the right edge, and lower where one would cover another."""
    (low, bottom), (high, top) = axes.transAxes.transform([(0, 0), (1, 1)])
    taken: list[tuple[float, float]] = []  # places, as shares of the axes
    for name, x, y in sorted(points, key=lambda point: -point[2]):
        at = axes.transData.transform((x, y))
        across, up = (at[0] - low) / (high - low), (at[1] - bottom) / (top - bottom)
        line = 0
        while any(
            abs(across - other) < NAME[0] and abs(up - line * NAME[1] - high_up) < 0.9 * NAME[1]
            for other, high_up in taken
        ):
            line += 1
        taken.append((across, up - line * NAME[1]))
        aside, align = (-6, "right") if across > 1 - NAME[0] else (6, "left")
        offset = (aside, -3 - 9 * line)
        axes.annotate(name, (x, y), offset, textcoords="offset points", fontsize="x-small", ha=align)


def _label_in_numbers(axes: Axes) -> None:
    """Ticks of logarithmic axes as plain numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    plain = FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e4 or value >= 1e7 else f"{value:,.0f}")
    for axis, scale in ((axes.xaxis, axes.get_xscale()), (axes.yaxis, axes.get_yscale())):
        if scale == "log":
            axis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axis.set_major_formatter(plain)
            axis.set_minor_formatter(NullFormatter())
