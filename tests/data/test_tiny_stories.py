"""Toy stories: equal for equal seeds, complete, and consistent."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from merino_edge.data.tiny_stories import _NUMBERS as NUMBERS
from merino_edge.data.tiny_stories import SEPARATOR, tiny_stories

STORIES = tiny_stories(seed=7, stories=800).split(SEPARATOR)[:-1]


def test_the_seed_decides() -> None:
    assert tiny_stories(3, 20) == tiny_stories(3, 20) != tiny_stories(4, 20)
    assert tiny_stories(3, 40).startswith(tiny_stories(3, 20))
    assert 1_000_000 < len(tiny_stories()) < 2_000_000


def test_every_story_is_whole_and_its_own() -> None:
    assert len(STORIES) == 800 and len(set(STORIES)) > 790
    for story in STORIES:
        assert re.fullmatch(r"[A-Z][A-Za-z ,.'?!\"\n]*[.!]", story), story
        assert story.count('"') % 2 == 0 and "  " not in story and len(story.split("\n")) == 3
        assert not re.search(r"\ba [aeiou]|\ban [^aeiou]|[.?!] [a-z]|\b(\w+) \1\b", story), story


def test_what_is_shared_adds_up() -> None:
    counted = 0
    for story in STORIES:
        if found := re.search(r"had (\w+) \w+ in (?:his|her).*Now \w+ had (\w+) \w+, and \w+ had (\w+)", story):
            had, given, left = (NUMBERS.index(word) for word in found.groups())
            assert had == given + left
            counted += 1
    assert counted > 50


def test_pronouns_agree() -> None:
    for story in STORIES:
        found = re.match(r"[^.]* named \w+\. (He|She) lived[^.]*? with (\w+) ", story)
        if found:
            assert found.group(2) == {"He": "his", "She": "her"}[found.group(1)]


# --- python -m merino_edge.data.tiny_stories ---

PROGRAM = (sys.executable, "-m", "merino_edge.data.tiny_stories")


def test_the_program_prints_the_stories() -> None:
    assert subprocess.run(PROGRAM, capture_output=True, text=True, check=True).stdout == tiny_stories()


@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_short(option: str) -> None:
    done = subprocess.run([*PROGRAM, option], capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.startswith("usage: python -m merino_edge.data.tiny_stories > corpus.txt\n")
    assert len(done.stdout) < 500


@pytest.mark.parametrize("word", ["stories", "--seed"])
def test_a_word_too_many_is_refused(word: str) -> None:
    done = subprocess.run([*PROGRAM, word], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and f"unrecognized arguments: {word}" in done.stderr


def test_a_closed_pipe_ends_it_quietly() -> None:
    read, write = os.pipe()
    os.close(read)
    done = subprocess.run(PROGRAM, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert (done.returncode, done.stderr) == (141, b"")
