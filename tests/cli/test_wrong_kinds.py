"""Every verb that gets another kind of artefact says what it is and the next command, before it does anything."""

from __future__ import annotations

import inspect
from importlib import import_module
from pathlib import Path
from typing import get_args

import pytest
import typer

from helpers.looks_like import looks_like
from helpers.stranger import run
from merino_edge import wrong_kind
from merino_edge.cli import distill_generate, distill_logits, expected_kinds, show
from merino_edge.cli.main import app
from merino_edge.cli.verbs import VERBS

# What else a verb needs before it looks at its arguments.
MORE = {
    "profile": ["--out", "new"],
    "search": ["--out", "new"],
    "pareto": ["--out", "new"],
    "tokenize": ["--out", "new"],
    "train": ["--out", "new"],
    "distill generate": ["--prompts", "children", "--out", "new"],
    "distill logits": ["--out", "new"],
    "import": ["--out", "new"],
    "export": ["--out", "new"],
    "export-hf": ["--out", "new"],
}
CASES = [(verb, name) for verb, expected in expected_kinds.EXPECTED.items() for name in expected]


def words(verb: str, name: str, path: Path, folder: Path) -> list[str]:
    """A command line whose parameter `name` is `path`. The other ones that are paths are as they must be."""
    command = typer.main.get_command(app)
    for part in verb.split():
        command = command.commands[part]  # type: ignore[attr-defined]
    line = [*verb.split(), *MORE.get(verb, [])]
    for parameter in command.params:
        wanted = expected_kinds.EXPECTED[verb].get(str(parameter.name), ())
        value = path if parameter.name == name else None
        if value is None and parameter.required and wanted:
            value = folder / wanted[0]  # a text is missing, and that is looked at later
        if value is None and parameter.required and parameter.param_type_name == "argument":
            value = folder / "architecture"
        if value is not None:
            line += [str(value)] if parameter.param_type_name == "argument" else [parameter.opts[0], str(value)]
    return line


@pytest.mark.parametrize(("verb", "name"), CASES, ids=lambda value: str(value))
def test_the_wrong_kind_is_named(
    verb: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    good = tmp_path / "good"
    good.mkdir()
    for kind in wrong_kind.NOUNS:
        looks_like(kind, good)
    for kind in sorted({"bundle", "checkpoint", "architecture", "latency_table", "corpus", "pareto_front"}):
        if kind in expected_kinds.EXPECTED[verb][name]:
            continue
        assert run(*words(verb, name, good / kind, good)) == 3
        said = capsys.readouterr()
        assert said.out == ""
        wanted = {**wrong_kind.NOUNS, wrong_kind.TEXT: "a text"}[expected_kinds.EXPECTED[verb][name][0]]
        assert said.err.startswith(f"merino-edge: {good / kind} is {wrong_kind.NOUNS[kind]}, not {wanted}")
        assert said.err.count("\n") == 1 and "merino-edge " in said.err.partition("; ")[2]
    assert sorted(tmp_path.iterdir()) == [good]


def test_the_next_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    looks_like("checkpoint", tmp_path).rename("smollm2")
    assert run("build", "smollm2") == 3
    line = "merino-edge: smollm2 is a checkpoint, not a bundle; run: merino-edge export smollm2 --out BUNDLE\n"
    assert capsys.readouterr().err == line
    assert run("bench", "smolm2") == 3
    assert capsys.readouterr().err == "merino-edge: smolm2 does not exist; did you mean smollm2?\n"


# Paths that are no artefact, or that a verb writes.
OTHER_PATHS = {
    "out",
    "plot",
    "html",
    "data",
    "perplexity",
    "keep_vocab",
    "tensorboard",
    "prompt_cache",
    "path",
    "chat_template",
}


def test_each_path_of_a_verb_is_looked_at() -> None:
    """A new option that takes an artefact needs a row in the table."""
    verbs = {"distill generate": distill_generate.distill_generate, "distill logits": distill_logits.distill_logits}
    for verb, row in VERBS.items():
        module, _, function = row.function.partition(":")
        if verb != "distill":
            verbs[verb] = getattr(import_module(f"merino_edge.cli.{module}"), function)
    for verb, function in verbs.items():
        options = inspect.signature(function, eval_str=True).parameters.values()
        paths = {one.name for one in options if "pathlib.Path" in str(get_args(one.annotation)[:1])}
        assert paths - OTHER_PATHS <= set(expected_kinds.EXPECTED.get(verb, {})), verb
    assert set(expected_kinds.EXPECTED) <= set(verbs)


@pytest.mark.parametrize("kind", wrong_kind.NOUNS)
def test_no_hint_names_a_command_that_refuses_the_kind(kind: str, tmp_path: Path) -> None:
    verb = wrong_kind.next_step(looks_like(kind, tmp_path), kind).split()[2]
    assert verb in VERBS and (verb != "show" or kind in show.KINDS)
