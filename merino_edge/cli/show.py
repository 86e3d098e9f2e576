"""`merino-edge show ARTEFACT`: shows what an artefact is and holds. The kind is read from the content, not the name.

`--json` prints {"kind", "path", ...}. An architecture, a space, a front, a corpus, a study, stored logits and a
synthetic corpus add their own document. A latency table adds its header, its validation and counts of its entries.
A checkpoint adds its training record and a bundle its manifest, each with `counts`. With `--against OTHER`, of two
tables, it prints merino_edge.jetson.profiler.comparison.compare.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

    from merino_edge.architecture import Architecture

Document = dict[str, Any]


def show(
    path: Annotated[
        Path,
        typer.Argument(metavar="ARTEFACT", help="Latency table, architecture, corpus, checkpoint, bundle or other."),
    ],
    against: Annotated[
        Path | None, typer.Option(metavar="TABLE", help="Compare a latency table with this second one.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what an artefact holds, or compare two latency tables.

    The kind of an artefact is read from its content, not from its name.
    """
    from rich.console import Console

    from merino_edge import bundle
    from merino_edge.cli import console

    if against is not None:
        from merino_edge.jetson.profiler.comparison import compare
        from merino_edge.latency.table_file import load_table

        found = compare(*(load_table(table, unfinished=True) for table in (path, against)))
        if as_json:
            console.print_json(found)
        else:
            _print_comparison(Console(highlight=False, markup=False), found, (path, against))
        return
    path = bundle.find(path)
    kind = kind_of(path)
    reader, printer = KINDS[kind]
    document = {"kind": kind, "path": str(path), **reader(path)}
    if as_json:
        console.print_json(document)
    else:
        printer(Console(highlight=False, markup=False, soft_wrap=True), document)


def kind_of(path: Path) -> str:
    """The kind an artefact says it is. Raises ArtefactError when it is none."""
    from merino_edge import artefact, limits
    from merino_edge.errors import ArtefactError

    if not path.exists():
        raise ArtefactError(f"{path} does not exist", "check the path")
    if path.is_dir():
        kind: Any = next((kind for name, kind in FOLDERS.items() if (path / name).is_file()), None)
    else:
        text = artefact.read_text(path, limits.MAX_TABLE_BYTES)
        first = text.partition("\n")[0]
        is_lines = first.startswith("{") and first.endswith("}")  # a table is one object a line, the rest one object
        document = artefact.parse_json(first if is_lines else text, str(path))
        kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        said = f"says it is {kind!r}" if kind else "says no kind"
        raise ArtefactError(f"{path} is no artefact that can be shown ({said})", f"known: {', '.join(KINDS)}")
    return kind


# --- reading ---------------------------------------------------------------------------------------


def _counts(a: Architecture) -> Document:
    from merino_edge.counts import PRECISIONS

    return {
        "parameters": a.parameters,
        "layers": a.layers,
        "flops_1024": a.flops(),
        "weight_mb": {precision: a.weight_bytes(precision) / 1e6 for precision in PRECISIONS},
        "kv_mb_fp16": a.kv_bytes() / 1e6,
    }


def _read_architecture(path: Path) -> Document:
    from merino_edge import architecture

    a, document = architecture.load(path)
    return {**document, "architecture": a.to_dict(), "counts": _counts(a)}


def _read_checkpoint(path: Path) -> Document:
    from merino_edge import checkpoint

    loaded = checkpoint.load(path)
    return {**loaded.training, "architecture": loaded.architecture.to_dict(), "counts": _counts(loaded.architecture)}


def _read_bundle(path: Path) -> Document:
    from merino_edge import bundle

    loaded = bundle.load(path)
    return {**loaded.manifest, "architecture": loaded.architecture.to_dict(), "counts": _counts(loaded.architecture)}


def _read_table(path: Path) -> Document:
    from collections import Counter

    from merino_edge.latency.table_file import load_table

    table = load_table(path, unfinished=True)
    entries = dict(Counter(f"{m.what} {m.mode}" for m in table.measurements))
    counted = {"entries": entries, "unstable": len(table.unstable), "failed": len(table.failed)}
    told = {"finished": table.finished, "moved": table.moved, "conditions": table.conditions}
    faces = table.step_time.to_dict() if table.step_time else None
    return {**table.header, "sha256": table.sha256, **counted, **told, "faces": faces, "validation": table.validation}


def _read_front(path: Path) -> Document:
    from merino_edge import artefact
    from merino_edge.search.pareto import KIND, SCHEMA_VERSION

    return artefact.read_json(path, KIND, SCHEMA_VERSION)


def _read_header(kind: str, path: Path) -> Document:
    """What a corpus, a study, a teacher's logits or a written corpus say of themselves; what they hold is not read."""
    from merino_edge import artefact

    names = (name for name, found in FOLDERS.items() if found == kind)
    return artefact.read_json(path / next(names) if path.is_dir() else path, kind, HEADER_VERSIONS[kind])


def _read_space(path: Path) -> Document:
    from merino_edge.search import space_file
    from merino_edge.search.builtin_spaces import load_space

    space = load_space(str(path))
    return {**space_file.to_dict(space), "size": space.size}


# --- printing --------------------------------------------------------------------------------------


def _print_model(screen: Console, document: Document) -> None:
    """The blocks and counts that architectures, checkpoints and bundles share."""
    from rich.table import Table

    model, counts = document["architecture"], document["counts"]
    _print_fields(screen, {k: v for k, v in model.items() if k != "blocks"})
    blocks = Table("block", "width", "layers", "heads", "kv heads", "FFN width", "weights")
    for index, block in enumerate(model["blocks"]):
        numbers = [str(block[name]) for name in ("width", "layers", "heads", "kv_heads", "ffn_width")]
        blocks.add_row(str(index), *numbers, "shared" if block["shared"] else "own")
    screen.print(blocks)
    weights = ", ".join(f"{precision} {mb:.1f}" for precision, mb in counts["weight_mb"].items())
    screen.print(
        f"{counts['parameters'] / 1e6:.2f} M parameters, {counts['layers']} layers, "
        f"{counts['flops_1024'] / 1e9:.2f} GFLOP per 1024 tokens without head"
    )
    screen.print(
        f"weights in MB: {weights}; cache at {model['max_positions']} positions, fp16: {counts['kv_mb_fp16']:.1f} MB"
    )


def _print_fields(screen: Console, fields: Document) -> None:
    """Scalars as they are, nested values as compact JSON, one field a line."""
    import json

    for name, value in fields.items():
        shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=True)
        screen.print(f"  {name:<18} {''.join(c if c.isprintable() else '?' for c in str(shown))}")


def _print_artefact(screen: Console, document: Document) -> None:
    from merino_edge.cli.console import check_line

    screen.print(
        f"{document['kind']} {document['path']} (schema {document['schema_version']}, id {document.get('id', '-')})"
    )
    _print_model(screen, document)
    told = {"kind", "path", "schema_version", "id", "architecture", "counts", "tool_version", "sha256",
            "files", "parity", "graph", "history", "engines", "tunings"}  # fmt: skip
    rest = {name: value for name, value in document.items() if name not in told}
    if isinstance(
        space := rest.get("space"), dict
    ):  # of a search: its whole form and the table's entries are for --from
        rest["space"] = {name: value for name, value in space.items() if name != "form"}
    if isinstance(table := rest.get("table"), dict):
        entries, header = table.get("entries") or (), table.get("header") or {}
        rest["table"] = {"name": table.get("name"), "sha256": table.get("sha256"), "entries": len(entries),
                         "device": header.get("device", {}).get("name"),
                         "estimated": header.get("estimated")}  # fmt: skip
    if rest:
        screen.print("how it was made:")
        _print_fields(screen, rest)
    if graph := document.get("graph"):
        made = f"{graph.get('lowering')} lowering, opset {graph.get('opset')}, cache of {graph.get('cache', 'float')}"
        screen.print(f"graph: {made}; compared with PyTorch:")
    for check in document.get("parity", ()):
        screen.print("  " + check_line(check))
    for engine in document.get("engines", ()):
        machine = engine.get("machine", {})
        screen.print(
            f"engine {engine['file']}: {engine.get('library')} {engine.get('version')} for {engine.get('capability')}, "
            f"{engine.get('context')} positions, {engine.get('bytes', 0) / 1e6:.1f} MB, "
            f"built on {machine.get('name')}, power mode {machine.get('power_mode')}"
        )
    for tuning in document.get("tunings", ()):
        screen.print(
            f"on {tuning.get('cores')} cores of {tuning.get('cpu')}: {tuning.get('threads')} threads"
            + ", spinning" * bool(tuning.get("spinning"))
        )
    if files := document.get("files"):
        screen.print(f"files, each with its sha256 checked: {', '.join(sorted(files))}")


def _print_table(screen: Console, document: Document) -> None:
    from rich.table import Table

    from merino_edge.cli.console import plain

    state = "estimated, not measured" if document["estimated"] else "measured"
    finished = "" if document["finished"] else f", unfinished: merino-edge profile --continue --out {document['path']}"
    screen.print(f"latency table {document['path']} ({state}{finished})")
    hidden = {"kind", "path", "schema_version", "entries", "unstable", "failed", "finished", "moved", "conditions",
              "faces", "validation", "estimated", "space", "sha256"}  # fmt: skip
    fields = {name: value for name, value in document.items() if name not in hidden}
    _print_fields(screen, {**fields, "device": plain(fields["device"])})
    total = sum(document["entries"].values())
    counted = ", ".join(f"{count} {what}" for what, count in document["entries"].items())
    screen.print(f"{total} entries ({counted}), {document['unstable']} unstable, {document['failed']} failed")
    for line in document["moved"]:
        screen.print(f"warning: while it was measured, {line}")
    if document["validation"]:
        compared = "whole models of the roofline, not of the board" if document["estimated"] else "whole models"
        within_title = "published speeds within" if document["estimated"] else "9 of 10 within"
        figures = Table(compared, "MAPE %", "p95 %", "max %", "bias %", "Kendall tau", "visits apart %", within_title)
        for mode, found in filter(operator.itemgetter(1), document["validation"].items()):  # estimates have no figures
            names = [f"{name}_percent" for name in ("mape", "p95", "max", "bias")]
            names += ["kendall_tau", "visits_apart_percent"]
            numbers = ["-" if found.get(name) is None else f"{found[name]:.2f}" for name in names]
            within = "-"
            if found.get("low_percent") is not None:
                within = f"{found['low_percent']:+.1f} to {found['high_percent']:+.1f} %"
            figures.add_row(f"{found['models']} in {mode}", *numbers, within)
        screen.print(figures)


def _print_comparison(screen: Console, found: Document, paths: tuple[Path, Path]) -> None:
    from rich.table import Table

    for line in found["different"]:
        screen.print(f"warning: not the same {line}", soft_wrap=True)
    table = Table("entries", "how many", "time of the second / the first", "apart, median %")
    for kind, figures in found["kinds"].items():
        ratio = figures["ratio"]
        spread = f"{ratio['median']:.3f} ({ratio['low']:.3f} - {ratio['high']:.3f})"
        table.add_row(kind, str(figures["entries"]), spread, f"{figures['median_apart_percent']:.1f}")
    screen.print(table)
    screen.print(
        f"{found['entries']} entries of {paths[0]} and {paths[1]}: {found['median_apart_percent']:.2f} % apart in the "
        f"median, {found['apart']} beyond their intervals",
        soft_wrap=True,
    )
    if found["median_apart_from_yardsticks_percent"] is not None:
        ratios = ", ".join(f"{kind} {ratio:.3f}" for kind, ratio in found["yardsticks"].items())
        screen.print(
            f"yardsticks, the second / the first: {ratios}; with that taken out "
            f"{found['median_apart_from_yardsticks_percent']:.2f} % apart",
            soft_wrap=True,
        )


def _print_front(screen: Console, document: Document) -> None:
    from merino_edge.search import pareto_report

    screen.print(f"Pareto front {document['path']} of {document['score']['name']} against {document['metric']}")
    screen.print(pareto_report.table(document))


def _print_space(screen: Console, document: Document) -> None:
    screen.print(f"space {document['name']} ({document['size']:.4g} architectures)")
    _print_fields(screen, {k: v for k, v in document.items() if k not in ("kind", "path", "name", "size")})


def _print_header(screen: Console, document: Document) -> None:
    """Every field on a line; of lists of objects, such as shards, how many there are."""
    screen.print(f"{document['kind'].replace('_', ' ')} {document['path']} (schema {document['schema_version']})")
    fields = {k: v for k, v in document.items() if k not in ("kind", "path", "schema_version", "tool_version")}
    lists = {k: len(v) for k, v in fields.items() if isinstance(v, list) and v and isinstance(v[0], dict)}
    _print_fields(screen, fields | lists)


FOLDERS = {  # the file that tells what a folder is
    "manifest.json": "bundle",
    "training.json": "checkpoint",
    "corpus.json": "corpus",
    "study.json": "study",
    "logits.json": "teacher_logits",
}
HEADER_VERSIONS = {"corpus": 2, "study": 1, "teacher_logits": 1, "written_corpus": 1}
KINDS: dict[str, tuple[Callable[[Path], Document], Callable[[Console, Document], None]]] = {
    "latency_table": (_read_table, _print_table),
    "architecture": (_read_architecture, _print_artefact),
    "checkpoint": (_read_checkpoint, _print_artefact),
    "bundle": (_read_bundle, _print_artefact),
    "space": (_read_space, _print_space),
    "pareto_front": (_read_front, _print_front),
    **{kind: (functools.partial(_read_header, kind), _print_header) for kind in HEADER_VERSIONS},
}
