"""What a file or folder is, told from its first bytes, and what to run with it where a verb needs another kind.

A folder's kind is told by the file that each of its kind has, a JSON artefact's by its field `kind`. Nothing is
verified here: the loaders do that. So this costs the same for a file of any size. A pipe or a device is not opened.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from merino_edge import names
from merino_edge.errors import ArtefactError
from merino_edge.kind import MARKERS, NOUNS, TRANSFORMERS, first_bytes

# The file that tells the kind of a folder.
FOLDERS = {marker: of_folder for marker, (own, of_folder) in MARKERS.items() if own == of_folder}
FOLDERS |= {"config.json": TRANSFORMERS}
TEXT = "text"  # what a verb may want too; nothing says of itself that it is one
TRAIN, IMPORT = "merino-edge train {path} --corpus TEXT --out CHECKPOINT", "merino-edge import {path} --out CHECKPOINT"
# What each kind is for.
USES = {
    "bundle": "merino-edge generate {path}",
    "checkpoint": "merino-edge export {path} --out BUNDLE",
    "architecture": TRAIN,
    "latency_table": "merino-edge search --table {path} --out A.json",
    "space": "merino-edge search --space {path} --out A.json",
    "corpus": "merino-edge train A.json --corpus {path} --out CHECKPOINT",
    "written_corpus": "merino-edge tokenize {path} --vocab 4096 --out CORPUS",
    "study": "merino-edge study {path}",
    "teacher_logits": "merino-edge train A.json --corpus CORPUS --teacher {path} --out CHECKPOINT",
    "gguf": IMPORT,
    TRANSFORMERS: IMPORT,
    "recipe": "merino-edge train A.json --recipe {path} --out CHECKPOINT",
    "prompts": "merino-edge distill generate CHECKPOINT --prompts {path} --out CORPUS.jsonl",
    "evaluation": "merino-edge evaluate MODEL --data FOLDER --against {path}",
    "prompt_cache": "merino-edge generate BUNDLE --prompt-cache {path}",
    "demo_state": "merino-edge demo --out {path}",
    "demo": "merino-edge demo --out {path}",
}
# How each kind is made.
SOURCES = {
    "bundle": "merino-edge export CHECKPOINT --out BUNDLE",
    "checkpoint": "merino-edge train, or merino-edge import",
    "architecture": "merino-edge search --out A.json",
    "latency_table": "merino-edge profile --out TABLE.jsonl",
    "corpus": "merino-edge tokenize TEXT --vocab 4096 --out CORPUS",
    "evaluation": "merino-edge evaluate MODEL --out REPORT.json",
    "teacher_logits": "merino-edge distill logits CHECKPOINT --corpus CORPUS --out LOGITS",
}
MADE_ANEW = ("latency_table", "evaluation")  # no other artefact becomes one of these
HEAD_BYTES = 4096
KIND_FIELD, VERSION_FIELD = re.compile(rb'"kind"\s*:\s*"([a-z_-]{1,40})"'), re.compile(rb'"schema_version"\s*:')


def kind_of(path: Path) -> str | None:
    """The kind of what is at `path`, one of NOUNS; None where nothing says it, or nothing is there."""
    marker = folder_marker(path)
    if marker is not None:
        head = first_bytes(path / marker, HEAD_BYTES)
        kind = TRANSFORMERS if b'"model_type"' in head else _kind_field(head)
        return kind if kind == FOLDERS[marker] else None
    head = first_bytes(path, HEAD_BYTES)
    return "gguf" if head.startswith(b"GGUF") else _kind_field(head)


def folder_marker(path: Path) -> str | None:
    """The file by which a folder may be of a kind, one of FOLDERS; None where there is none."""
    try:
        return next((name for name in FOLDERS if (path / name).is_file()), None)
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return None


def _kind_field(head: bytes) -> str | None:
    is_object = head.lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")
    field = KIND_FIELD.search(head) if is_object and VERSION_FIELD.search(head) else None
    kind = field[1].decode() if field else None
    return kind if kind in NOUNS else None


def require(path: Path, *wanted: str, packaged: Sequence[str] = ()) -> None:
    """Raise ArtefactError where `path` is missing, or is of a known kind that is none of `wanted`.

    Whatever else is there passes: its loader says more of it. `packaged` are names that a path may be instead.
    """
    if names.is_missing(path):
        nearest = names.near(str(path), packaged)
        meant = f"did you mean {nearest}?" if nearest else names.beside(path)
        made = f"make one: {SOURCES[wanted[0]]}" if wanted[0] in SOURCES else "check the path"
        raise ArtefactError(f"{path} does not exist", meant or made)
    kind, is_file = kind_of(path), path.is_file()
    if kind in wanted and not (is_file and kind in FOLDERS.values()):
        return
    folder = kind_of(path.parent) if is_file else None
    if folder is not None and folder in wanted:
        raise ArtefactError(f"{path} is a file of {NOUNS[folder]}", f"give the whole folder: {path.parent}")
    if kind is not None and kind not in wanted:
        raise error(path, kind, *wanted)


def error(path: Path, kind: str, *wanted: str) -> ArtefactError:
    """The error to raise for an artefact that is not of a kind that is `wanted`; it names the next command."""
    nouns = {**NOUNS, TEXT: "a text"}
    expected = " or ".join(nouns.get(name, f"of kind {name!r}") for name in wanted)
    hint = f"make one: {SOURCES[wanted[0]]}" if wanted[0] in MADE_ANEW else next_step(path, kind)
    return ArtefactError(f"{path} is {NOUNS.get(kind, f'of kind {kind!r}')}, not {expected}", hint)


def next_step(path: Path, kind: str) -> str:
    """The hint that names the command for an artefact of this kind."""
    if kind == "written_corpus":
        path = path.with_suffix(".jsonl")  # the corpus itself, beside its record
    if kind in (*FOLDERS.values(), "demo") and path.is_file():
        path = path.parent
    return "run: " + USES.get(kind, "merino-edge show {path}").format(path=shlex.quote(str(path)))
