"""Reports of a study: Markdown tables (as in docs/study.md), a figure (PNG) and JSON fields.

This module only writes results. It computes no statistics of its own beyond quantiles.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from merino_edge.errors import require
from merino_edge.search import report
from merino_edge.search.study.calibration import Calibration, Fit
from merino_edge.search.study.grid import Setting
from merino_edge.search.study.rank_correlation import Agreement, Estimate
from merino_edge.search.study.scores import ALIKE, Row, Trained

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLUMNS = 3  # of subplots


# --- Markdown --------------------------------------------------------------------------------------


def scores_table(rows: Sequence[Row]) -> str:
    """A Markdown table of all scores, with intervals in brackets."""
    head = ("score", "Spearman", "Kendall", f"Kendall, sizes within {ALIKE:g}x", "Spearman over the paper's")
    body = []
    for row in rows:
        over = "-" if row.over_paper is None else _signed(row.over_paper.spearman)
        body.append((row.name, *agreement_cells(row.agreement), over))
    return markdown(head, body)


def calibration_tables(calibration: Calibration) -> str:
    """Two Markdown tables: each form's agreement on the half it was not fitted to, and how much of it is chance."""
    head = ("form", "fitted constants", "Spearman", "Kendall", f"Kendall, sizes within {ALIKE:g}x")
    body = [("effective", "the defaults", *agreement_cells(calibration.default))]
    for fit in calibration.fits:
        mark = " (the training half's choice)" if fit is calibration.best else ""
        body.append((fit.setting.form + mark, constants(fit.setting), *agreement_cells(fit.fitted)))
    over = (
        "form",
        "Spearman over the paper's",
        "over parameters'",
        "gain, fitted half",
        "gain, other half",
        "better there",
    )
    rest = [
        (
            fit.setting.form,
            _signed(fit.over_default.spearman),
            _signed(fit.over_parameters.spearman),
            _spread(fit.repeats.training),
            _spread(fit.repeats.other),
            f"{fit.repeats.better:.0%}",
        )
        for fit in calibration.fits
    ]
    return markdown(head, body) + "\n" + markdown(over, rest)


def stability_table(calibration: Calibration) -> str:
    """A Markdown table of the fitted constants over random halves: the median and the central 90 %."""
    names = [field.name for field in dataclasses.fields(Setting) if field.name != "form"]
    body = []
    for fit in calibration.fits:
        drawn = {name: [getattr(setting, name) for setting in fit.repeats.settings] for name in names}
        ends = {name: np.quantile(v, (0.05, 0.5, 0.95), method="closest_observation") for name, v in drawn.items() if v}
        cells = [f"{q[1]:.3g} ({q[0]:.3g} to {q[2]:.3g})" if np.isfinite(q).all() else "-" for q in ends.values()]
        body.append((fit.setting.form, *(cells or ["-"] * len(names)), constants(fit.on_all)))
    return markdown(("form", *(name.replace("_", " ") for name in names), "fitted on all models"), body)


def constants(setting: Setting) -> str:
    """The setting as options of `--score`; alpha_ffn = 1 - alpha_mha is left out."""
    names = ("alpha_mha", "epsilon_squared", "beta_depth", "effectiveness_power")
    words = [f"{name}={getattr(setting, name):.4g}" for name in names]
    words += [f"exit_power={setting.exit_power:g}"] if setting.form == "exit" else []
    words += [f"shared_layer={setting.shared_layer:g}"] if setting.shared_layer != 1 else []
    return ", ".join(words)


def _spread(values: np.ndarray) -> str:
    """The mean and the central 90 % of `values`."""
    if not len(values):
        return "-"
    low, high = np.quantile(values, (0.05, 0.95))
    return f"{values.mean():+.3f} ({low:+.3f} to {high:+.3f})"


def agreement_cells(agreement: Agreement) -> tuple[str, str, str]:
    """Cells for Spearman, Kendall, and Kendall over models of like size."""
    return (
        plain(agreement.spearman),
        plain(agreement.kendall),
        "-" if agreement.alike is None else plain(agreement.alike),
    )


def plain(estimate: Estimate) -> str:
    """An estimate as text, with its interval in brackets."""
    return f"{estimate.value:.3f} [{estimate.low:.3f}, {estimate.high:.3f}]"


def _signed(estimate: Estimate) -> str:
    return f"{estimate.value:+.3f} [{estimate.low:+.3f}, {estimate.high:+.3f}]"


def markdown(head: Sequence[str], body: Sequence[Sequence[str]]) -> str:
    """A Markdown table. Bars inside cells are escaped, because they would end the cell."""
    lines = [head, ["---"] * len(head), *body]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines) + "\n"


# --- JSON ------------------------------------------------------------------------------------------


def agreement_fields(agreement: Agreement | None) -> dict[str, Any] | None:
    """{"spearman": {"value": ..., "low": ..., "high": ...}, ...}"""
    if agreement is None:
        return None
    named = {"spearman": agreement.spearman, "kendall": agreement.kendall, "kendall_alike": agreement.alike}
    return {name: estimate._asdict() for name, estimate in named.items() if estimate is not None}


def document(trained: Sequence[Trained], rows: Sequence[Row], calibration: Calibration | None = None) -> dict[str, Any]:
    """The fields of the report: models with their losses, scores [N] in the models' order, and the calibration."""
    models = [{"id": m.architecture.id, "losses": list(m.losses), "shape": m.architecture.to_dict()} for m in trained]
    scores = [
        {
            "name": row.name,
            "scores": [float(value) for value in row.scores],
            "agreement": agreement_fields(row.agreement),
            "over_paper": agreement_fields(row.over_paper),
        }
        for row in rows
    ]
    return {
        "models": models,
        "scores": scores,
        "calibration": None if calibration is None else calibration_fields(calibration),
    }


def calibration_fields(calibration: Calibration) -> dict[str, Any]:
    """The calibration as JSON fields. Halves are indices into the list of models. Agreements are on the other half."""
    return {
        "training": list(calibration.training),
        "other": list(calibration.other),
        "settings_tried": calibration.settings_tried,
        "default": agreement_fields(calibration.default),
        "fits": [_fit_fields(fit) for fit in calibration.fits],
        "best": calibration.best.setting.form,
    }


def _fit_fields(fit: Fit) -> dict[str, Any]:
    agreements = ("fitted", "over_default", "over_parameters", "unfitted")
    return {
        "setting": dataclasses.asdict(fit.setting),
        "on_all": dataclasses.asdict(fit.on_all),
        "training": fit.training,
        "training_default": fit.training_default,
        **{name: agreement_fields(getattr(fit, name)) for name in agreements},
        "repeats": {
            "settings": [dataclasses.asdict(setting) for setting in fit.repeats.settings],
            "training": fit.repeats.training.tolist(),
            "other": fit.repeats.other.tolist(),
        },
    }


# --- figure ----------------------------------------------------------------------------------------


def figure(trained: Sequence[Trained], rows: Sequence[Row], path: Path | str) -> None:
    """Plot loss against every score, one subplot each, coloured by depth. Raises MissingExtraError or OutputError."""
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
    drawing.colorbar(points, ax=grid, label="layers", shrink=0.8, aspect=40)
    report.save(drawing, path)


def _scatter(axes: Axes, row: Row, loss: np.ndarray, depth: np.ndarray) -> Any:
    from matplotlib.ticker import NullFormatter

    points = axes.scatter(row.scores, loss, c=depth, cmap="viridis", s=14, linewidths=0)
    agreement = row.agreement
    axes.set_title(
        f"{row.name}\nrho {agreement.spearman.value:.3f}, tau {agreement.kendall.value:.3f}", fontsize="small"
    )
    if row.scores.min() > 0 and row.scores.max() > 10 * row.scores.min():
        axes.set_xscale("log")  # only the order counts
        axes.xaxis.set_minor_formatter(NullFormatter())  # such a range contains a labelled power of ten
    axes.tick_params(labelsize="small")
    axes.grid(alpha=0.3)
    return points
