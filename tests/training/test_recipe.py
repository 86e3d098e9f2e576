"""Recipes: the packaged recipe is the paper's, and a mistake in a file is refused by name."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from merino_edge.data import hub_dataset
from merino_edge.errors import ArtefactError, InputError, MerinoError
from merino_edge.training import recipe
from merino_edge.training.config import TrainingConfig

GOOD: dict[str, Any] = {"kind": "recipe", "schema_version": 1, "corpus": ["a.txt"], "config": {"steps": 10, "clip": 1}}


def test_the_pile_recipe_is_the_papers() -> None:
    found = recipe.load("pile")
    paper = dataclasses.asdict(TrainingConfig())
    assert {name: paper[name] for name in found.config} == found.config
    assert TrainingConfig(**found.config) == TrainingConfig()
    assert found.vocab_size == 50272 and recipe.names() == ["pile"]
    (source,) = found.corpus
    assert source == "hf:monology/pile-uncopyrighted:train:text" and source.startswith(hub_dataset.PREFIX)


def test_a_file_is_a_recipe(tmp_path: Path) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(GOOD))
    assert recipe.load(path) == recipe.Recipe(("a.txt",), {"steps": 10, "clip": 1})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"corpora": []}, "unknown field 'corpora'"),
        ({"config": {"step": 1}}, "unknown field 'step' in config"),
        ({"config": {"steps": "many"}}, "steps is 'many'"),
        ({"config": {"steps": True}}, "steps is True"),
        ({"config": {"steps": 0}}, "steps"),
        ({"config": {"precision": "fp8"}}, "precision is 'fp8'"),
        ({"config": []}, "config is no object"),
        ({"corpus": []}, "corpus is no list"),
        ({"corpus": "a.txt"}, "corpus is no list"),
        ({"corpus": [1]}, "corpus is no list"),
        ({"vocab_size": "50272"}, "vocab_size is '50272'"),
        ({"vocab_size": 0}, "vocab_size"),
        ({"about": 3}, "about is no text"),
        ({"kind": "corpus"}, "is a tokenized corpus, not a training recipe"),
        ({"schema_version": 2}, "knows up to 1"),
        ({"sha256": "0"}, "does not match its own sha256"),
    ],
)
def test_a_mistake_is_refused_by_its_name(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(MerinoError, match=words) as caught:
        recipe.load(path)
    assert "\n" not in str(caught.value) and caught.value.hint


def test_what_is_no_recipe_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe heap.*one of pile"):
        recipe.load("heap")
    (tmp_path / "mine.json").write_text("[]")
    with pytest.raises(ArtefactError, match="not a recipe"):
        recipe.load(tmp_path / "mine.json")
