"""What the program does with its words, standard streams and --debug, whatever the verb."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from merino_edge.cli.verbs import VERBS


def test_debug_shows_the_traceback(tmp_path: Path, merino: tuple[str, ...]) -> None:
    done = subprocess.run([*merino, "show", str(tmp_path / "nothing"), "--debug"], capture_output=True, text=True)
    assert done.returncode == 3 and "Traceback" in done.stderr and "ArtefactError" in done.stderr


def test_debug_keeps_the_exit_code(tmp_path: Path, merino: tuple[str, ...]) -> None:
    words = ["show", str(tmp_path / "nothing")]
    codes = [
        subprocess.run([*merino, *line], capture_output=True).returncode
        for line in (words, [*words, "--debug"], ["--debug", *words])
    ]
    assert codes == [3, 3, 3]


def test_debug_may_be_a_value(tmp_path: Path, merino: tuple[str, ...]) -> None:
    command = [*merino, "show", "--", "--debug"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 3 and "--debug" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("words", ["--help", "--version", "train --help", "show lamb --json", "targets"])
def test_closed_pipe(words: str, merino: tuple[str, ...]) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run([*merino, *words.split()], stdout=pipe, stderr=subprocess.PIPE, text=True)
    assert (done.returncode, done.stderr) == (141, "")


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "2> /dev/full", "<&- >&- 2>&-"])
def test_closed_standard_streams(closed: str, tmp_path: Path, merino: tuple[str, ...]) -> None:
    line = f"{shlex.join(merino)} show {tmp_path}/nothing {closed}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert done.returncode == 3 and "Traceback" not in done.stderr


def test_json_without_a_standard_input(merino: tuple[str, ...]) -> None:
    done = subprocess.run(["bash", "-c", f"{shlex.join(merino)} generate --json <&-"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("merino-edge: ") and "unexpected" not in done.stderr


WRONG_WORDS = ["trian", "train", "search --bogus", "search --seed", "show a b", "--bogus", "distill bogus"]


@pytest.mark.parametrize("words", WRONG_WORDS)
def test_words_that_are_not_known_are_refused_in_one_line(words: str, merino: tuple[str, ...]) -> None:
    done = subprocess.run([*merino, *words.split()], capture_output=True, text=True)
    verb = words.split()[0] if words.split()[0] in VERBS else ""
    assert done.returncode == 2 and re.fullmatch(r"merino-edge: .*--help\n", done.stderr)
    assert f"see: merino-edge {verb}" in done.stderr


EMPTY = [["search", "--space", ""], ["train", "a.json", "--corpus=", "--out", "x"], ["show", ""]]


@pytest.mark.parametrize("words", EMPTY)
def test_empty_words_are_refused(words: list[str], tmp_path: Path, merino: tuple[str, ...]) -> None:
    done = subprocess.run([*merino, *words], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2 and "is empty; give a value" in done.stderr


NOT_EMPTY = [
    ["--prompt=What is 2+2="],
    ["--prompt", "--a="],
    ["--prompt", "x", "--stop=="],
    ["--prompt", "x", "--stop", "--b="],
]


@pytest.mark.parametrize("words", NOT_EMPTY)
def test_a_value_that_ends_in_an_equals_sign_is_not_empty(words: list[str], merino: tuple[str, ...]) -> None:
    done = subprocess.run([*merino, "generate", *words, "--max-tokens", "1"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("words", ["", "distill"])
def test_without_a_verb_the_help_is_shown(words: str, merino: tuple[str, ...]) -> None:
    done = subprocess.run([*merino, *words.split()], capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("Usage: merino-edge")


def test_help_without_docstrings() -> None:
    command = [sys.executable, "-OO", "-m", "merino_edge", "train", "--help"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert VERBS["train"].summary in done.stdout
