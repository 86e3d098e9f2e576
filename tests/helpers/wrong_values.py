"""Wrong values in every field of a JSON document: each changed copy is hashed anew, as its maker could do it."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from merino_edge import artefact
from merino_edge.errors import MerinoError
from merino_edge.latency.measurement import add_checksum

Document = dict[str, Any]
MISSING = object()
WRONG: tuple[Any, ...] = (
    *(None, True, -1, 0, 2**40, 10**250, 1e308, -1e308, 5e-324, 0.5),
    *("", "x" * 100_000, "[/x]\x1b[2J", "\u202e\U0001f98a", "nan", "../.."),
    *([], {}, [None], [[]], {"": None}, [{"a": [1, {"b": 2}]}], MISSING),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The path of every value inside; of a long list those of its first and last item."""
    if isinstance(value, dict):
        items: list[tuple[Any, Any]] = list(value.items())
    elif isinstance(value, list):
        items = [(i, value[i]) for i in sorted({0, len(value) - 1}) if value]
    else:
        return
    for key, inside in items:
        yield (*path, key)
        yield from places(inside, (*path, key))


def changed(document: Document, path: tuple[Any, ...], value: Any) -> Document:
    """The document with another value at one place, or without what is there (MISSING)."""
    other = copy.deepcopy(document)
    at: Any = other
    for key in path[:-1]:
        at = at[key]
    if value is MISSING:
        del at[path[-1]]
    else:
        at[path[-1]] = copy.deepcopy(value)
    return other


def changes(document: Document, count: int, seed: int = 0) -> Iterator[tuple[str, Document]]:
    """`count` changed copies, each with what was changed: every field once, and then some drawn at random."""
    rng = random.Random(seed)
    body = {key: value for key, value in document.items() if key not in artefact.ENVELOPE}
    fields = list(places(body))
    rng.shuffle(fields)
    drawn = [*fields, *rng.choices(fields, k=max(0, count - len(fields)))]
    for path in drawn[:count]:
        value = rng.choice(WRONG)
        shown = "nothing" if value is MISSING else json.dumps(value)[:60]
        yield f"{'.'.join(map(str, path))} = {shown}", changed(document, path, value)


def write(path: Path, document: Document) -> None:
    """Write an artefact with the hash of what it holds."""
    body = {key: value for key, value in document.items() if key != "sha256"}
    path.write_text(json.dumps({**body, "sha256": artefact.sha256_text(artefact.canonical_json(body))}))


def write_lines(path: Path, lines: list[Document]) -> None:
    """Write a latency table: a header, and lines with checksums of their own."""
    header = {key: value for key, value in lines[0].items() if key != "sha256"}
    header["sha256"] = artefact.sha256_text(artefact.canonical_json(header))
    rest = [add_checksum({key: value for key, value in line.items() if key != "sha256"}) for line in lines[1:]]
    path.write_text("\n".join([json.dumps(header, sort_keys=True), *rest]) + "\n")


def refusal(use: Callable[[], object]) -> str:
    """The line of a typed refusal; "" where the use succeeds. Whatever else it raises passes through."""
    try:
        use()
    except MerinoError as error:
        return str(error)
    return ""
