"""A recipe: a file with the corpus and the options of a training. The package holds `pile`, the paper's recipe.

The artefact is handwritten, and its sha256 may be left out:

    {"kind": "recipe", "schema_version": 1, "about": text, "corpus": [source, ...], "vocab_size": 50272,
     "config": {...}}

Sources are spelled as in merino_edge.data.sources. `config` holds fields of TrainingConfig; the others have their
defaults. `about` and `vocab_size` may be left out. With `vocab_size` the recipe is only for models of that vocabulary.
This module knows no model.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from merino_edge import artefact, limits, user_file
from merino_edge.training.config import TrainingConfig

KIND = "recipe"
FOLDER = Path(__file__).parent.parent / "recipes"
FIELDS = (*artefact.ENVELOPE, "about", "corpus", "vocab_size", "config")


@dataclass(frozen=True)
class Recipe:
    """The corpus and options that `train --recipe` starts from."""

    corpus: tuple[str, ...]
    config: dict[str, Any]  # arguments of TrainingConfig
    vocab_size: int | None = None
    about: str = ""


def names() -> list[str]:
    """The names of the packaged recipes."""
    return user_file.names(FOLDER)


def load(name_or_path: Path | str) -> Recipe:
    """A packaged recipe by its name, or the recipe in a file. Raises ArtefactError; InputError for a bad value."""
    path = user_file.find(FOLDER, name_or_path, "there is no recipe")
    document = artefact.read_json(path, KIND, handwritten=True)
    user_file.require_known(document, FIELDS, path)
    corpus, config = document.get("corpus"), document.get("config", {})
    if not (isinstance(corpus, list) and corpus and all(isinstance(source, str) for source in corpus)):
        raise user_file.error(path, "corpus is no list of sources", 'write "corpus": ["FILE"]')
    if not isinstance(config, dict):
        raise user_file.error(path, "config is no object", 'write "config": {}')
    defaults = {field.name: field.default for field in dataclasses.fields(TrainingConfig)}
    user_file.require_known(config, defaults, path, " in config")
    for name, value in config.items():
        types: tuple[type, ...] = (int, float) if isinstance(defaults[name], float) else (type(defaults[name]),)
        if type(value) not in types:
            raise user_file.error(path, f"{name} is {value!r}", f"give a value like {defaults[name]!r}")
    vocab_size, about = document.get("vocab_size"), document.get("about", "")
    if vocab_size is not None:
        if type(vocab_size) is not int:
            raise user_file.error(path, f"vocab_size is {vocab_size!r}", "give a number of tokens")
        limits.check_range("vocab_size", vocab_size, 1, limits.MAX_VOCAB_SIZE)
    if not isinstance(about, str):
        raise user_file.error(path, "about is no text", "leave it out")
    # `steps` below the default warm-up would be refused here, but the train verb shortens the warm-up.
    TrainingConfig(**{"warmup": 0, **config})
    return Recipe(tuple(corpus), config, vocab_size, about)
