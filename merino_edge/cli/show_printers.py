"""How `merino-edge show` prints each kind of artefact. Each function takes a console and the artefact's document."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console

Document = dict[str, Any]
LONGEST, MOST_FIELDS, MOST_ROWS = 2_000, 200, 100  # of what is printed for people


def print_model(screen: Console, document: Document) -> None:
    """Print what architectures, checkpoints and bundles have in common: the blocks and the counts."""
    from rich.table import Table

    model, counts = document["architecture"], document["counts"]
    _print_fields(screen, {k: v for k, v in model.items() if k != "blocks"})
    # Only blocks of some families have a window, rotary positions of their own, or a convolution in place of attention.
    own = [name for name in ("window", "rotary", "convolution") if any(name in block for block in model["blocks"])]
    blocks = Table("block", "width", "layers", "heads", "kv heads", "FFN width", "weights", *own)
    for index, block in enumerate(model["blocks"]):
        none = {"heads", "kv_heads"} if block.get("convolution") else set()
        numbers = [
            "-" if name in none else str(block[name]) for name in ("width", "layers", "heads", "kv_heads", "ffn_width")
        ]
        rotary = "-" if none else "global"
        others = [str(block.get(name, {"rotary": rotary}.get(name, "-"))) for name in own]
        blocks.add_row(str(index), *numbers, "shared" if block["shared"] else "own", *others)
    screen.print(blocks)
    weights = ", ".join(f"{precision} {mb:.1f}" for precision, mb in counts["weight_mb"].items())
    screen.print(
        f"{counts['parameters'] / 1e6:.2f} M parameters, {counts['layers']} layers, "
        f"{counts['flops_1024'] / 1e9:.2f} GFLOP per 1024 tokens without LM head"
    )
    screen.print(
        f"weights in MB: {weights}; KV cache at {model['max_positions']} positions, fp16: {counts['kv_mb_fp16']:.1f} MB"
    )


def _print_fields(screen: Console, fields: Document) -> None:
    """Print one field a line: scalars as they are, nested values as compact JSON. What is long is cut."""
    import json

    for name, value in list(fields.items())[:MOST_FIELDS]:
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
        line = f"  {name[:LONGEST]:<18} {shown[:LONGEST]}{' ... (whole: --json)' if len(shown) > LONGEST else ''}"
        screen.print("".join(c if c.isprintable() else "?" for c in line))
    if len(fields) > MOST_FIELDS:
        screen.print(f"  and {len(fields) - MOST_FIELDS} more fields (whole: --json)")


def print_artefact(screen: Console, document: Document) -> None:
    from merino_edge.cli.console import check_line

    screen.print(
        f"{document['kind']} {document['path']} (schema {document['schema_version']}, id {document.get('id', '-')})"
    )
    print_model(screen, document)
    shown_apart = {"kind", "path", "schema_version", "id", "architecture", "counts", "tool_version", "sha256",
                   "files", "parity", "graph", "history", "engines", "stored_engines", "tunings"}  # fmt: skip
    rest = {name: value for name, value in document.items() if name not in shown_apart}
    # A search result also holds the whole space, the table's entries and a proof. They are not for people.
    if isinstance(space := rest.get("space"), dict):
        rest["space"] = {name: value for name, value in space.items() if name != "form"}
    if isinstance(table := rest.get("table"), dict):
        rest["table"] = _table_in_short(table)
    if isinstance(certificate := rest.get("certificate"), dict):
        proof = ("too_dear", "groups")
        rest["certificate"] = {name: value for name, value in certificate.items() if name not in proof}
    if isinstance(tables := rest.get("more_tables"), list):
        rest["more_tables"] = [_table_in_short(table) for table in tables if isinstance(table, dict)]
    if rest:
        screen.print("how it was made:")
        _print_fields(screen, rest)
    made = document if document["kind"] == "bundle" else {}  # other kinds may use these names otherwise
    if graph := made.get("graph"):
        form = f"{graph.get('lowering')} lowering, opset {graph.get('opset')}, {graph.get('cache', 'float')} KV cache"
        screen.print(f"graph: {form}; compared with PyTorch:")
    for check in made.get("parity", ())[:MOST_ROWS]:
        screen.print("  " + check_line(check))
    for engine in [*made.get("engines", ()), *made.get("stored_engines", ())][:MOST_ROWS]:
        machine = engine.get("machine") or {}
        screen.print(
            f"engine {engine['file']}: {engine.get('library')} {engine.get('version')} for {engine.get('capability')}, "
            f"{engine.get('context')} positions, {engine.get('bytes', 0) / 1e6:.1f} MB, "
            f"built on {machine.get('name')}, power mode {machine.get('power_mode')}"
        )
    for tuning in made.get("tunings", ())[:MOST_ROWS]:
        screen.print(
            f"on {tuning.get('cores')} cores of {tuning.get('cpu')}: {tuning.get('threads')} threads"
            + ", spinning" * bool(tuning.get("spinning"))
        )
    if document["kind"] != "architecture" and (files := document.get("files")):
        large = "; those of large files are checked where they are used"
        screen.print(f"files, each with its sha256{large}: {', '.join(sorted(files)[:MOST_ROWS])}")


def _table_in_short(table: Document) -> Document:
    """A table of a search result without its entries; as it is where it is no such table."""
    from merino_edge import forms
    from merino_edge.latency.forms import Compact

    if forms.problem(table, Compact):
        return table
    header = table["header"]
    return {"name": table["name"], "sha256": table["sha256"], "entries": len(table["entries"]),
            "device": header.get("device", {}).get("name"), "precision": header["precision"],
            "estimated": header["estimated"]}  # fmt: skip


def print_table(screen: Console, document: Document) -> None:
    from rich.table import Table

    from merino_edge.cli.console import plain

    state = "estimated, not measured" if document["estimated"] else "measured"
    finished = "" if document["finished"] else f", unfinished: merino-edge profile --continue --out {document['path']}"
    screen.print(f"latency table {document['path']} ({state}{finished})")
    hidden = {"kind", "path", "schema_version", "entries", "unstable", "failed", "finished", "moved", "conditions",
              "faces", "validation", "verdict", "estimated", "space", "sha256"}  # fmt: skip
    fields = {name: value for name, value in document.items() if name not in hidden}
    _print_fields(screen, {**fields, "device": plain(fields.get("device", {}))})
    total = sum(document["entries"].values())
    counted = ", ".join(f"{count} {what}" for what, count in document["entries"].items())
    screen.print(f"{total} entries ({counted}), {document['unstable']} unstable, {document['failed']} failed")
    for line in document["moved"][:MOST_ROWS]:
        screen.print(f"warning: while it was measured, {line}")
    if document["validation"]:
        compared = "whole models of the roofline, not of the board" if document["estimated"] else "whole models"
        within_title = "published speeds within" if document["estimated"] else "9 of 10 within"
        figures = Table(
            compared, "MAPE %", "p95 %", "max %", "bias %", "Kendall tau", "repetitions apart %", within_title
        )
        validation = {mode: errors for mode, errors in document["validation"].items() if errors}
        rows = [(f"{errors.get('models', '-')} in {mode}", errors) for mode, errors in validation.items()]
        for mode, errors in validation.items():
            if found := errors.get("found"):
                rows.append((f"{found['models']} in {mode}, found by searches", found))
        for name, errors in rows:
            columns = [*(f"{column}_percent" for column in ("mape", "p95", "max", "bias")), "kendall_tau"]
            columns.append("visits_apart_percent")
            numbers = ["-" if errors.get(column) is None else f"{errors[column]:.2f}" for column in columns]
            within = "-"
            if None not in (errors.get("low_percent"), errors.get("high_percent")):
                within = f"{errors['low_percent']:+.1f} to {errors['high_percent']:+.1f} %"
            figures.add_row(name, *numbers, within)
        screen.print(figures)
    if source := document.get("transferred"):
        screen.print(
            f"transferred: {source['measured']} of {source['entries']} entries were measured here, "
            f"the others follow from {source['from']} ({source['precision']}, {source['device']})"
        )
    if verdict := document["verdict"]:
        screen.print("verdict: " + "; ".join([verdict["word"], *verdict["reasons"]]))


def print_comparison(screen: Console, comparison: Document, paths: tuple[Path, Path]) -> None:
    from rich.table import Table

    for line in comparison["different"]:
        screen.print(f"warning: not the same {line}", soft_wrap=True)
    table = Table("entries", "how many", "time of the second / the first", "apart, median %")
    for kind, figures in comparison["kinds"].items():
        ratio = figures["ratio"]
        spread = f"{ratio['median']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f})"
        table.add_row(kind, str(figures["entries"]), spread, f"{figures['median_apart_percent']:.1f}")
    screen.print(table)
    median = comparison["median_apart_percent"]
    screen.print(
        f"{comparison['entries']} entries of {paths[0]} and {paths[1]}: {median:.2f} % apart "
        f"in the median, {comparison['apart']} beyond their intervals",
        soft_wrap=True,
    )
    if comparison["median_apart_from_yardsticks_percent"] is not None:
        ratios = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in comparison["yardsticks"].items())
        screen.print(
            f"reference probes, the second / the first: {ratios}; without that ratio the tables are "
            f"{comparison['median_apart_from_yardsticks_percent']:.2f} % apart",
            soft_wrap=True,
        )


def print_front(screen: Console, document: Document) -> None:
    from merino_edge.search import pareto_report

    screen.print(f"Pareto front {document['path']} of {document['score']['name']} against {document['metric']}")
    screen.print(pareto_report.table(document, MOST_ROWS))


def print_space(screen: Console, document: Document) -> None:
    screen.print(f"space {document['name']} ({document['size']:.4g} architectures)")
    _print_fields(screen, {k: v for k, v in document.items() if k not in ("kind", "path", "name", "size")})


def print_header(screen: Console, document: Document) -> None:
    """Print one field a line. Of a list of objects, such as shards, only their number is printed."""
    screen.print(f"{document['kind'].replace('_', ' ')} {document['path']} (schema {document['schema_version']})")
    fields = {k: v for k, v in document.items() if k not in ("kind", "path", "schema_version", "tool_version")}
    lists = {k: len(v) for k, v in fields.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    _print_fields(screen, fields | lists)
