"""A draft: an honest artefact's files, some of them changed at the level of their structure.

A codec reads a file into a structure, changes it, and writes it back. The loader's `seal` then makes hashes right.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

from fuzz import byte_changes, json_changes

Files = dict[str, bytes]


@dataclass(frozen=True)
class Codec:
    """The form of a file: read it, change it once, write it."""

    decode: Callable[[bytes], Any]
    step: Callable[[Any, Random], Any]
    encode: Callable[[Any], bytes]


def _decode_lines(data: bytes) -> list[Any]:
    return [json.loads(line) for line in data.splitlines() if line]


def _encode_lines(lines: Any) -> bytes:
    rows = lines if isinstance(lines, list) else [lines]
    return b"".join(json_changes.encode(row) + b"\n" for row in rows[:3000])


def _decode_headed(data: bytes) -> list[Any]:
    line, _, rest = data.partition(b"\n")
    return [json.loads(line), rest]


def _step_headed(parts: list[Any], rng: Random) -> list[Any]:
    header, rest = parts
    if rng.random() < 0.75:
        return [json_changes.step(header, rng), rest]
    return [header, byte_changes.step(rest, rng)]


BYTES = Codec(bytes, byte_changes.step, bytes)
JSON = Codec(json.loads, json_changes.step, json_changes.encode)
LINES = Codec(_decode_lines, json_changes.step, _encode_lines)  # one object a line
HEADED = Codec(_decode_headed, _step_headed, lambda parts: json_changes.encode(parts[0]) + b"\n" + parts[1])


def text(*words: str) -> Codec:
    """Plain text of a language that has these words."""
    return Codec(lambda data: data.decode(), byte_changes.text_step(*words), byte_changes.encode_text)


class Draft:
    """The files of one execution. What is not changed is taken from the honest artefact."""

    def __init__(self, loader: Loader, honest: Files) -> None:
        self.loader, self.honest = loader, honest
        self.structures: dict[str, Any] = {}
        self.written: Files = {}
        self.removed: set[str] = set()

    def structure(self, name: str) -> Any:
        """The structure of a file, which may be changed in place."""
        if name not in self.structures:
            self.structures[name] = self.loader.codec(name).decode(self.honest[name])
        return self.structures[name]

    def step(self, name: str, rng: Random) -> None:
        """Change the file once: its structure, or sometimes its bytes."""
        self.structures[name] = self.loader.codec(name).step(self.structure(name), rng)

    def content(self, name: str) -> bytes:
        """The bytes of a file as it is now."""
        if name in self.written:
            return self.written[name]
        if name not in self.structures:
            return self.honest.get(name, b"")
        self.written[name] = self.loader.codec(name).encode(self.structures[name])
        return self.written[name]

    def changed(self, name: str) -> bool:
        """Whether the file differs from the honest one, as far as is known."""
        return name in self.structures or name in self.written

    def changes(self) -> dict[str, bytes | None]:
        """What to write; None: the file is removed."""
        written = {name: self.content(name) for name in self.structures} | self.written
        return {**written, **dict.fromkeys(self.removed, None)}


def no_seal(draft: Draft) -> None:
    """The artefact has no hashes."""


@dataclass(frozen=True)
class Loader:
    """What is tried: honest files, how they are changed, and what a user does with them."""

    name: str
    make: Callable[[], Files]
    use: Callable[[Path], object]
    codecs: Mapping[str, Codec] = field(default_factory=dict)  # by file, or by the end of its name; else by suffix
    seal: Callable[[Draft], None] = no_seal
    weights: Mapping[str, float] = field(default_factory=dict)  # how often a file is changed; left out: 1
    package: str = ""  # of an extra that it needs
    refuses: bool = True  # a board's files are read as far as they can be
    writes: bool = False  # its use writes the files anew
    extra_step: Callable[[Draft, Random], bool] = lambda draft, rng: False  # True: it has changed something

    def codec(self, name: str) -> Codec:
        """The form of a file."""
        for end in (name, Path(name).name, Path(name).suffix):
            if end in self.codecs:
                return self.codecs[end]
        return {".json": JSON, ".jsonl": LINES}.get(Path(name).suffix, BYTES)


def draft(loader: Loader, honest: Files, seed: str, skip: frozenset[int] = frozenset()) -> dict[str, bytes | None]:
    """The changed files of the execution with this seed. Each step has numbers of its own, so any can be left out."""
    rng = Random(seed)
    made = Draft(loader, honest)
    names = [name for name in honest if loader.weights.get(name, 1)]
    weights = [loader.weights.get(name, 1) for name in names]
    sealed, raw, gone = rng.random() < 0.97, rng.random() < 0.04, rng.random() < 0.005
    for number in range(rng.choice((1, 1, 1, 1, 1, 2, 2, 3, 5))):
        own = Random(f"{seed}.{number}")
        if number in skip:
            continue
        name = own.choices(names, weights)[0]
        if not loader.extra_step(made, own):
            made.step(name, own)
        if raw:
            made.written[name] = byte_changes.step(made.content(name), own)
    if gone:
        made.removed.add(rng.choice(names))
    if sealed:
        loader.seal(made)
    return made.changes()


def sign_file(made: Draft, name: str) -> None:
    """Make the hash inside a JSON artefact right, unless its bytes were changed."""
    if name not in made.written:
        json_changes.sign(made.structure(name))


def record(made: Draft, name: str, into: str, path: tuple[Any, ...], *, size: tuple[Any, ...] | None = None) -> None:
    """Write the hash of a changed file, and its size, into the structure of another."""
    if made.changed(name) and into not in made.written:
        content = made.content(name)
        json_changes.put(made.structure(into), path, json_changes.sha256(content))
        if size is not None:
            json_changes.put(made.structure(into), size, len(content))
