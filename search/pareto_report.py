"""Reports of a Pareto front: a document (JSON), a terminal table, a plot (PNG) and an interactive page (HTML).

The page is a single file that loads nothing else. It is `front.html` beside this module, with the document inside.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

from merino_edge import artefact
from merino_edge.errors import require
from merino_edge.search import report, space_file
from merino_edge.search.pareto import Front
from merino_edge.search.reference_models import Reference
from merino_edge.search.result import SearchConfig

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from rich.console import RenderableType


def to_document(front: Front, config: SearchConfig, references: Sequence[Reference]) -> dict[str, Any]:
    """The fields of the report. `merino_edge.search.pareto` shows its form."""
    problem, table = front.problem, config.table
    points = []
    for point in front.points:
        a = problem.space.architecture(point.candidate)
        numbers = {name: getattr(point, name) for name in ("limit", "value", "score", "bound")}
        fields = {**numbers, "costs": problem.costs(point.candidate), "id": a.id, "architecture": a.to_dict()}
        if precisions := problem.space.precisions_of(point.candidate):
            fields["precisions"] = [precision.name for precision in precisions]
        points.append(fields)
    source = None
    if table is not None:
        device = table.header.get("device", {}).get("name", "unknown")
        source = {"name": table.path.name, "sha256": table.sha256, "estimated": table.estimated, "device": device}
        source["warnings"] = table.warnings
    searched = origin(config)
    return {
        "metric": front.metric.key,
        "label": front.metric.label,
        "unit": front.metric.kind.unit,
        "score": searched.pop("score"),
        "complete": front.complete,
        "points": points,
        "references": [{**dataclasses.asdict(r), "architecture": r.architecture.to_dict()} for r in references],
        **searched,
        "table": source,
    }


def origin(config: SearchConfig) -> dict[str, Any]:
    """The fields of the report about what was searched. With the tables they are all that a front depends on."""
    space = config.space
    return {
        "score": {"name": config.score.spec, **config.score.details},
        "budgets": config.budget.to_dict(),
        "precision": config.precision,
        "target": config.target,
        "space": {"name": space.name, "size": space.size, "form": space_file.to_dict(space)},
    }


def table(document: dict[str, Any], most_rows: int | None = None) -> RenderableType:
    """A terminal table of the points, of which at most `most_rows` stand there, and one of the public models."""
    from rich.console import Group
    from rich.table import Table

    label, unit = document["label"], document["unit"]
    points = Table(label, "score", "architecture", "blocks (layers x width / FFN)", title=_title(document))
    step = 1 if most_rows is None else math.ceil(len(document["points"]) / most_rows)
    for point in document["points"][::step]:
        blocks = blocks_in_words(point["architecture"]["blocks"], point.get("precisions", ()))
        points.add_row(f"{point['value'] / unit:.4g}", f"{point['score']:,.1f}", point["id"], blocks)
    public = Table(label, "score", "public model", "with")
    for reference in document["references"][:most_rows]:
        value = "-" if reference["value"] is None else f"{reference['value'] / unit:.4g}"
        public.add_row(value, f"{reference['score']:,.1f}", reference["name"], ", ".join(reference["notes"]))
    claim = "the whole front" if document["complete"] else "points of the front; asking for more finds those between"
    count = len(document["points"])
    lines = [f"{count} {claim}; each proven optimal for its {document['metric']}"]
    source, unknown = document["table"] or {}, [r["name"] for r in document["references"] if r["value"] is None]
    lines += [f"warning: {line}" for line in source.get("warnings", ())]
    if unknown and source and not source["estimated"]:
        command = f"merino-edge profile --continue --also {','.join(unknown)} --out {source['name']}"
        lines.append(f"what the table does not know of public models is measured by: {command}")
    return Group(points, public, *lines)


def blocks_in_words(blocks: Sequence[dict[str, Any]], precisions: Sequence[str] = ()) -> str:
    """Blocks as text: layers (s: shared weights) x width / FFN width, and window and precision where they have one."""
    shapes = [
        f"{b['layers']}{'s' if b['shared'] and b['layers'] > 1 else ''} x {b['width']}/{b['ffn_width']}"
        + (f" window {b['window']}" if b.get("window") else "")
        for b in blocks
    ]
    return "  ".join(map(" ".join, zip(shapes, precisions, strict=True)) if precisions else shapes)


def _title(document: dict[str, Any]) -> str:
    budgets = ", ".join(f"{key} at most {limit:.6g}" for key, limit in document["budgets"].items())
    where = f"space {document['space']['name']}, {document['precision']}"
    where += f" as stored for {document['target']}" if document.get("target") else ""
    if source := document["table"]:
        device = source["device"].removesuffix(" (estimated)")  # which an estimated table's device has in its name
        where += f", {device}{' (estimated)' if source['estimated'] else ''}"
    return f"{where}{f'; {budgets}' if budgets else ''}"


def plot(document: dict[str, Any], path: Path | str) -> None:
    """Plot the front as steps, with the public models. Raises MissingExtraError, OutputError."""
    require("matplotlib", "plot")
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, NullLocator

    figure = Figure(figsize=(8, 5), layout="constrained")
    axes, unit = figure.subplots(), document["unit"]
    values, scores = zip(*((p["value"] / unit, p["score"]) for p in document["points"]), strict=True)
    axes.step(values, scores, where="post", color="C0", linewidth=1)
    axes.plot(
        values, scores, "o", color="C0", markersize=4, label=f"best of {document['space']['size']:.3g} architectures"
    )
    shown = [r for r in document["references"] if r["value"] is not None]
    for reference in shown:
        face = "none" if reference["notes"] else "C3"
        axes.plot(reference["value"] / unit, reference["score"], "s", color="C3", markerfacecolor=face, markersize=6)
    axes.set(
        xlabel=document["label"], ylabel=f"score ({document['score']['name']})", title=_title(document), xscale="log"
    )
    _label_points(
        axes, [(r["value"] / unit, r["score"], r["name"]) for r in shown], list(zip(values, scores, strict=True))
    )
    if shown:
        hollow = ", hollow: nearest the table knows" if any(r["notes"] for r in shown) else ""
        axes.plot([], [], "s", color="C3", label=f"public models{hollow}")
    low, high = axes.get_xlim()
    if high < 10 * low:  # the axis has too few powers of ten for labels
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter(_two_and_five)
    axes.grid(alpha=0.3, which="both")
    axes.legend(loc="upper left", fontsize="small")
    report.save(figure, path)


def _two_and_five(value: float, position: float) -> str:
    """The label of a minor tick on a logarithmic axis. Only ticks that have room get one."""
    return f"{value:g}" if f"{value:e}"[0] in "25" else ""


def _label_points(
    axes: Axes, points: Sequence[tuple[float, float, str]], others: Sequence[tuple[float, float]]
) -> None:
    """Write a name on the right of each point.

    It goes to the left or up or down where it would cover another name, one of `others` or the edge.
    """
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()

    def place(value: float, score: float) -> tuple[float, float]:
        return math.log(value / left) / math.log(right / left), (score - bottom) / (top - bottom)

    occupied = [(x - 0.01, x + 0.01, y) for x, y in (place(*other) for other in others)]
    for value, score, name in points:
        (x, y), width = place(value, score), len(name) / 90
        starts = [start for start in (x, x - width) if start + width <= 1]
        line, start = next(
            (line, start)
            for line in itertools.chain.from_iterable((n, -n) for n in itertools.count())
            for start in starts
            if not any(
                abs(y - 0.03 * line - other) < 0.03 and a < start + width and start < b for a, b, other in occupied
            )
        )
        occupied.append((start, start + width, y - 0.03 * line))
        aside, align = (-6, "right") if start < x else (6, "left")
        axes.annotate(
            name, (value, score), (aside, -3 - 10 * line), textcoords="offset points", fontsize="small", ha=align
        )


def page(document: dict[str, Any], path: Path | str) -> None:
    """Write the page. Raises OutputError."""
    template = files(__package__).joinpath("front.html").read_text(encoding="utf-8")
    # Only "</" could end the script element. Its escaped form is the same JSON.
    data = json.dumps({**document, "title": _title(document)}, allow_nan=False).replace("</", "<\\/")
    artefact.write_text(path, template.replace("{{ data }}", data))
