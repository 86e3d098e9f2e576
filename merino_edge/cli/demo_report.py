"""What the demo ends with: a summary, a table for the terminal and a page (`demo.html` beside this module).

The page is one file that loads nothing else. `summary.json` has kind "demo":

    "boards": [{"name", "estimated", "verdict", "budget_ms", "prices": [line], "model": {"id", "blocks", "parameters",
                "score"}, "predicted_ms": [of each board's model on this board]}, ...]           this machine is first
    "speeds": [{"model": "found" | "by hand", "blocks", "parameters", "score", "predicted_tokens_per_s",
                "predicted_within": [low, high] or null, "measured_tokens_per_s", "measured_within": [low, high],
                "spoiled"}]
    "spoiled": [why a measured figure is not to be trusted], "threads", "loss_before", "loss_after", "parity": [...],
    "story": {...}, "steps": {NAME: seconds}, "artefacts": {...}
"""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.table import Table

    from merino_edge.cli.demo_steps import Steps
    from merino_edge.latency.table import LatencyTable

TABLES, MODELS = ("table.jsonl", "board.jsonl"), ("architecture.json", "board-architecture.json")
APART = 0.3  # share of the median that repetitions of a benchmark may be apart
BUNDLES = {"bundle": "found", "by-hand-bundle": "by hand"}


def summary(
    run: Steps,
    *,
    threads: int,
    prices: dict[str, Any],
    trained: dict[str, Any],
    rival: dict[str, Any],
    parity: list[dict[str, Any]],
    speed: dict[str, Any],
    stories: dict[str, Any],
) -> dict[str, Any]:
    """The document, from what the steps gave and what they wrote."""
    from merino_edge import architecture
    from merino_edge.architecture import Architecture
    from merino_edge.latency.table_file import load_table

    out = run.folder
    tables = [load_table(out / name) for name in TABLES]
    models = [architecture.load(out / name) for name in MODELS]
    boards = []
    for table, (a, document), name in zip(tables, models, MODELS, strict=True):
        (budget_ms,) = document["budgets"].values()
        boards.append(
            {
                "name": table.header["device"]["name"].removesuffix(" (estimated)"),
                "estimated": table.estimated,
                "verdict": None if table.verdict is None else table.verdict.to_dict(),
                "budget_ms": budget_ms,
                "prices": prices[name],
                "model": {**_card(a), "score": document["score"]["total"]},
                "predicted_ms": [table.model_ms(other, "decode") for other, _ in models],
            }
        )
    cards = {
        "found": {**_card(models[0][0]), "score": models[0][1]["score"]["total"]},
        "by hand": {**_card(Architecture.from_dict(rival["architecture"])), "score": rival["score"]},
    }
    rival_model = Architecture.from_dict(rival["architecture"])
    speeds = [
        _speed(name, row, cards[name], tables[0], models[0][0] if name == "found" else rival_model)
        for row in speed["results"]
        for name in [BUNDLES[row["bundle"]]]
    ]
    made = ("table.jsonl", "board.jsonl", "architecture.json", "board-architecture.json", "checkpoint", "bundle")
    return {
        "boards": boards,
        "speeds": speeds,
        "ratio": next((line for line in speed["comparison"]), None),
        "spoiled": _spoiled(tables[0], run, speeds),
        "threads": threads,
        "loss_before": trained["validation_loss_before"],
        "loss_after": trained["validation_loss"],
        "training_steps": trained["step"],
        "parity": parity,
        "story": stories,
        "steps": {name: record["seconds"] for name, record in run.records.items() if "seconds" in record},
        "artefacts": {name.partition(".")[0]: str(out / name) for name in made},
    }


def _card(a: Any) -> dict[str, Any]:
    return {"id": a.id, "blocks": a.to_dict()["blocks"], "parameters": a.parameters}


def _speed(name: str, row: dict[str, Any], card: dict[str, Any], table: LatencyTable, a: Any) -> dict[str, Any]:
    """The predicted and the measured speed of a model on this machine."""
    from merino_edge.latency.step import Step

    step = Step("decode", table.default_length)
    predicted_ms = table.model_cost(a, step)
    interval = table.interval(predicted_ms, step, found=name == "found")
    usable = table.verdict is None or not table.verdict.is_unfit
    within = None if interval is None or not usable else [1e3 / interval[2], 1e3 / interval[1]]
    return {
        "model": name,
        **card,
        "predicted_tokens_per_s": 1e3 / predicted_ms,
        "predicted_within": within,
        "measured_tokens_per_s": row["tokens_per_second"],
        "measured_within": [row["min"], row["max"]],
    }


def _spoiled(table: LatencyTable, run: Steps, speeds: Sequence[dict[str, Any]]) -> list[str]:
    """Why a figure of this run is not to be trusted, a line each."""
    from merino_edge.latency.verdict import MAX_OF_ALL

    lines = []
    if table.verdict is not None and not table.verdict.is_good:
        lines.append(f"the verdict on this machine's table: {table.verdict}")
    for name, what in (("threads", "the choice of threads"), ("bench", "the measured speeds")):
        if (load := _load(run, name)) > MAX_OF_ALL:
            lines.append(f"other work took {100 * load:.0f} % of the cores meanwhile and spoiled {what}")
    for speed in speeds:
        low, high = speed["measured_within"]
        speed["spoiled"] = _load(run, "bench") > MAX_OF_ALL or high - low > APART * speed["measured_tokens_per_s"]
        if speed["spoiled"]:
            lines.append(f"repetitions of {speed['model']} range from {low:,.0f} to {high:,.0f} tokens/s")
    return lines


def _load(run: Steps, name: str) -> float:
    """The share of all cores that other work took during a step; 0 where it is not known."""
    return (run.other_load(name) or 0.0) if name in run.records else 0.0


# --- the terminal ----------------------------------------------------------------------------------


def terminal(document: dict[str, Any], out: Path) -> Table:
    """The summary as a table."""
    from rich.table import Table

    from merino_edge.search.pareto_report import blocks_in_words

    table = Table(show_header=False, title="merino-edge demo", title_justify="left")
    for index, board in enumerate(document["boards"]):
        model = board["model"]
        here, other = board["predicted_ms"][index], board["predicted_ms"][1 - index]
        table.add_row(
            _board(board),
            f"{blocks_in_words(model['blocks'])}  ({model['parameters'] / 1e6:.2f} M parameters)\n"
            f"{here:.3g} of {board['budget_ms']:.3g} ms per token; the other board's model would take {other:.3g} ms",
        )
    for speed in document["speeds"]:
        table.add_row(
            f"{speed['model']}, here",
            f"{speed['measured_tokens_per_s']:,.0f} tokens/s measured{_doubt(speed)}, {_predicted(speed)}; "
            f"{speed['parameters'] / 1e6:.2f} M parameters, score {speed['score']:,.0f}",
        )
    for line in document["spoiled"]:
        table.add_row("not to be trusted", line)
    table.add_row("loss", f"{document['loss_before']:.3f} before, {document['loss_after']:.3f} after training")
    table.add_row("export", f"all {len(document['parity'])} checks passed")
    table.add_row("story", f"{document['story']['text']}\n({_rule(document['story'])})")
    table.add_row("page", str(out / "index.html"))
    table.add_row("next", f"merino-edge generate {out / 'bundle'}")
    return table


def _board(board: dict[str, Any]) -> str:
    return f"{board['name']}, {'estimated' if board['estimated'] else 'this machine'}"


def _doubt(speed: dict[str, Any]) -> str:
    return " (spoiled)" if speed["spoiled"] else ""


def _predicted(speed: dict[str, Any]) -> str:
    if speed["predicted_within"] is None:
        return f"{speed['predicted_tokens_per_s']:,.0f} predicted (no bound)"
    low, high = speed["predicted_within"]
    return f"{speed['predicted_tokens_per_s']:,.0f} predicted ({low:,.0f} to {high:,.0f})"


def _rule(story: dict[str, Any]) -> str:
    share = f"{story['draws_that_keep_names']} of {story['draws']} stories keep their names"
    which = f"this is the first that does, seed {story['seed']}" if story["keeps_names"] else "this is the first"
    return f"{share}; {which}"


# --- the page --------------------------------------------------------------------------------------


def write_page(document: dict[str, Any], path: Path) -> None:
    """Write the page. Raises OutputError."""
    from merino_edge import artefact

    template = files(__package__).joinpath("demo.html").read_text(encoding="utf-8")
    parts = {
        "boards": "".join(_board_html(document, index, path.parent) for index in range(len(document["boards"]))),
        "cross": _table(*_cross(document)),
        "speeds": _table(*_speeds(document)),
        "spoiled": "".join(
            f'<p class="bad">Not to be trusted: {html.escape(line)}.</p>' for line in document["spoiled"]
        ),
        "story": html.escape(document["story"]["text"]).replace("\n", "<br>"),
        "rule": html.escape(_rule(document["story"])),
        "facts": html.escape(
            f"Loss on held-out text {document['loss_before']:.2f} before and {document['loss_after']:.2f} after "
            f"{document['training_steps']:,} steps. All {len(document['parity'])} checks of the export passed. "
            f"The demo took {sum(document['steps'].values()) / 60:.1f} minutes on {document['threads']} CPU thread(s)."
        ),
        "data": json.dumps(document, allow_nan=False).replace("</", "<\\/"),
    }
    for name, text in parts.items():
        template = template.replace("{{ " + name + " }}", text)
    artefact.write_text(path, template)


def _board_html(document: dict[str, Any], index: int, folder: Path) -> str:
    """One board's model: its layers as bars, its budget, its price and the plot of its search."""
    board = document["boards"][index]
    model, used = board["model"], board["predicted_ms"][index]
    lines = [
        f"{model['parameters'] / 1e6:.2f} M parameters in {sum(b['layers'] for b in model['blocks'])} layers",
        f"{used:.3g} of {board['budget_ms']:.3g} ms per token (predicted)",
        *board["prices"],
    ]
    plot = folder / MODELS[index].replace(".json", ".png")
    picture = ""
    if plot.is_file():
        data = base64.b64encode(plot.read_bytes()).decode()
        picture = f'<img alt="score over time" src="data:image/png;base64,{data}">'
    items = "".join(f"<li>{html.escape(line)}</li>" for line in lines)
    return (
        f"<section><h2>{html.escape(_board(board))}</h2>{_layers(model['blocks'])}<ul>{items}</ul>{picture}</section>"
    )


def _layers(blocks: Iterable[dict[str, Any]]) -> str:
    """A bar for each layer: as long as its FFN is wide, darker as far as the layer is wide."""
    bars, y = [], 0
    for block in blocks:
        for _ in range(block["layers"]):
            bars.append(f'<rect class="ffn" x="0" y="{y}" width="{block["ffn_width"] / 4:g}" height="14"/>')
            bars.append(f'<rect class="width" x="0" y="{y}" width="{block["width"] / 4:g}" height="14"/>')
            label = f"{block['width']} / {block['ffn_width']}"
            bars.append(f'<text x="{block["ffn_width"] / 4 + 6:g}" y="{y + 11}">{label}</text>')
            y += 18
    return f'<svg viewBox="0 0 360 {y}" role="img" aria-label="layers: width / FFN width">{"".join(bars)}</svg>'


def _cross(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """What each model would cost on each board."""
    boards = document["boards"]
    heading = ["ms per token, predicted", *(f"model for {board['name']}" for board in boards)]
    return heading, [[f"on {_board(board)}", *(f"{ms:.3g}" for ms in board["predicted_ms"])] for board in boards]


def _speeds(document: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    from merino_edge.search.pareto_report import blocks_in_words

    heading, rows = ["on this machine", "layers x width / FFN", "parameters", "score"], []
    heading += ["predicted tokens/s", "measured tokens/s"]
    for speed in document["speeds"]:
        low, high = speed["measured_within"]
        measured = f"{speed['measured_tokens_per_s']:,.0f} ({low:,.0f} to {high:,.0f}){_doubt(speed)}"
        size = f"{speed['parameters'] / 1e6:.2f} M"
        shape, predicted = blocks_in_words(speed["blocks"]), _predicted(speed).replace(" predicted", "")
        rows.append([speed["model"], shape, size, f"{speed['score']:,.0f}", predicted, measured])
    return heading, rows


def _table(heading: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    def row(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(heading, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
