"""`merino-edge show ARTEFACT`: shows what an artefact is and holds. The kind is read from the content, not the name.

`--json` prints {"kind", "path", ...}. An architecture, a space, a front, a corpus, a study, stored logits and a
synthetic corpus add their own document. A latency table adds its header, its validation and counts of its entries.
A checkpoint adds its training record and a bundle its manifest, each with `counts`. A bundle has "stored_engines" too:
the entries of its engines in the engine store, where "file" is the whole path. With `--against OTHER`, of two tables,
it prints merino_edge.jetson.profiler.comparison.compare.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from merino_edge.cli import show_printers as printers

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

    from merino_edge import bundle
    from merino_edge.cli import console

    if against is not None:
        from merino_edge.jetson.profiler.comparison import compare
        from merino_edge.latency.table_file import load_table

        comparison = compare(*(load_table(table, unfinished=True) for table in (path, against)))
        if as_json:
            console.print_json(comparison)
        else:
            printers.print_comparison(console.stdout(), comparison, (path, against))
        return
    path = bundle.find(path)
    kind = kind_of(path)
    reader, printer = KINDS[kind]
    document = {"kind": kind, "path": str(path), **reader(path)} | {"path": str(path)}  # whatever the artefact holds
    if as_json:
        console.print_json(document)
    else:
        printer(console.stdout(soft_wrap=True), document)


def kind_of(path: Path) -> str:
    """The kind of the artefact at `path`, from its content. Raises ArtefactError where it is none that can be shown."""
    from merino_edge import artefact, limits, names, wrong_kind
    from merino_edge.errors import ArtefactError

    if names.is_missing(path):
        raise ArtefactError(f"{path} does not exist", names.beside(path) or "check the path")
    if path.is_dir():
        kind: Any = wrong_kind.FOLDERS.get(wrong_kind.folder_marker(path) or "")
        if kind not in KINDS:  # no reader looks further: others have a config.json or a state.json too
            kind = wrong_kind.kind_of(path)
    elif (begins := HEAD.match(artefact.read_head(path))) is not None:
        kind = begins[1].decode()
    else:
        text = artefact.read_text(path, limits.MAX_TABLE_BYTES)
        first = text.partition("\n")[0]  # of a table, which has an object a line
        is_lines = first.startswith("{") and first.endswith("}")
        document = artefact.parse_json(first if is_lines else text, str(path), limits.MAX_ARTEFACT_VALUES)
        kind = document.get("kind") if isinstance(document, dict) else None
    if not isinstance(kind, str) or kind not in KINDS:
        reason = f"its kind is {kind!r}" if kind else "it has no kind"
        has_use = isinstance(kind, str) and kind in wrong_kind.USES
        hint = wrong_kind.next_step(path, kind) if has_use else f"known: {', '.join(KINDS)}"
        raise ArtefactError(f"{path} is no artefact that can be shown ({reason})", hint)
    return kind


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

    a, training = checkpoint.describe(path)
    return {**training, "architecture": a.to_dict(), "counts": _counts(a)}


def _read_bundle(path: Path) -> Document:
    from merino_edge import bundle, engine_store
    from merino_edge.checkpoint import HASHED_BYTES

    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    size_bytes = sum(file.stat().st_size for file in files)
    loaded = bundle.load(path, verify=size_bytes <= HASHED_BYTES)
    built = engine_store.engines_of(loaded)
    return {
        **loaded.manifest,
        "architecture": loaded.architecture.to_dict(),
        "counts": _counts(loaded.architecture),
        "stored_engines": [{**one.entry, "file": str(one.path)} for one in built if one.is_stored],
    }


def _read_table(path: Path) -> Document:
    from collections import Counter

    from merino_edge.latency.table_file import load_table

    table = load_table(path, unfinished=True)
    entries = dict(Counter(f"{m.what} {m.mode}" for m in table.measurements))
    counts = {"entries": entries, "unstable": len(table.unstable), "failed": len(table.failed)}
    conditions = {"finished": table.finished, "moved": table.moved, "conditions": table.conditions}
    faces = table.step_time.to_dict() if table.step_time else None
    return {
        **table.header,
        "sha256": table.sha256,
        **counts,
        **conditions,
        "faces": faces,
        "validation": table.validation,
        "verdict": table.verdict and table.verdict.to_dict(),
    }


def _read_front(path: Path) -> Document:
    from merino_edge import artefact
    from merino_edge.search.forms import Front

    return artefact.read_json(path, "pareto_front", 1, form=Front)


def _read_header(kind: str, path: Path) -> Document:
    """The header of a corpus, a study, stored logits or a synthetic corpus. The data itself is not read."""
    from importlib import import_module

    from merino_edge import artefact
    from merino_edge.wrong_kind import FOLDERS

    names = (name for name, folder_kind in FOLDERS.items() if folder_kind == kind)
    newest, module, form = HEADERS[kind]
    file = path / next(names) if path.is_dir() else path
    return artefact.read_json(file, kind, newest, form=getattr(import_module(module), form))


def _read_space(path: Path) -> Document:
    from merino_edge.search import space_file
    from merino_edge.search.builtin_spaces import load_space

    space = load_space(str(path))
    return {**space_file.to_dict(space), "size": space.size}


HEADERS = {  # the newest schema, and where its form stands
    "corpus": (2, "merino_edge.data.forms", "Header"),
    "study": (1, "merino_edge.training.forms", "Study"),
    "teacher_logits": (1, "merino_edge.distillation.forms", "TeacherLogits"),
    "written_corpus": (1, "merino_edge.distillation.forms", "WrittenCorpus"),
}
# How every artefact of ours begins; one that a person wrote may begin otherwise, and is parsed for its kind.
HEAD = re.compile(rb'\s*\{\s*"kind"\s*:\s*"([a-z_-]{1,40})"')
KINDS: dict[str, tuple[Callable[[Path], Document], Callable[[Console, Document], None]]] = {
    "latency_table": (_read_table, printers.print_table),
    "architecture": (_read_architecture, printers.print_artefact),
    "checkpoint": (_read_checkpoint, printers.print_artefact),
    "bundle": (_read_bundle, printers.print_artefact),
    "space": (_read_space, printers.print_space),
    "pareto_front": (_read_front, printers.print_front),
    **{kind: (functools.partial(_read_header, kind), printers.print_header) for kind in HEADERS},
}
