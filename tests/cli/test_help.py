"""The help of every verb: it shows every default, is grouped and quick. The shell completes verbs and options."""

from __future__ import annotations

import inspect
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.main import get_command
from typer.testing import CliRunner

from helpers.stranger import run
from merino_edge.cli.main import app
from merino_edge.cli.verbs import MAX_HELP_COLUMNS, RENAMED, VERBS

HEAVY = (
    *("torch", "onnx", "onnx_ir", "onnxruntime", "numpy", "transformers", "tokenizers", "matplotlib", "starlette"),
    *("lm_eval", "rich"),
)
PROGRAM = get_command(app)


def _commands() -> Iterator[tuple[str, Any]]:
    """Each verb with the words that call it. The verbs of a group come one by one."""
    for name in VERBS:
        verb = PROGRAM.commands[name]  # type: ignore[attr-defined]
        group = getattr(verb, "commands", None)
        yield from ((f"{name} {inner}", group[inner]) for inner in group) if group else [(name, verb)]


COMMANDS = dict(_commands())


def screen(words: str, columns: int) -> str:
    """What `merino-edge WORDS --help` prints, joined to one line, because line breaks depend on the terminal."""
    result = CliRunner().invoke(app, [*words.split(), "--help"], prog_name="merino-edge", env={"COLUMNS": str(columns)})
    assert result.exit_code == 0, result.output
    assert all(len(line) <= columns for line in result.output.splitlines())
    return " ".join(result.output.split())


@pytest.mark.parametrize("columns", [80, 120])
@pytest.mark.parametrize("words", COMMANDS)
def test_help_shows_every_text_and_default(words: str, columns: int) -> None:
    shown, command = screen(words, columns), COMMANDS[words]
    for parameter in command.params:
        text = " ".join((parameter.help or "").split())
        assert text, f"{words} {parameter.name} has no help"
        assert text in shown  # with each bracketed part of it
        assert all(option in shown for option in (*parameter.opts, *parameter.secondary_opts) if option[0] == "-")
        # A default has one form only, which this test can find.
        assert "default" not in re.sub(r" \[default: [^][]+\]$", "", text)
        default = parameter.default
        if "[default: " in text:
            assert default in (None, ""), f"two defaults of {words} --{parameter.name}"
        elif default not in (None, "") and not isinstance(default, bool):
            assert re.search(rf"default: {re.escape(str(getattr(default, 'value', default)))}[];]", shown)


def test_help_in_a_pipe_is_as_wide_as_on_a_wide_screen() -> None:
    """A pipe has no width, and click would take 80 columns."""
    words = [sys.executable, "-m", "merino_edge", "export", "--help"]
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    piped, wide = (
        subprocess.run(words, capture_output=True, text=True, env=environment | more, check=True).stdout
        for more in ({}, {"COLUMNS": "200"})
    )
    assert piped == wide and 80 < max(map(len, piped.splitlines())) <= MAX_HELP_COLUMNS


def test_the_table_of_verbs_says_what_their_docstrings_say() -> None:
    for name, verb in VERBS.items():
        command = PROGRAM.commands[name]  # type: ignore[attr-defined]
        assert inspect.cleandoc(command.help).split("\n")[0] == verb.summary
    overview = CliRunner().invoke(app, ["--help"], prog_name="merino-edge", env={"COLUMNS": "80"}).output
    for name, verb in VERBS.items():
        assert re.search(rf"^  {name} +{re.escape(verb.summary)}$", overview, re.MULTILINE)
    panels = [f"{panel}:" for panel in dict.fromkeys(verb.panel for verb in VERBS.values())]
    assert panels == ["Design:", "Train:", "Ship:", "Run:", "Look:"]
    assert [line for line in overview.splitlines() if line in panels] == panels


@pytest.mark.parametrize("words", ["", "distill", *COMMANDS])
def test_help_loads_no_heavy_library(words: str) -> None:
    code = (
        "import sys; sys.path = [p for p in sys.path if p]\n"
        f"sys.argv = ['merino-edge', *{words.split()}, '--help']\n"
        "from merino_edge.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"print([m for m in {HEAVY} if m in sys.modules], file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(sys.executable).parent)
    assert done.stderr.strip() == "[]"
    assert "Usage: merino-edge" in done.stdout


def test_the_overview_is_instant_and_imports_no_verb(merino: tuple[str, ...]) -> None:
    def processor_seconds(*command: str) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    empty = min(processor_seconds(sys.executable, "-c", "pass") for _ in range(5))
    overview = min(processor_seconds(*merino, "--help") for _ in range(5))
    assert overview < 0.3 + 2 * empty  # the second part for slower machines
    code = "import sys, merino_edge.cli.main as m; m.main()"
    loaded = subprocess.run(
        [sys.executable, "-X", "importtime", "-c", code, "--help"], capture_output=True, text=True, check=True
    ).stderr
    modules = set(re.findall(r"merino_edge\.cli\.(\w+)", loaded))
    assert modules == {"main", "outputs", "verbs"}


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("merino-edge ex", {"export", "export-hf"}),
        ("merino-edge ", set(VERBS)),
        ("merino-edge distill ", {"generate", "logits"}),
        ("merino-edge train --batch", {"--batch", "--batch-size"}),
    ],
)
def test_the_shell_completes(line: str, expected: set[str]) -> None:
    program = Path(sys.executable).parent / "merino-edge"
    words = line.split(" ")
    environment = {
        **os.environ,
        "_MERINO_EDGE_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
    }
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert set(done.stdout.split()) == expected and not done.stderr, done.stderr


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_the_shells_script_is_printed(shell: str) -> None:
    program = Path(sys.executable).parent / "merino-edge"
    environment = {**os.environ, "_MERINO_EDGE_COMPLETE": f"source_{shell}"}
    done = subprocess.run([str(program)], capture_output=True, text=True, env=environment)
    assert done.returncode == 0 and "_MERINO_EDGE_COMPLETE" in done.stdout


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_an_old_verb_names_the_new_one(old: str, new: str, capfd: pytest.CaptureFixture[str]) -> None:
    group = new.split()[0]
    for words in (old, f"{group} {old}"):
        assert run(*words.split(), "teacher", "--out", "x") == 2
        assert capfd.readouterr().err == f"merino-edge: the verb {words} has a new name; run: merino-edge {new}\n"


def test_a_mistyped_verb_is_corrected(capfd: pytest.CaptureFixture[str]) -> None:
    assert run("serv") == 2
    assert "Did you mean 'serve'" in capfd.readouterr().err
