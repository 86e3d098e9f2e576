"""A recipe: what to train on and how, as a file. The package holds `pile`, the paper's; a path names another.

Artefact, written by hand (sha256 may be left out):

    {"kind": "recipe", "schema_version": 1, "about": text, "corpus": [source, ...], "vocab_size": 50272,
     "config": {...}}

Sources are spelled as in merino_edge.sources, `config` has fields of TrainingConfig; the rest has the default.
`about` and `vocab_size` (of the models that it is for; null: any) may be left out. Knows no model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge import artefact, limits
from merino_edge.errors import ArtefactError, InputError
from merino_edge.training_config import TrainingConfig

KIND = "recipe"
FOLDER = Path(__file__).parent / "recipes"
FIELDS = ("kind", "schema_version", "tool_version", "sha256", "about", "corpus", "vocab_size", "config")


@dataclass(frozen=True)
class Recipe:
    """What `train --recipe` begins with."""

    corpus: tuple[str, ...]
    config: dict[str, Any]  # arguments of TrainingConfig
    vocab_size: int | None = None
    about: str = ""


def names() -> list[str]:
    """Of the recipes in the package."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(name_or_path: Path | str) -> Recipe:
    """A recipe of the package by its name, or one in a file. Raises ArtefactError, InputError for a value."""
    path = Path(name_or_path)
    if str(name_or_path) in names():
        path = FOLDER / f"{name_or_path}.json"
    elif not path.exists():
        raise InputError(f"there is no recipe {name_or_path}", f"give a file, or one of {', '.join(names())}")
    document = artefact.read_json(path, KIND, by_hand=True)
    if unknown := sorted(set(document) - set(FIELDS)):
        raise _error(path, f"unknown field {unknown[0]!r}", f"known: {', '.join(FIELDS)}")
    corpus, config = document.get("corpus"), document.get("config", {})
    if not (isinstance(corpus, list) and corpus and all(isinstance(source, str) for source in corpus)):
        raise _error(path, "corpus is no list of sources", 'write "corpus": ["FILE"]')
    if not isinstance(config, dict):
        raise _error(path, "config is no object", 'write "config": {}')
    known = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    if unknown := sorted(set(config) - set(known)):
        raise _error(path, f"unknown field {unknown[0]!r} in config", f"known: {', '.join(known)}")
    for name, value in config.items():
        types: tuple[type, ...] = (int, float) if isinstance(known[name], float) else (type(known[name]),)
        if type(value) not in types:
            raise _error(path, f"{name} is {value!r}", f"give a value like {known[name]!r}")
    vocab_size, about = document.get("vocab_size"), document.get("about", "")
    if vocab_size is not None:
        if type(vocab_size) is not int:
            raise _error(path, f"vocab_size is {vocab_size!r}", "give a number of tokens")
        limits.check_range("vocab_size", vocab_size, 1, limits.MAX_VOCAB_SIZE)
    if not isinstance(about, str):
        raise _error(path, "about is no text", "leave it out")
    # Alone, `steps` below the default warm-up would be refused; who trains shortens the warm-up then.
    TrainingConfig(**{"warmup": 0, **config})
    return Recipe(tuple(corpus), config, vocab_size, about)


def _error(path: Path, what: str, hint: str) -> ArtefactError:
    return ArtefactError(f"{path}: {what}", hint)
