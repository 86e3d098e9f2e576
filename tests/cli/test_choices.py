"""Choices may be typed in any capitals, and paths keep theirs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import typer

from helpers.stranger import run
from merino_edge.cli import choices
from merino_edge.cli.main import app


def parameters() -> dict[str, set[str]]:
    """The names of every verb's parameters."""
    found: dict[str, set[str]] = {}
    for verb, command in typer.main.get_command(app).commands.items():  # type: ignore[attr-defined]
        parts = {f"{verb} {name}": part for name, part in getattr(command, "commands", {}).items()} or {verb: command}
        found |= {name: {str(parameter.name) for parameter in part.params} for name, part in parts.items()}
    return found


def test_every_name_is_one_of_a_verb_s_parameters() -> None:
    verbs = parameters()
    assert {*choices.LOWER_CASE, *choices.UPPER_CASE} <= set().union(*verbs.values())
    assert all(names <= verbs[verb] for verb, names in choices.PATHS.items())


@pytest.mark.parametrize(
    ("verb", "given", "spelled"),
    [
        ("export", {"precision": "INT4", "target": "Jetpack-6.2", "out": "A"}, ["int4", "jetpack-6.2", "A"]),
        ("pareto", {"against": "Decode_MS"}, ["decode_ms"]),
        ("bench", {"against": "BUNDLE"}, ["BUNDLE"]),
        ("build", {"capability": "sm86"}, ["SM86"]),
        ("search", {"precision": None, "table": ["T"], "score": "My:Own"}, [None, ["T"], "My:Own"]),
    ],
)
def test_choices_are_spelled_as_the_program_does(verb: str, given: dict[str, Any], spelled: list[Any]) -> None:
    choices.spell(verb, given)
    assert list(given.values()) == spelled


@pytest.mark.parametrize("form", ["JSON", "Markdown", "MD", "csv", "JsonL"])
def test_forms_of_output(form: str, tmp_path: Path) -> None:
    assert run("bench", tmp_path / "nothing", "--output", form) == 3  # there is no bundle; 2 would be the form


def test_an_estimate_in_capitals(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--board", "Orin-Nano-8GB", "--mode", "15w", "--space", "DEMO", "--runtime", "Merino-Edge", "--quick"]
    assert run("estimate", *words, "--precision", "INT4", "--target", "JetPack-6.2", "--out", tmp_path / "t.jsonl") == 0
    table = ["--table", tmp_path / "t.jsonl", "--decode-ms", "9MS@64", "--weight-mb", "9MB@INT4", "--score", "Counting"]
    assert run("search", "--space", "Demo", *table, "--solver", "Exact", "--out", tmp_path / "a.json") == 0
    assert (tmp_path / "a.json").exists()
    capsys.readouterr()
