"""What stands at a path: the kind of an artefact, told by the beginning of a file, without any other module's help."""

from __future__ import annotations

import contextlib
import json
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge.errors import OutputError

HEAD_BYTES = 1 << 16  # of a file, in which its kind stands
MARKERS = {  # the file that tells what a folder is: its own kind, and the folder's
    "manifest.json": ("bundle", "bundle"),
    "training.json": ("checkpoint", "checkpoint"),
    "state/state.json": ("training-state", "checkpoint"),
    "corpus.json": ("corpus", "corpus"),
    "logits.json": ("teacher_logits", "teacher_logits"),
    "study.json": ("study", "study"),
    "state.json": ("demo_state", "demo_state"),
}
TRANSFORMERS = "huggingface"
GGUF, GGUF_MAGIC, GGUF_MARK = "gguf", b"GGUF", b"merino_edge.version"  # the mark: it was written here
BEGUN = frozenset({"state", "log.jsonl"})  # all that a training leaves that was killed before its first save
CONTAINERS = ("study", "demo_state")  # folders that hold the outputs of other verbs
NOUNS = {
    "bundle": "a bundle",
    "checkpoint": "a checkpoint",
    "architecture": "an architecture",
    "latency_table": "a latency table",
    "space": "a search space",
    "pareto_front": "a Pareto front",
    "corpus": "a tokenized corpus",
    "study": "a study",
    "teacher_logits": "a teacher's logits",
    GGUF: "a GGUF model",
    TRANSFORMERS: "a Hugging Face folder",
    "evaluation": "an evaluation report",
    "written_corpus": "the record of a synthetic corpus",
    "recipe": "a training recipe",
    "prompts": "a file of prompts",
    "prompt_cache": "a prompt cache",
    "demo_state": "the folder of a demo",
    "demo": "the summary of a demo",
}


@dataclass(frozen=True)
class Existing:
    """What stands at a path: its kind, None where merino-edge did not write it, and whether it took long to make."""

    kind: str | None
    is_dear: bool = False
    is_unfinished: bool = False  # a training that can go on


def words_of(kind: str) -> str:
    """A kind as a message names it: "a bundle"."""
    plain = kind.replace("_", " ").replace("-", " ").strip()
    if not plain:
        return "of a kind without a name"
    return NOUNS.get(kind, f"{'an' if plain[0] in 'aeio' else 'a'} {plain}")


def what_is(path: Path) -> Existing | None:
    """What stands at `path`; None for nothing, an empty file or folder, or what a killed training began."""
    if not path.is_dir():
        if not os.path.lexists(path):
            return None
        document = head_of(path)
        if (data := first_bytes(path, HEAD_BYTES)).startswith(GGUF_MAGIC) and GGUF_MARK in data:
            return Existing(GGUF)
        if document is None:
            return None if path.is_file() and path.stat().st_size == 0 else Existing(None)
        kind = str(document["kind"])
        is_measured = kind == "latency_table" and not document.get("estimated")
        return Existing(kind, is_dear=is_measured or kind == "evaluation")
    for marker, (kind, of_folder) in MARKERS.items():
        if (document := head_of(path / marker)) is not None and document["kind"] == kind:
            dear = of_folder in ("checkpoint", "corpus", "teacher_logits")
            return Existing(of_folder, dear, is_unfinished=(path / "state" / "state.json").is_file())
    if (path / "config.json").is_file() and any(path.glob("*.safetensors")):
        return Existing(TRANSFORMERS, is_dear=True)
    visible = {name for name in os.listdir(path) if not name.startswith(".")}  # hidden: what killed processes left
    return None if visible <= BEGUN else Existing(None)


def head_of(path: Path) -> dict[str, Any] | None:
    """The first JSON object of a file, as far as it can be read; None where it has no kind."""
    return head(first_bytes(path, HEAD_BYTES))


def first_bytes(path: Path, most: int) -> bytes:
    """The first bytes of a plain file; none of anything else. A pipe or a device is not opened."""
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return b""
        with open(path, "rb") as file:
            return file.read(most)
    except (OSError, ValueError):  # ValueError: a name with a NUL
        return b""


def head(data: bytes) -> dict[str, Any] | None:
    """The object that is the first line of a file or all of it; of one that is longer or cut, its kind alone."""
    text = data[:HEAD_BYTES].decode(errors="replace")
    for whole in (text.partition("\n")[0], text):
        with contextlib.suppress(ValueError, RecursionError):
            document = json.loads(whole)
            return document if isinstance(document, dict) and isinstance(document.get("kind"), str) else None
    found = re.match(r'\{\s*"kind":\s*"([a-zA-Z_-]{1,40})"', text) or re.search(r'[{,]"kind":"([a-z_]{1,40})"', text)
    return {"kind": found[1], "estimated": '"estimated":true' in text} if found and text.startswith("{") else None


def refuse_other(path: Path, kind: str) -> Existing | None:
    """What is there, if it has this kind. Raises OutputError where anything else is there."""
    there = what_is(path)
    if there is None or there.kind == kind:
        return there
    if there.kind is None:
        if kind in CONTAINERS:
            return None
        raise OutputError(f"{path} exists and is not an artefact of merino-edge", "choose another --out")
    what = f"{path} is {words_of(there.kind)}, which {words_of(kind)} never replaces"
    raise OutputError(what, "choose another --out")
